"""Every benchmark's own arithmetic, on made-up measurements: nothing is trained and nothing is timed here."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import check_readme  # noqa: E402
import harness  # noqa: E402

SCRIPTS = sorted(path.stem for path in HERE.glob("bench_*.py"))
PEAKS = {"float32_gflops": 100.0, "bfloat16_gflops": 400.0, "gb_per_second": 20.0}


def made_up(script: Path, sides: dict[str, Any], pairs: int, logs: Path, warmup: int = 1) -> list[dict[str, Any]]:
    """Returns rounds in which incumbents take twice as much as ours, and a bare loop half."""

    def side(name: str, number: int) -> dict[str, Any]:
        factor = (1 if name.startswith("finetune") else 0.5 if name.startswith("bare") else 2) * (1 + number / 100)
        metrics = ("seconds", "cpu_seconds", "peak_mib", "ledger_mib", "seconds_per_token", "mib")
        return {**dict.fromkeys(metrics, factor), "losses": [1.0, 0.5], "tokens": 7, "tokens_per_step": 100.0}

    rounds = [{name: side(name, number) for name in sides} for number in range(pairs)]
    if script.stem == "bench_growth":
        # Its windows do not all measure the same: one counts tensors, and those of "rows" only look at the clock.
        for each in rounds[1::5]:
            each["bare loop"].pop("peak_mib")
    return rounds


@pytest.fixture
def result(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    name, mode = request.param
    monkeypatch.setattr(harness, "alternate", made_up)
    monkeypatch.setattr(harness, "alternate_fresh", made_up)
    monkeypatch.setattr("machine.peaks", lambda: PEAKS)
    monkeypatch.setattr("machine.has_bfloat16", lambda: True)
    module = importlib.import_module(name)
    for holder in (module, importlib.import_module("training")):
        if hasattr(holder, "peaks"):
            monkeypatch.setattr(holder, "peaks", lambda: PEAKS)
    if name == "bench_galore_refresh":
        sides = {"galore-torch": {}, "finetune": {}, "finetune, first basis": {}}
        monkeypatch.setattr(module, "paired", lambda first, later, rank, pairs: made_up(HERE, sides, pairs, HERE))
        monkeypatch.setattr(module, "energy", lambda *_: 0.99)
        monkeypatch.setattr(module, "synthetic", lambda *_: 1.0)
    out = tmp_path / "machine" / "result.json"
    out.parent.mkdir()
    monkeypatch.setattr(sys, "argv", [str(HERE / f"{name}.py"), *mode, "--out", str(out)])
    module.main()
    return json.loads(out.read_text())


BOTH = [(name, mode) for name in SCRIPTS for mode in (["--fast"], [])]


@pytest.mark.parametrize("result", BOTH, indirect=True, ids=lambda each: " ".join((each[0], *each[1])))
def test_a_script_measures_pairs_and_says_spreads_floors_and_circumstances(result: dict[str, Any]) -> None:
    around = result["environment"]
    assert {"threads", "load", "load_at_end", "cores_busy_with_others", "packages", "processor"} <= set(around)
    if result["benchmark"] == "growth":
        assert set(result["growth"]) == {"length", "vocabulary", "batch", "rows"}
        assert result["cases"][0]["pairs"] >= 3
        return
    assert result["cases"]
    for case in result["cases"]:
        assert case["pairs"] >= 5, case["case"]
        assert all("spread" in bar for bar in case["bars"])
    assert len(check_readme.table({"some processor": [result]})) > 2


# The goals that were missed when they were measured: each has to say how far one could get.
MISSED = ("short_chats", "vocabulary", "first_step", "prepare_rows", "packed", "checkpoint", "galore_refresh")
FAST = [(f"bench_{name}", ["--fast"]) for name in MISSED]


@pytest.mark.parametrize("result", FAST, indirect=True, ids=lambda each: each[0])
def test_goals_that_may_be_missed_have_a_floor(result: dict[str, Any]) -> None:
    speeds = [bar for case in result["cases"] for bar in case["bars"] if bar["at_least"] or "seconds" in bar["text"]]
    for bar in speeds:
        assert bar["floor"]["seconds"] > 0
        assert bar["floor"]["best_possible"] > 0
        assert bar["floor"]["says"]


@pytest.mark.parametrize("result", [("bench_growth", []), ("bench_vocabulary", ["--fast"])], indirect=True)
def test_results_are_drawn(result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    plot = importlib.import_module("plot")
    monkeypatch.setattr(sys, "argv", ["plot.py", "--results", str(tmp_path)])
    assert plot.main() == 0
    assert (tmp_path / "machine" / "result.png").stat().st_size > 10_000
    # Goals are drawn where there are any.
    assert (tmp_path / "machine" / "goals.png").exists() == (result["benchmark"] != "growth")
