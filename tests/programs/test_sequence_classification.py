"""`finetune classify`, `trainers/sequence_classification.py` and `examples/run_glue.py` as a user runs them."""

import csv
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
RUN_GLUE = ROOT / "examples" / "run_glue.py"
GOOD = ["red sun", "birds sang", "play every day", "small boats"]
BAD = ["old stone", "past walls", "stone walls", "old mat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, chat_tokenizer_cached: Any) -> Path:
    """A folder with a tiny BERT (`model`) and rows with `text` and `label`: `rows.csv` and `test.csv` (no labels)."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    path = tmp_path_factory.mktemp("classify")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertForSequenceClassification(config).save_pretrained(path / "model")
    chat_tokenizer_cached.save_pretrained(path / "model")
    rows = [(text, "good") for text in GOOD] + [(text, "bad") for text in BAD]
    write(path / "rows.csv", ["text", "label"], rows * 4)
    write(path / "test.csv", ["text"], [(text,) for text, _ in rows])
    return path


def write(path: Path, header: list[str], rows: list[Any]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def flags(folder: Path, output: Path, **changes: object) -> list[str]:
    """Returns the command line of a short run; `None` leaves a flag out, `True` gives it no value."""
    values: dict[str, object] = {
        "model_name_or_path": folder / "model",
        "output_dir": output,
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "seed": 1,
    } | changes
    words = []
    for name, value in values.items():
        if value is not None:
            words += [f"--{name}"] if value is True else [f"--{name}", *str(value).split()]
    return words


def losses(output: Path) -> list[float]:
    state = json.loads((output / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    output = folder / "trained"
    words = flags(folder, output, dataset_name=folder / "rows.csv", class_weights="balanced", max_steps=25)
    words += ["--dataset_train_split", "train[:75%]", "--dataset_test_split", "train[75%:]", "--eval_strategy", "epoch"]
    assert main(["classify", *words]) == 0
    return output


def test_the_command_trains_evaluates_and_saves(trained: Path) -> None:
    from transformers import pipeline

    results = json.loads((trained / "all_results.json").read_text())
    assert results["eval_accuracy"] == results["eval_f1_macro"] == 1.0
    assert losses(trained)[-1] < losses(trained)[0]
    classify: Any = pipeline("text-classification", model=str(trained))
    assert [each["label"] for each in classify([GOOD[0], BAD[0]])] == ["good", "bad"]


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_accumulation(folder: Path, trained: Path) -> None:
    output = folder / "two"
    words = flags(folder, output, gradient_accumulation_steps=1, use_cpu=None, dataset_name=folder / "rows.csv")
    words += ["--dataset_train_split", "train[:75%]", "--dataset_test_split", "train[75%:]", "--eval_strategy", "epoch"]
    words += ["--class_weights", "balanced"]
    one = [*words, "--gradient_accumulation_steps", "2", "--use_cpu", "--output_dir", str(folder / "one")]
    assert main(["classify", *one]) == 0
    command = [
        sys.executable,
        "-m",
        "finetune.cli.main",
        "classify",
        "--num_processes",
        "2",
        "--accelerate_config",
        "cpu",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(output) == pytest.approx(losses(folder / "one"), abs=1e-5)
    found, expected = (json.loads((path / "all_results.json").read_text()) for path in (output, folder / "one"))
    for name in ("eval_accuracy", "eval_f1_macro", "eval_loss"):
        assert found[name] == pytest.approx(expected[name], abs=1e-5)


def test_an_adapter_with_its_head(folder: Path) -> None:
    output = folder / "adapter"
    lora = {"use_peft": True, "lora_r": 2, "lora_target_modules": "all-linear"}
    words = flags(folder, output, dataset_name=folder / "rows.csv", **lora)
    assert main(["classify", *words]) == 0
    from safetensors import safe_open

    with safe_open(output / "adapter_model.safetensors", "pt") as weights:
        assert any("classifier" in name for name in weights.keys())  # noqa: SIM118
    assert json.loads((output / "classifier_config.json").read_text())["id2label"] == {"0": "bad", "1": "good"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"text_columns": "txt"}, "Did you mean `text`"),
        ({"label_column": "lable"}, "Did you mean `label`"),
        ({"class_weights": "balancd"}, "balanced"),
        ({"class_weights": "1 2 3"}, "3 numbers for 2 classes"),
        ({"dataset_name": "{folder}/test.csv"}, "has no labels"),
        ({"learning_rte": 1}, "learning_rate"),
    ],
)
def test_a_mistake_is_one_line(
    folder: Path, changes: dict[str, object], expected: str, capfd: pytest.CaptureFixture[str]
) -> None:
    changes = {name: str(value).format(folder=folder) for name, value in changes.items()}
    words = flags(folder, folder / "mistake", **{"dataset_name": folder / "rows.csv", **changes})
    assert main(["classify", *words]) in (1, 2)
    lines = [line for line in capfd.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1
    assert expected in lines[0]
    assert not (folder / "mistake").exists()


def run_glue(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["run_glue.py", *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(RUN_GLUE), run_name="__main__")
    assert end.value.code == 0


def test_run_glue_on_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = folder / "glue-files"
    files = {"train_file": folder / "rows.csv", "test_file": folder / "test.csv"}
    words = flags(folder, output, max_seq_length=3, max_steps=25, **files)
    words += ["--validation_file", str(folder / "rows.csv"), "--do_train", "--do_eval", "--do_predict"]
    run_glue(monkeypatch, *words, "--overwrite_output_dir")
    results = json.loads((output / "all_results.json").read_text())
    assert results["eval_accuracy"] == 1.0 and {"train_loss", "eval_loss", "train_runtime"} <= set(results)
    lines = (output / "predict_results_file.txt").read_text().splitlines()
    assert lines == ["index\tprediction", *(f"{i}\t{'good' if i < 4 else 'bad'}" for i in range(8))]
    assert "text-classification" in (output / "README.md").read_text()
    assert "max_length: {value: 3," in (output / "resolved_config.yaml").read_text()


def test_run_glue_under_accelerate_launch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes train as one, count each row of the short last batches once, and one of them writes the files."""
    write(folder / "dev.csv", ["text", "label"], [("red sun", "good"), ("old mat", "bad"), ("small boats", "good")])
    files = {"train_file": folder / "rows.csv", "validation_file": folder / "dev.csv", "test_file": folder / "test.csv"}
    output = {number: folder / f"glue-{number}" for number in (1, 2)}
    words = {
        number: [
            *flags(folder, out, max_steps=6, gradient_accumulation_steps=4 // number, **files),
            *["--do_train", "--do_eval", "--do_predict", "--per_device_eval_batch_size", "2"],
        ]
        for number, out in output.items()
    }
    run_glue(monkeypatch, *words[1])
    launcher = ["--config_file", str(ROOT / "accelerate_configs" / "cpu.yaml"), "--main_process_port", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *launcher, str(RUN_GLUE), *words[2]],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(output[2]) == pytest.approx(losses(output[1]), abs=1e-5)
    one, two = (json.loads((path / "all_results.json").read_text()) for path in output.values())
    for name in ("eval_accuracy", "eval_f1_macro", "eval_loss"):
        assert two[name] == pytest.approx(one[name], abs=1e-5)
    first, second = ((path / "predict_results_file.txt").read_text() for path in output.values())
    assert first == second and len(second.splitlines()) == 9
    assert (output[2] / "model.safetensors").is_file() and (output[2] / "README.md").is_file()


@pytest.mark.parametrize(
    ("task", "metrics"), [("mrpc", {"eval_accuracy", "eval_f1"}), ("stsb", {"eval_pearson", "eval_spearman"})]
)
def test_run_glue_on_a_task(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, task: str, metrics: set[str]
) -> None:
    """The task's dataset is a folder made here: columns, class names and test labels of -1 as in GLUE."""
    import datasets

    texts = GOOD + BAD
    classes = datasets.ClassLabel(names=["not_equivalent", "equivalent"])
    kind: Any = datasets.Value("float32") if task == "stsb" else classes
    features = datasets.Features(
        {"sentence1": datasets.Value("string"), "sentence2": datasets.Value("string"), "label": kind}
    )
    labels = [i / 2 for i in range(8)] if task == "stsb" else [1] * 4 + [0] * 4
    pair = {"sentence1": texts, "sentence2": texts[::-1]}
    made: Any = {
        split: datasets.Dataset.from_dict({**pair, "label": values}, features=features)
        for split, values in {"train": labels, "validation": labels, "test": [-1] * 8}.items()
    }
    datasets.DatasetDict(made).save_to_disk(tmp_path / "glue")
    words = flags(folder, tmp_path / "out", task_name=task, dataset_name=tmp_path / "glue", max_steps=2)
    run_glue(monkeypatch, *words, "--do_train", "--do_eval", "--do_predict")
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert metrics <= set(results)
    assert not {"eval_f1_macro", "eval_mse"} & set(results)
    assert len((tmp_path / "out" / f"predict_results_{task}.txt").read_text().splitlines()) == 9
    assert "glue" in (tmp_path / "out" / "README.md").read_text()
