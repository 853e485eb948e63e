"""TRL's own SFT, DPO and reward trainers, unmodified, with our Trainer as their base."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("run_trl_trainers.py")
UNCOMPARED = ("runtime", "per_second", "total_flos", "preparation_time")


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder, found = tmp_path_factory.mktemp("trl"), {}
    for which in ("theirs", "ours"):
        out = folder / which
        out.mkdir()
        done = subprocess.run(
            [sys.executable, str(SCRIPT), which, str(out)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        found[which] = json.loads((out / "report.json").read_text())
    return found


@pytest.mark.parametrize("name", ["sft", "dpo", "reward"])
def test_the_run_is_the_same(name: str, reports: dict[str, dict[str, Any]]) -> None:
    theirs, ours = reports["theirs"][name], reports["ours"][name]
    assert "finetune.trainer" in ours["bases"] and "transformers.trainer" not in ours["bases"]
    assert ours["saved"] == theirs["saved"] == ["checkpoint-2", "checkpoint-3"]
    for mine, other in zip(ours["history"], theirs["history"], strict=True):
        left, right = (
            {key: value for key, value in entry.items() if not key.endswith(UNCOMPARED)} for entry in (mine, other)
        )
        assert left.keys() == right.keys()
        for key in left:
            # Evaluation losses are weighed by items here, see README.md.
            rel = 1e-2 if key.startswith("eval_") else 1e-5
            assert left[key] == pytest.approx(right[key], rel=rel, abs=1e-6), key
