"""`finetune sft` and `trainers/sft.py` as a user runs them: processes, files, exit codes, one line per mistake."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from finetune.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
ROWS = [{"prompt": f"{i % 7} plus {i % 5} is", "completion": f" {i % 7 + i % 5}"} for i in range(24)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model (`model`) and rows (`rows.jsonl`)."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("sft")
    vocabulary = {"<pad>": 0, "<end>": 1} | {
        letter: index + 2 for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>").save_pretrained(
        path / "model"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(path / "model")
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def flags(folder: Path, output: Path, **changes: object) -> list[str]:
    """Returns the command line of a short run; `None` leaves a flag out, `True` gives it no value."""
    values: dict[str, object] = {
        "model_name_or_path": folder / "model",
        "dataset_name": folder / "rows.jsonl",
        "output_dir": output,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "gradient_checkpointing": "false",
        "report_to": "none",
        "use_cpu": True,
        "seed": 1,
    } | changes
    words = []
    for name, value in values.items():
        if value is not None:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def run(*words: str, script: bool = False) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "trainers/sft.py"] if script else [sys.executable, "-m", "finetune.cli.main", "sft"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.run([*start, *words], capture_output=True, text=True, check=False, cwd=ROOT, env=environment)


def losses(output: Path) -> list[float]:
    state = json.loads((output / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def files(folder: Path) -> dict[Path, int]:
    """Returns every file with the time it was last written, and every folder."""
    return {path: path.stat().st_mtime_ns if path.is_file() else 0 for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    output = folder / "trained"
    done = run(*flags(folder, output))
    assert done.returncode == 0, done.stderr[-3000:]
    return output


def test_the_command_trains_and_saves_a_model_that_loads(trained: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert len(losses(trained)) == 4
    assert losses(trained)[-1] < losses(trained)[0]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(trained), AutoTokenizer.from_pretrained(trained)
    assert model(**tokenizer("1 plus", return_tensors="pt")).logits.shape[-1] == len(tokenizer)


def test_the_script_and_a_yaml_file_give_the_same_losses(folder: Path, trained: Path) -> None:
    words = flags(folder, folder / "yaml", seed=None, max_steps=None, learning_rate=5.0)
    (folder / "run.yaml").write_text(yaml.safe_dump({"seed": 1, "max_steps": 4, "learning_rate": 7.0}))
    index = words.index("--learning_rate")
    words[index + 1] = "1e-3"  # the command line wins over the file
    done = run(*words, "--config", str(folder / "run.yaml"), script=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(folder / "yaml") == losses(trained)


def test_a_run_is_resumed_as_if_it_had_never_stopped(folder: Path, trained: Path) -> None:
    output = folder / "resumed"
    half = run(*flags(folder, output, max_steps=2, save_strategy="steps", save_steps=2))
    assert half.returncode == 0, half.stderr[-3000:]
    rest = run(*flags(folder, output, resume_from_checkpoint="auto"))
    assert rest.returncode == 0, rest.stderr[-3000:]
    assert losses(output) == losses(trained)


def test_a_signal_saves_and_the_exit_code_says_start_me_again(folder: Path) -> None:
    output = folder / "preempted"
    words = flags(folder, output, max_steps=100_000, enable_jit_checkpoint=True, save_strategy="steps", save_steps=3)
    process = subprocess.Popen([sys.executable, "trainers/sft.py", *words], cwd=ROOT, stdout=-1, stderr=-1, text=True)
    deadline = time.monotonic() + 120
    while not (output / "checkpoint-3").is_dir() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors[-3000:]
    newest = max(int(path.name.split("-")[1]) for path in output.glob("checkpoint-*"))
    assert f"at step {newest} of 100000, which is saved" in said
    assert not (output / "model.safetensors").exists()
    rest = run(*flags(folder, output, max_steps=newest + 2, resume_from_checkpoint="auto"))
    assert rest.returncode == 0, rest.stderr[-3000:]
    assert len(losses(output)) == newest + 2


def test_two_processes_train_as_one_with_twice_the_accumulation(folder: Path, trained: Path) -> None:
    output = folder / "two"
    words = flags(folder, output, gradient_accumulation_steps=1, use_cpu=None)
    done = run("--num_processes", "2", "--accelerate_config", "cpu", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(output) == pytest.approx(losses(trained), abs=1e-5)


def test_an_adapter_is_trained_and_evaluated(folder: Path) -> None:
    output = folder / "adapter"
    words = flags(
        folder,
        output,
        use_peft=True,
        lora_target_modules="all-linear",
        lora_r=2,
        dataset_train_split="train[:75%]",
        dataset_test_split="train[75%:]",
        eval_strategy="steps",
        eval_steps=2,
    )
    done = run(*words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (output / "adapter_model.safetensors").is_file()
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert len([entry for entry in history if "eval_loss" in entry]) == 2


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"learning_rte": 1}, "learning_rate"),
        ({"learning_rate": "fast"}, "learning_rate"),
        ({"model_name_or_path": None}, "--model_name_or_path"),
        ({"model_name_or_path": "./no-such-model"}, "no-such-model"),
        ({"dataset_name": None}, "--dataset_name"),
        ({"dataset_name": "./rows.jsnl"}, "rows.jsnl"),
        ({"dataset_name": "{folder}/empty.jsonl"}, "empty.jsonl"),
        ({"dataset_name": "{folder}/columns.jsonl"}, "question"),
        ({"dataset_train_split": "validation"}, "dataset_train_split"),
        ({"max_length": 4}, "max_length"),
        ({"output_dir": "{folder}/rows.jsonl/out"}, "output_dir"),
        ({"output_dir": "{folder}/trained"}, "overwrite_output_dir"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    folder: Path, trained: Path, changes: dict[str, object], expected: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "empty.jsonl").touch()
    (folder / "columns.jsonl").write_text('{"question": "a", "reply": "b"}\n')
    output = folder / "mistake"
    before = files(folder)
    changes = {name: str(value).format(folder=folder) if value else None for name, value in changes.items()}
    assert main(["sft", *flags(folder, output, **changes)]) in (1, 2)
    lines = [line for line in capfd.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1
    assert expected in lines[0]
    assert files(folder) == before


def test_a_mistake_before_a_launch_is_reported_once(folder: Path) -> None:
    done = run("--num_processes", "2", *flags(folder, folder / "mistake", learning_rte=1))
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
