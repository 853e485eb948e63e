"""TRL's own `sft.py` runs with its import changed, and its parser reads our dataclasses."""

import dataclasses
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import trl
import yaml
from trl.scripts import sft

import finetune

ROWS = [{"prompt": f"{i} plus 1 is", "completion": f" {i + 1}"} for i in range(8)]
CLASSES = ("ScriptArguments", "SFTConfig", "ModelConfig", "DatasetMixtureConfig")


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: Any, chat_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    tiny_llama(512).save_pretrained(tmp_path / "model")
    chat_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def run_script(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    source = inspect.getsource(sft)
    assert source.count("from trl import") == 2
    code = compile(source.replace("from trl import", "from finetune import"), "sft.py", "exec")
    monkeypatch.setattr(sys, "argv", ["sft.py", *words])
    exec(code, {"__name__": "__main__"})


def flags(folder: Path) -> list[str]:
    values = {"model_name_or_path": folder / "model", "output_dir": folder / "out", "max_steps": 2, "logging_steps": 1}
    values |= {"save_strategy": "no", "report_to": "none", "per_device_train_batch_size": 2, "learning_rate": 1e-3}
    return [word for name, value in values.items() for word in (f"--{name}", str(value))] + ["--use_cpu"]


def losses(folder: Path) -> list[float]:
    state = json.loads((folder / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def test_the_script_trains_evaluates_and_saves(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--dataset_name", str(folder / "data"), "--eval_strategy", "steps", "--eval_steps", "1"]
    run_script(monkeypatch, *flags(folder), *words, "--save_strategy", "steps", "--save_steps", "2")
    assert len(losses(folder)) == 2
    assert (folder / "out" / "model.safetensors").is_file()


def test_the_script_trains_an_adapter_on_a_mixture_of_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = str(folder / "data" / "train.jsonl")
    settings = {"datasets": [{"path": "json", "data_files": file}, {"path": file}], "nobodys_key": 1, "use_peft": True}
    (folder / "run.yaml").write_text(yaml.safe_dump({**settings, "lora_target_modules": ["q_proj"], "lora_r": 2}))
    with pytest.warns(UserWarning, match="--nobodys_key 1"):
        run_script(monkeypatch, "--config", str(folder / "run.yaml"), *flags(folder))
    assert (folder / "out" / "adapter_model.safetensors").is_file()


def test_trls_parser_reads_our_dataclasses(folder: Path) -> None:
    (folder / "run.yaml").write_text(yaml.safe_dump({"datasets": [{"path": "x", "split": "train"}], "lora_r": 4}))
    words = ["--config", str(folder / "run.yaml"), *flags(folder), "--lora_target_modules", "q_proj", "--packing"]
    classes = [getattr(finetune, name) for name in CLASSES]
    found = [library.TrlParser(classes).parse_args_and_config(list(words)) for library in (trl, finetune)]
    for theirs, ours in zip(*found, strict=True):
        assert type(theirs) is type(ours)
        names = [field.name for field in dataclasses.fields(ours)]
        assert {name: getattr(theirs, name) for name in names} == {name: getattr(ours, name) for name in names}
    script_args, training_args, model_args, mixture = found[1]
    assert mixture.datasets == [finetune.DatasetConfig("x")] and script_args.dataset_name is None
    assert training_args.packing and (model_args.lora_r, model_args.lora_target_modules) == (4, ["q_proj"])
