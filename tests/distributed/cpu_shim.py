"""Lets accelerate shard with FSDP on CPUs, so that FSDP can be tested without GPUs. For tests only.

accelerate runs plain DDP when FSDP is asked for on CPUs. `install` makes it treat a group of CPU processes (gloo) as
one that can be sharded; nothing else is changed. It replaces a private method of accelerate 1.15.
"""

import os
from typing import Any

import torch


def install() -> None:
    """Call it before the training arguments are made."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    from accelerate import state
    from accelerate.utils import DistributedType

    original = state.PartialState._prepare_backend

    def prepare_backend(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(self, *args, **kwargs)
        if "LOCAL_RANK" not in os.environ:
            return found
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        return "gloo", DistributedType.MULTI_GPU

    state.PartialState._prepare_backend = prepare_backend
