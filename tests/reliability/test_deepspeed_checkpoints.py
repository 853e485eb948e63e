"""DeepSpeed's checkpoints, which its own loader unpickles, are restored exactly and without running code."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_restored_exactly_and_nothing_executed(stage: int, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("deepspeed_roundtrip.py")
    command = [sys.executable, str(script), str(tmp_path), str(stage), str(port)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["before"] == report["after"] and not report["executed"]
    assert "Weights only load failed" in report["error"]
