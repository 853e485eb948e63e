"""The command line and the YAML file of programs."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import yaml

from finetune.arguments import (
    TrainingArguments,
    note_arguments,
    parse_arguments,
    replace_arguments,
    sources_of,
    write_resolved_config,
)
from finetune.arguments.coerce import coerce_training_arguments
from finetune.sft.config import SFTConfig


@dataclasses.dataclass
class ModelArguments:
    """The model."""

    model_name: str = dataclasses.field(metadata={"help": "Name or path, 100% required."})
    dtype: Literal["auto", "float32"] = "auto"
    columns: list[str] = dataclasses.field(default_factory=list)
    extra: dict[str, Any] | None = None
    limit: int | None = None
    trust_remote_code: bool = False


def parse(types, words, **kwargs):
    return parse_arguments(types, words.split() if isinstance(words, str) else words, **kwargs)


def error_of(capsys, types, words):
    with pytest.raises(SystemExit) as stop:
        parse(types, words)
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert text.count("error:") == 1
    return text.split("error: ")[1]


def test_flags_of_every_kind():
    model, args = parse(
        [ModelArguments, TrainingArguments],
        '--model_name m --columns a b --limit none --extra {"a":1} --dtype float32 --output-dir out --bf16'
        " --max_steps 1e3 --no_remove_unused_columns --learning_rate 3e-4 --report_to tensorboard"
        " --load_best_model_at_end false",
    )
    assert model == ModelArguments("m", "float32", ["a", "b"], {"a": 1}, None)
    assert (args.output_dir, args.bf16, args.max_steps, args.remove_unused_columns) == ("out", True, 1000, False)
    assert (args.learning_rate, args.report_to, args.load_best_model_at_end) == (3e-4, ["tensorboard"], False)
    (args,) = parse(TrainingArguments, "--report_to tensorboard wandb --include_num_input_tokens_seen ALL")
    assert (args.report_to, args.include_num_input_tokens_seen) == (["tensorboard", "wandb"], "all")


def test_a_shared_field_is_one_flag():
    model, config = parse([ModelArguments, SFTConfig], "--model_name m --trust_remote_code")
    assert model.trust_remote_code and config.trust_remote_code


def test_file_gives_defaults_and_flags_win(tmp_path, monkeypatch):
    file = tmp_path / "run.yaml"
    file.write_text(
        "learning_rate: 2e-5\nseed: 7\nmax-length: null\nbf16: no\nreport_to: [tensorboard, wandb]\n"
        "fsdp_config: {version: 1}\n"
        "evaluation_strategy: steps\nwarmup_ratio: 0.1\nenv: {FINETUNE_TEST: 3}\n"
    )
    monkeypatch.delenv("FINETUNE_TEST", raising=False)
    with pytest.warns(FutureWarning) as caught:
        (args,) = parse(SFTConfig, f"--config {file} --seed 8 --eval_strategy epoch --output_dir out")
    assert len(caught) == 2
    assert (args.learning_rate, args.seed, args.max_length, args.bf16) == (2e-5, 8, None, False)
    assert (args.report_to, args.fsdp_config, args.eval_strategy) == (["tensorboard", "wandb"], {"version": 1}, "epoch")
    assert os.environ.pop("FINETUNE_TEST") == "3"
    sources = sources_of(args)
    assert {
        name: sources[name] for name in ("learning_rate", "seed", "eval_strategy", "warmup_steps", "do_eval", "optim")
    } == {
        "learning_rate": f"file {file}",
        "seed": "flag --seed",
        "eval_strategy": "flag --eval_strategy",
        "warmup_steps": f"file {file}",
        "do_eval": "derived",
        "optim": "default",
    }


def test_old_flag_beats_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("eval_strategy: epoch\n")
    with pytest.warns(FutureWarning):
        (args,) = parse(TrainingArguments, f"--config {file} --evaluation_strategy no")
    assert args.eval_strategy == "no"


def test_old_flags_are_accepted():
    with pytest.warns(FutureWarning):
        (args,) = parse(
            SFTConfig, "--max-seq-length 64 --warmup_ratio 0.1 --group_by_length --no_cuda --fp16_opt_level O1"
        )
    assert (args.max_length, args.warmup_steps, args.train_sampling_strategy, args.use_cpu) == (
        64,
        0.1,
        "group_by_length",
        True,
    )


def test_errors_end_with_code_2_and_name_the_remedy(capsys, tmp_path):
    assert "unrecognized argument `--learning_rat`. Did you mean `--learning_rate`?" in error_of(
        capsys, TrainingArguments, "--learning_rat 1"
    )
    assert "'x' is not a number" in error_of(capsys, TrainingArguments, "--learning_rate x")
    assert "'1.5' is not a whole number" in error_of(capsys, TrainingArguments, "--max_steps 1.5")
    assert "'2' is not one of" in error_of(capsys, ModelArguments, "--model_name m --dtype 2")
    assert "`fp16=True` and `bf16=True` exclude" in error_of(capsys, TrainingArguments, "--bf16 --fp16")
    assert "missing arguments: `--model_name`" in error_of(capsys, ModelArguments, "")
    assert "`stray`" in error_of(capsys, TrainingArguments, "stray")
    assert "there is no such file" in error_of(capsys, TrainingArguments, "--config missing.yaml")
    file = tmp_path / "bad.yaml"
    for text, message in [
        ("learning_rat: 1", "`learning_rat` in .*bad.yaml is not an argument. Did you mean `learning_rate`"),
        ("max_steps: many", "`max_steps: many` in .*bad.yaml: 'many' is not a whole number"),
        ("log_level: loud", "choose from"),
        ("- 1", "must hold a mapping"),
        ("a: [", "is not valid YAML"),
        ("env: 3", "must be a mapping"),
    ]:
        file.write_text(text)
        assert re.search(message, error_of(capsys, TrainingArguments, f"--config {file}")), message


@pytest.mark.parametrize(
    ("flags", "variable", "value"),
    [
        ("--bf16 false", "ACCELERATE_MIXED_PRECISION", "bf16"),
        ("--fp16 true", "ACCELERATE_MIXED_PRECISION", "bf16"),
        ("--use_cpu false", "ACCELERATE_USE_CPU", "true"),
        ("--torch_compile_backend eager", "ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"),
        ("--gradient_accumulation_steps 2", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8"),
    ],
)
def test_launcher_that_disagrees_with_a_flag_is_named(capsys, monkeypatch, flags, variable, value):
    monkeypatch.setenv(variable, value)
    message = error_of(capsys, TrainingArguments, flags)
    assert variable in message and flags.split()[0][2:] in message


def test_resolved_config_tells_values_and_sources(tmp_path):
    model, args = parse(
        [ModelArguments, TrainingArguments], "--model_name m --hub_token hf_secret --eval_strategy steps --seed 3"
    )
    path = write_resolved_config(tmp_path / "deep" / "resolved_config.yaml", model, args)
    text = path.read_text()
    config = yaml.safe_load(text)
    assert "hf_secret" not in text
    assert config["ModelArguments"]["model_name"] == {"value": "m", "source": "flag --model_name"}
    assert config["TrainingArguments"]["seed"] == {"value": 3, "source": "flag --seed"}
    assert config["TrainingArguments"]["eval_steps"] == {"value": 500, "source": "derived"}
    assert config["TrainingArguments"]["learning_rate"] == {"value": 5e-5, "source": "default"}
    assert set(config["TrainingArguments"]) == {field.name for field in dataclasses.fields(args)}
    assert [item.name for item in path.parent.iterdir()] == ["resolved_config.yaml"]


class Unknown:
    def __str__(self) -> str:
        return "unknown thing"


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (np.float64(0.5), 0.5),
        (np.arange(3), [0, 1, 2]),
        (Path("a") / "b", "a/b"),
        (len, "builtins.len"),
        (Unknown, "test_parse.Unknown"),
        (Unknown(), "unknown thing"),
        ({"b", "a"}, ["a", "b"]),
        ({Path("k"): np.int64(3)}, {"k": 3}),
    ],
)
def test_values_of_any_kind_are_written(tmp_path, value, written):
    @dataclasses.dataclass
    class Mine(TrainingArguments):
        extra: Any = None

    args = Mine("out", extra=None)
    args.extra = value
    config = yaml.safe_load(write_resolved_config(tmp_path / "r.yaml", args).read_text())
    found = config["Mine"]["extra"]["value"]
    assert found == written or (isinstance(written, str) and found.endswith(written))
    assert json.loads(args.to_json_string())["extra"] == found


def test_a_file_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    note_arguments(tmp_path / "file" / "run", TrainingArguments("out"))
    assert "`resolved_config.yaml` was not written" in caplog.text


def test_sources_of_arguments_made_in_code(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    args = TrainingArguments("out", seed=3, learning_rate=5e-5)
    sources = sources_of(args)
    assert (sources["output_dir"], sources["seed"], sources["learning_rate"]) == ("code", "code", "default")
    assert sources_of(dataclasses.replace(args, data_seed=1))["data_seed"] == "code"
    config = yaml.safe_load(write_resolved_config(tmp_path / "r.yaml", args).read_text())
    assert config["environment"]["ACCELERATE_MIXED_PRECISION"] == {"value": "no", "source": "environment"}


def test_a_changed_copy_keeps_the_sources():
    (args,) = parse(SFTConfig, "--seed 3 --output_dir out --eval_strategy steps")
    changed = replace_arguments(args, model_init_kwargs={"dtype": "auto"}, seed=4)
    assert (changed.seed, args.seed) == (4, 3)
    sources = sources_of(changed)
    assert [sources[name] for name in ("output_dir", "seed", "model_init_kwargs", "do_eval", "packing")] == [
        "flag --output_dir",
        "code",
        "code",
        "derived",
        "default",
    ]
    assert sources_of(coerce_training_arguments(args, SFTConfig))["seed"] == "flag --seed"


def test_help_is_quick_to_import_and_complete():
    code = (
        "import sys\nfrom finetune.arguments import parse_arguments\nfrom finetune.sft.config import SFTConfig\n"
        "try:\n    parse_arguments(SFTConfig, ['--help'])\n"
        "finally:\n    print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert result.stdout.strip().endswith("False False")
    for field in dataclasses.fields(SFTConfig):
        assert f"--{field.name}" in result.stdout
