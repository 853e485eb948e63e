"""Two processes are one process with twice the accumulation: losses, gradient norms, weights, evaluation."""

import json
from pathlib import Path
from typing import Any

import pytest
from launching import made_once, run
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


def launch(processes: int, out: Path, runs: dict[str, dict[str, Any]]) -> None:
    """Trains each of `runs` on `processes` processes: one accumulates over as many rows as two share."""
    common = {**ARGUMENTS, "gradient_accumulation_steps": 2 // processes}
    given = {name: {**each, "arguments": {**common, **each.get("arguments", {})}} for name, each in runs.items()}
    for name in runs:
        (out / name).mkdir(parents=True)
    run(SCRIPT, out, json.dumps(given), processes=processes)


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def both(uneven: bool, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the options of one process and of two, whose last batch of an epoch accelerate would leave out or not."""
    arguments = options.pop("arguments", {})
    two = {**arguments, "accelerator_config": {"even_batches": not uneven}}
    return {**options, "arguments": arguments}, {**options, "arguments": two}


SGD = {"optim": "sgd", "learning_rate": 0.1}
RUNS = {
    # Without `even_batches` accelerate would leave the second process without a batch in the last of 21 rows.
    "uneven": both(True, model="llama", rows=21),
    # One row has labels: each epoch has a window without any, and one where one process has none.
    "unlabelled": both(False, model="llama", rows=8, labelled=1, arguments=SGD),
}
SAVED = {"model": "llama", "rows": 24, "arguments": {"save_strategy": "steps", "save_steps": 4}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of all runs on one process, and on two. Of `saved`, one process does the second half."""

    def make(out: Path) -> None:
        launch(2, out / "two", {**{name: two for name, (_, two) in RUNS.items()}, "saved": SAVED})
        resumed = {**SAVED, "resume": str(out / "two" / "saved" / "checkpoint-4")}
        launch(1, out / "one", {**{name: one for name, (one, _) in RUNS.items()}, "saved": resumed})

    folder = made_once(tmp_path_factory, "two_processes", make)
    return folder / "one", folder / "two"


def assert_equal_runs(out_one: Path, out_two: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the reports of two runs, after comparing them."""
    one, two = report(out_one), report(out_two)
    assert (one["processes"], two["processes"]) == (1, 2)
    for first, second in zip(one["history"], two["history"], strict=True):
        assert first["step"] == second["step"]
        for name in ("loss", "grad_norm", "learning_rate", "eval_loss"):
            assert (name in first) == (name in second), name
            if name in first:
                assert first[name] == pytest.approx(second[name], rel=1e-5), name
    assert_equal_weights(out_one, out_two)
    return one, two


def assert_equal_weights(out_one: Path, out_two: Path) -> None:
    expected = load_file(out_one / "model" / "model.safetensors")
    for name, tensor in load_file(out_two / "model" / "model.safetensors").items():
        assert (tensor - expected[name]).abs().max() <= 1e-5, name


def test_a_last_batch_for_one_process_only(runs: tuple[Path, Path]) -> None:
    one, two = runs
    assert_equal_runs(one / "uneven", two / "uneven")


def test_windows_and_processes_without_labels(runs: tuple[Path, Path]) -> None:
    one, two = runs
    _, found = assert_equal_runs(one / "unlabelled", two / "unlabelled")
    losses = [entry["loss"] > 0 for entry in found["history"] if "loss" in entry]
    assert sorted(losses) == [False, False, True, True]


def test_resuming_on_one_process_what_two_began(runs: tuple[Path, Path]) -> None:
    one, two = (each / "saved" for each in runs)
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {p.name for p in (two / "checkpoint-4").iterdir()}
    assert report(one)["eval"]["eval_loss"] == pytest.approx(report(two)["eval"]["eval_loss"], rel=1e-5)
    assert_equal_weights(one, two)


@pytest.mark.slow
def test_a_classifier(tmp_path: Path) -> None:
    for processes, options in zip((1, 2), both(False, model="bert", rows=24), strict=True):
        launch(processes, tmp_path / str(processes), {"bert": options})
    one, two = assert_equal_runs(tmp_path / "1" / "bert", tmp_path / "2" / "bert")
    # The share of an epoch is counted in batches, and none of them is a repeated one here.
    epochs = [[entry["epoch"] for entry in each["history"]] for each in (one, two)]
    assert epochs[0] == pytest.approx(epochs[1])


@pytest.mark.slow
def test_evaluation_counts_every_row_once(tmp_path: Path) -> None:
    """13 rows on 2 processes in batches of 4: accelerate repeats 3 rows, and none of them may be counted.

    Slow, because `test_two_process_evaluation.py` looks at more ways in one launch.
    """
    options: dict[str, Any] = {"model": "bert", "rows": 16, "eval_rows": 13, "arguments": {"max_steps": 1}}
    metrics = {**options, "metrics": True}
    launch(1, tmp_path / "one", {"metrics": metrics})
    launch(2, tmp_path / "two", {"metrics": metrics, "loss": options})
    one, two, loss = (report(tmp_path / name)["eval"] for name in ("one/metrics", "two/metrics", "two/loss"))
    assert two["eval_rows"] == one["eval_rows"] == 13
    assert two["eval_labels"] == one["eval_labels"]
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-6)
    assert loss["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-6)
