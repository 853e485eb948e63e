"""DeepSpeed's checkpoints, which its own loader unpickles, are restored exactly and without running code."""

import json
from pathlib import Path

import pytest
from launching import free_port, run

pytest.importorskip("deepspeed")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_restored_exactly_and_nothing_executed(stage: int, tmp_path: Path) -> None:
    run(Path(__file__).with_name("deepspeed_roundtrip.py"), tmp_path, stage, free_port())
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["before"] == report["after"] and not report["executed"]
    assert "Weights only load failed" in report["error"]
