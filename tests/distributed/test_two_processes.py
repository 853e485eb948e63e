"""Two processes are one process with twice the accumulation: losses, gradient norms, weights, evaluation."""

import json
from pathlib import Path
from typing import Any

import pytest
from launching import run
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("run_trainer.py")
ARGUMENTS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 4,
    "num_train_epochs": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "seed": 5,
}


def launch(processes: int, out: Path, model: str, accumulation: int, **options: Any) -> dict[str, Any]:
    """Runs the script on `processes` processes and returns its report."""
    arguments = {**ARGUMENTS, "gradient_accumulation_steps": accumulation, **options.pop("arguments", {})}
    out.mkdir(parents=True, exist_ok=True)
    payload = json.dumps({"model": model, "arguments": arguments, **options})
    run(SCRIPT, out, payload, processes=processes)
    return json.loads((out / "report.json").read_text())


def assert_equal_runs(one: dict[str, Any], two: dict[str, Any], out_one: Path, out_two: Path) -> None:
    assert (one["processes"], two["processes"]) == (1, 2)
    for first, second in zip(one["history"], two["history"], strict=True):
        assert first["step"] == second["step"]
        for name in ("loss", "grad_norm", "learning_rate", "eval_loss"):
            assert (name in first) == (name in second), name
            if name in first:
                assert first[name] == pytest.approx(second[name], rel=1e-5), name
    expected = load_file(out_one / "model" / "model.safetensors")
    for name, tensor in load_file(out_two / "model" / "model.safetensors").items():
        assert (tensor - expected[name]).abs().max() <= 1e-5, name


@pytest.mark.parametrize(("model", "rows"), [("llama", 21), pytest.param("bert", 24, marks=pytest.mark.slow)])
def test_same_run(model: str, rows: int, tmp_path: Path) -> None:
    """Without `even_batches` accelerate would leave the second process without a batch in the last of 21 rows."""
    one = launch(1, tmp_path / "one", model, accumulation=2, rows=rows)
    uneven = {"accelerator_config": {"even_batches": rows == 24}}
    two = launch(2, tmp_path / "two", model, accumulation=1, rows=rows, arguments=uneven)
    assert_equal_runs(one, two, tmp_path / "one", tmp_path / "two")
    if rows % 4 == 0:  # the share of an epoch is counted in batches, and a repeated one counts
        epochs = [[entry["epoch"] for entry in run["history"]] for run in (one, two)]
        assert epochs[0] == pytest.approx(epochs[1])


def test_windows_and_processes_without_labels(tmp_path: Path) -> None:
    """Of 8 rows one has labels: each epoch has a window without any, and one where one process has none."""
    options: dict[str, Any] = {"rows": 8, "labelled": 1, "arguments": {"optim": "sgd", "learning_rate": 0.1}}
    one = launch(1, tmp_path / "one", "llama", accumulation=2, **options)
    two = launch(2, tmp_path / "two", "llama", accumulation=1, **options)
    assert_equal_runs(one, two, tmp_path / "one", tmp_path / "two")
    assert sorted(entry["loss"] > 0 for entry in two["history"] if "loss" in entry) == [False, False, True, True]


@pytest.mark.slow
def test_evaluation_counts_every_row_once(tmp_path: Path) -> None:
    """13 rows on 2 processes in batches of 4: accelerate repeats 3 rows, and none of them may be counted.

    Slow, because `test_two_process_evaluation.py` looks at more ways in one launch.
    """
    options: dict[str, Any] = {"rows": 16, "eval_rows": 13, "arguments": {"max_steps": 1}}
    one = launch(1, tmp_path / "one", "bert", accumulation=2, metrics=True, **options)
    two = launch(2, tmp_path / "two", "bert", accumulation=1, metrics=True, **options)
    only_loss = launch(2, tmp_path / "loss", "bert", accumulation=1, **options)
    assert two["eval"]["eval_rows"] == one["eval"]["eval_rows"] == 13
    assert two["eval"]["eval_labels"] == one["eval"]["eval_labels"]
    assert two["eval"]["eval_loss"] == pytest.approx(one["eval"]["eval_loss"], rel=1e-6)
    assert only_loss["eval"]["eval_loss"] == pytest.approx(one["eval"]["eval_loss"], rel=1e-6)


def test_resuming_on_one_process_what_two_began(tmp_path: Path) -> None:
    whole = launch(2, tmp_path / "whole", "llama", 1, rows=24, arguments={"save_strategy": "steps", "save_steps": 4})
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {p.name for p in checkpoint.iterdir()}
    alone = launch(1, tmp_path / "alone", "llama", 2, rows=24, resume=str(checkpoint))
    assert alone["eval"]["eval_loss"] == pytest.approx(whole["eval"]["eval_loss"], rel=1e-5)
    expected = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "alone" / "model" / "model.safetensors").items():
        assert (tensor - expected[name]).abs().max() <= 1e-5, name
