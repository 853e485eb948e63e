"""Checks, after `prepare`, that the model is sharded as the accelerator says."""

from __future__ import annotations

from typing import Any

from torch import nn

from finetune.distributed.accelerator import fsdp_version, zero_stage
from finetune.errors import ArgumentError


def verify_prepared(accelerator: Any, model: Any) -> None:
    """Raises `ArgumentError` when the prepared `model` does not exchange gradients, or is not sharded, as was asked.

    What was asked for and what accelerate says it runs were compared before (`accelerator.verify_what_runs`). This
    compares with what was done to the model: processes that nothing connects train alone and save over each other.
    """
    processes, stage, version = accelerator.num_processes, zero_stage(accelerator), fsdp_version(accelerator)
    if stage is not None:
        _verify_deepspeed(model, stage)
    elif version is not None:
        _verify_fsdp(model, version)
    elif processes > 1 and not _is_split(accelerator, model):
        inner = getattr(model, "_orig_mod", model)
        if not isinstance(inner, nn.parallel.DistributedDataParallel):
            raise ArgumentError(
                f"{processes} processes run, but the prepared model is a {type(inner).__name__}, which exchanges no "
                "gradients: each process would train alone. Pass `model` as it was loaded, and leave "
                "`accelerator.prepare` to `train()`."
            )


def _is_split(accelerator: Any, model: Any) -> bool:
    """Returns whether the processes share layers (tensor parallelism) or the model was sharded while loading."""
    loaded = getattr(model, "is_distributed_loading_by_transformers", False) or getattr(model, "_tp_size", None)
    return bool(loaded) or getattr(accelerator, "parallelism_config", None) is not None


def _verify_deepspeed(engine: Any, stage: int) -> None:
    runs = engine.zero_optimization_stage() if hasattr(engine, "zero_optimization_stage") else None
    if runs is None or int(runs) != stage:
        raise ArgumentError(
            f"ZeRO stage {stage} was asked for, but the prepared model is a {type(engine).__name__} with stage {runs}. "
            "Set the stage in one place: `zero_stage` of the launch configuration, or the file given as `deepspeed`."
        )


def _verify_fsdp(model: nn.Module, version: int) -> None:
    from torch.distributed import fsdp

    wanted: Any = fsdp.FSDPModule if version == 2 else fsdp.FullyShardedDataParallel
    if not any(isinstance(module, wanted) for module in model.modules()):
        raise ArgumentError(
            f"FSDP{version} was asked for, but no part of the prepared {type(model).__name__} is sharded. Check "
            "`fsdp_config` (`auto_wrap_policy`, `version`) or the launch configuration."
        )
