"""Two processes, interrupted and resumed, end as two that were not: to the last bit, on both."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("run_resume.py")
spec = importlib.util.spec_from_file_location("run_resume", SCRIPT)
assert spec is not None and spec.loader is not None
program: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(program)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    out = tmp_path_factory.mktemp("resume")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    done = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((out / f"report_{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", program.CASES)
def test_both_end_alike(case: str, reports: list[dict[str, str]]) -> None:
    assert [report["processes"] for report in reports] == ["2", "2"]
    assert [report[case] for report in reports] == ["equal", "equal"]
