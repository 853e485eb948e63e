"""Liger's kernels on one process and on two that share the model: the same training as without them.

Run through Triton's interpreter. The runs without Liger are of the same backend, and one process is compared with two.
"""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("liger_kernel")

HERE = Path(__file__).parent
CONFIGS = {"fsdp2": "fsdp2", "zero2": "zero2", "zero3": "zero3"}
KERNELS = ["rms_norm", "rope", "swiglu"]
# Who computes the loss, and which of Liger's functions are called for it.
HEADS = {
    "plain": ("fused with the head, without logits", []),
    "fused_head": ("Liger's fused head", ["fused_linear_cross_entropy", *KERNELS]),
    "own_head": ("fused with the head, without logits", KERNELS),
    "cross_entropy": ("from all logits: Liger's `cross_entropy` computes its loss", ["cross_entropy", *KERNELS]),
}


def launch(backend: str, cases: list[str], out: Path) -> dict[str, Any]:
    """Returns the report of `run_liger.py` on one process (`one`) or on two as `backend` says."""
    program = [str(HERE / "run_liger.py"), str(out), json.dumps({"backend": backend, "cases": cases})]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TRITON_INTERPRET": "1"}
    command = [sys.executable, *program]
    if backend != "one":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        config = str(HERE.parents[1] / "accelerate_configs" / f"{CONFIGS[backend]}.yaml")
        flags = ["--config_file", config, "--num_processes", "2", "--main_process_port", port]
        launcher = [sys.executable, "-m", "accelerate.commands.launch"]
        command = [*launcher, *flags, "--mixed_precision", "no", *program]
        if backend.startswith("zero"):
            environment["DS_ACCELERATOR"] = "cpu"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    lines = [line for line in done.stderr.splitlines() if not re.match(r"\[rank1\]|.*it/s\]", line)]
    assert done.returncode == 0, "\n".join(lines)[-6000:]
    return json.loads((out / "report.json").read_text())


def check(report: dict[str, Any], processes: int) -> None:
    for name, found in report.items():
        plain = report["lora_plain" if name.startswith("lora") else "plain"]
        head, calls = HEADS[name.removeprefix("lora_")]
        assert found["processes"] == processes
        assert found["head"] == head, name
        assert set(found["calls"]) == set(calls), name
        assert found["losses"] == pytest.approx(plain["losses"], abs=1e-5), name
        assert found["grad_norms"] == pytest.approx(plain["grad_norms"], abs=1e-5), name
        assert found["losses"][1] != found["losses"][0], "it trained"


@pytest.mark.parametrize("with_adapters", [["plain", "fused_head"], pytest.param(list(HEADS), marks=pytest.mark.slow)])
def test_one_process_and_who_owns_the_head(with_adapters: list[str], tmp_path: Path) -> None:
    names = [*HEADS, *(f"lora_{name}" for name in with_adapters)]
    check(launch("one", names, tmp_path), 1)


@pytest.mark.slow
@pytest.mark.parametrize("backend", CONFIGS)
def test_two_processes(backend: str, tmp_path: Path) -> None:
    if backend.startswith("zero"):
        pytest.importorskip("deepspeed")
    names = ["plain", "fused_head", "cross_entropy", "lora_plain", "lora_fused_head"]
    report = launch(backend, names, tmp_path / backend)
    check(report, 2)
    assert {found["kind"] for found in report.values()} == {"FSDP" if backend == "fsdp2" else "DEEPSPEED"}
    one = launch("one", ["plain"], tmp_path / "one")["plain"]
    assert report["fused_head"]["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert report["fused_head"]["grad_norms"] == pytest.approx(one["grad_norms"], abs=1e-5)
