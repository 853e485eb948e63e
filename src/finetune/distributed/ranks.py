"""Rank, world size and small collectives; usable without `torch.distributed`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def world_size() -> int:
    """Returns the number of processes that exchange gradients; 1 when none was initialised."""
    return dist.get_world_size() if _initialised() else 1


def process_index() -> int:
    """Returns this process's number among all, from 0."""
    return dist.get_rank() if _initialised() else 0


def is_world_process_zero() -> bool:
    """Returns whether this is the one process that writes what all share."""
    return process_index() == 0


def broadcast_object(value: Any, source: int = 0) -> Any:
    """Returns the `value` that process `source` passed, on every process. Plain picklable values only."""
    if not _initialised():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def store() -> Any:
    """Returns the key-value store in which the processes found each other. Threads may use it, unlike collectives.

    Raises:
        ValueError: no process group was initialised.
    """
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def highest(value: torch.Tensor) -> torch.Tensor:
    """Returns the largest of the processes' values of a tensor, element by element, on every process."""
    if _initialised():
        value = value.clone()
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


def sum_over_processes(value: torch.Tensor, accelerator: Any) -> torch.Tensor:
    """Returns the sum of the processes' values of a tensor on every process; of one process, the tensor itself."""
    if accelerator.num_processes == 1:
        return value
    reduced = accelerator.reduce(value, reduction="sum")
    assert isinstance(reduced, torch.Tensor)
    return reduced


def sum_dtype(device: torch.device) -> torch.dtype:
    """Returns the dtype of sums on `device`: float64, which Apple's GPUs do not have."""
    return torch.float32 if device.type == "mps" else torch.float64


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()
