"""What `finetune plan` computes for several ranks, against the tensors that two processes really hold.

Weights, gradients, optimizer state and the peak, per rank, within 10 % (12 % for the peak).
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import run

HERE = Path(__file__).parent
CONFIGS = {"ddp": "cpu", "fsdp2": "fsdp2", "zero1": "zero1", "zero2": "zero2", "zero3": "zero3"}
spec = importlib.util.spec_from_file_location("run_memory", HERE / "run_memory.py")
assert spec is not None and spec.loader is not None
program: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(program)


def launch(backend: str, bf16: bool, out: Path) -> list[dict[str, Any]]:
    """Returns what each of two processes held."""
    run(
        HERE / "run_memory.py",
        out,
        json.dumps({"backend": backend, "bf16": bf16}),
        processes=2,
        config=CONFIGS[backend],
        flags={"mixed_precision": "bf16" if bf16 else "no"},
        environment={"DS_ACCELERATOR": "cpu"} if backend.startswith("zero") else None,
    )
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(2)]


def planned(backend: str, bf16: bool, out: Path) -> tuple[Any, int]:
    """Returns the plan's row, and how much of its weights is gathered for a while."""
    from transformers import LlamaConfig

    from finetune import SFTConfig
    from finetune.reporting.memory_estimate import sharded
    from finetune.reporting.planned_step import PlannedStep, mixed_dtype

    args = SFTConfig(str(out), **program.ARGUMENTS, bf16=bf16, use_cpu=True)
    config = LlamaConfig(**program.MODEL)
    with PlannedStep(config, args, torch.float32, autocast=mixed_dtype(args)) as step:
        trace = narrow = step.trace()
    if step.autocast is not None:
        with PlannedStep(config, args, step.autocast) as low:
            narrow = low.trace()
    settings = {"trained_bytes": step.gradient_bytes, "bucket_elements": program.BUCKET}
    row = sharded(backend, 2, trace, narrow, step.sizes, **settings)
    stored = (trace if backend in ("ddp", "fsdp2") else narrow).largest("weights")
    return row, row.groups["weights"] - (stored // 2 if backend in ("fsdp2", "zero3") else stored)


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("backend", CONFIGS)
def test_two_processes_hold_what_was_planned(backend: str, bf16: bool, tmp_path: Path) -> None:
    if backend.startswith("zero"):
        pytest.importorskip("deepspeed")
    row, gathered = planned(backend, bf16, tmp_path)
    for found in launch(backend, bf16, tmp_path / "run"):
        assert found["processes"] == 2
        assert found["kind"] == {"ddp": "MULTI_CPU", "fsdp2": "FSDP"}.get(backend, "DEEPSPEED")
        assert found["weights"] == pytest.approx(row.groups["weights"] - gathered, rel=0.1)
        # Gathered weights have whole gradients for a moment, which the plan counts with what is gathered.
        assert 0.9 <= found["gradients"] / row.groups["gradients"] <= 1.1 + gathered / row.groups["gradients"]
        assert found["moments"] == pytest.approx(row.groups["moments"], rel=0.1)
        assert found["peak"] == pytest.approx(row.peak, rel=0.12)
