"""Evaluation, search and error messages of two processes equal those of one: no row twice, none lost."""

import json
from pathlib import Path
from typing import Any

import pytest
from launching import made_once, run

SCRIPT = Path(__file__).with_name("run_evaluation.py")
TIMED = ("runtime", "per_second", "preparation_time")


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The report of one process, and those of each of two."""

    def of(processes: int) -> list[dict[str, Any]]:
        def make(out: Path) -> None:
            out.mkdir()
            run(SCRIPT, out, processes=processes)

        out = made_once(tmp_path_factory, f"evaluation-{processes}", make)
        return [json.loads((out / f"report_{rank}.json").read_text()) for rank in range(processes)]

    return of(1)[0], of(2)


WAYS = [
    *("kept", "uneven", "uneven, few rows", "sums", "few rows"),
    *("padding-free", "stream", "padding-free stream", "batches", "predict"),
]


@pytest.mark.parametrize("way", WAYS)
def test_every_row_counts_once(way: str, reports: Any) -> None:
    one, two = reports
    expected = {name: value for name, value in one["found"][way].items() if not name.endswith(TIMED)}
    assert len(two) == 2
    for report in two:
        found = {name: value for name, value in report["found"][way].items() if not name.endswith(TIMED)}
        assert report["processes"] == 2
        assert found == pytest.approx(expected, rel=1e-5)


def test_all_ways_agree_on_the_loss(reports: Any) -> None:
    found = reports[0]["found"]
    losses = [found[way]["eval_loss"] for way in WAYS if "few rows" not in way and way != "predict"]
    assert losses == pytest.approx([found["predict"]["test_loss"]] * len(losses), rel=1e-5)
    assert (
        found["uneven"]["eval_rows"]
        == found["kept"]["eval_rows"]
        == found["kept"]["eval_losses"]
        == found["batches"]["eval_rows"]
        == 13
    )


def test_a_search_runs_the_same_trials_on_all_processes(reports: Any) -> None:
    one, two = reports
    assert two[1]["search"] == {}, "the result belongs to the first process"
    assert two[0]["search"]["id"] in ("0", "2"), "trial 1 was pruned, everywhere"
    assert two[0]["search"]["learning_rate"] == one["search"]["learning_rate"]


def test_all_processes_stop_with_the_error_that_names_the_rows(reports: Any) -> None:
    one, two = reports
    assert "rows [6, 7]" in one["poisoned"]
    assert all("rows [6, 7]" in report["poisoned"] for report in two), [report["poisoned"] for report in two]


def test_all_processes_drop_the_same_update(reports: Any) -> None:
    one, two = reports
    assert 0 < one["skipped"] < 1
    assert 0 < two[0]["skipped"] == two[1]["skipped"] < 1
