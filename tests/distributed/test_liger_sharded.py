"""Liger's kernels on one process and on two that share the model: the same training as without them.

Run through Triton's interpreter. The runs without Liger are of the same backend, and one process is compared with two.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from launching import run

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
    options: dict[str, Any] = {"environment": {"TRITON_INTERPRET": "1"}}
    if backend != "one":
        options |= {"processes": 2, "config": CONFIGS[backend], "flags": {"mixed_precision": "no"}}
    if backend.startswith("zero"):
        options["environment"]["DS_ACCELERATOR"] = "cpu"
    run(HERE / "run_liger.py", out, json.dumps({"backend": backend, "cases": cases}), **options)
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
