"""Lets FSDP and DeepSpeed be tested without GPUs. For tests only.

accelerate runs plain DDP when FSDP is asked for on CPUs. `install` makes it treat a group of CPU processes (gloo) as
one that can be sharded. It replaces private methods of accelerate 1.15 and torch 2.13.
"""

import contextlib
import os
from typing import Any

import torch


def install(backend: str) -> None:
    """Makes ready for a backend of the tests, named like its configuration. Call it before the training arguments are
    made.
    """
    if backend.startswith("fsdp"):
        _shard_with_fsdp()
    if backend.startswith("zero"):
        _compile_no_collectives()


def _shard_with_fsdp() -> None:
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
    _offload_to_where_it_is()


def _compile_no_collectives() -> None:
    """DeepSpeed would compile collectives for CPUs, two minutes on a new machine; gloo has some, GPUs others."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _offload_to_where_it_is() -> None:
    """What is on the CPU already is not copied there, but FSDP reuses or frees what it believes it has copied.

    FSDP1 would save freed memory as weights (SIGSEGV) and one moment of Adam as both; FSDP2 would pin memory for
    copies to a device that is not there.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, _optim_utils
    from torch.distributed.fsdp._flat_param import FlatParamHandle

    gather = _optim_utils._allgather_orig_param_states

    def gather_copies(info: Any, *args: Any, **kwargs: Any) -> Any:
        views = info.handle._get_unflat_views_aligned
        info.handle._get_unflat_views_aligned = lambda tensor: views(tensor.clone())
        try:
            return gather(info, *args, **kwargs)
        finally:
            del info.handle._get_unflat_views_aligned

    setattr(_optim_utils, "_allgather_orig_param_states", gather_copies)  # noqa: B010
    setattr(FlatParamHandle, "to_cpu", lambda self: contextlib.nullcontext())  # noqa: B010
    setattr(CPUOffloadPolicy.__init__, "__defaults__", (False,))  # noqa: B010
