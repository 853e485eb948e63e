"""Two processes, interrupted and resumed, end as two that were not: to the last bit, on both."""

import json
from pathlib import Path

import pytest
import run_resume as program
from launching import made_once, run


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    out = made_once(tmp_path_factory, "resume", lambda out: run(Path(program.__file__), out, processes=2))
    return [json.loads((out / f"report_{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", program.CASES)
def test_both_end_alike(case: str, reports: list[dict[str, str]]) -> None:
    assert [report["processes"] for report in reports] == ["2", "2"]
    assert [report[case] for report in reports] == ["equal", "equal"]
