"""Which process am I, and who goes first. Works before and without `torch.distributed`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


def world_size() -> int:
    """Returns the number of processes that exchange gradients; 1 when none was initialised."""
    return dist.get_world_size() if _initialised() else 1


def process_index() -> int:
    """Returns this process's number among all, from 0."""
    return dist.get_rank() if _initialised() else 0


def local_process_index() -> int:
    """Returns this process's number on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0")) if _initialised() else 0


def is_world_process_zero() -> bool:
    """Returns whether this is the one process that writes what all share."""
    return process_index() == 0


def is_local_process_zero() -> bool:
    """Returns whether this is the first process of its machine."""
    return local_process_index() == 0


def launched_world_size() -> int:
    """Returns how many processes the launcher started, from its environment; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def wait_for_everyone() -> None:
    """Waits until every process got here."""
    if not _initialised():
        return
    if dist.get_backend() == "nccl":
        dist.barrier(device_ids=[torch.cuda.current_device()])
    else:
        dist.barrier()


@contextmanager
def main_process_first(local: bool = True) -> Iterator[None]:
    """Runs the block on the first process (of each machine if `local`), then on the others.

    An exception on the first process still releases the others: they would otherwise wait until the timeout and
    report that instead of the cause. For work that can outlast the process group's timeout use a file lock instead.
    """
    is_first = is_local_process_zero() if local else is_world_process_zero()
    if not is_first:
        wait_for_everyone()
    try:
        yield
    finally:
        if is_first:
            wait_for_everyone()


def broadcast_object(value: Any, source: int = 0) -> Any:
    """Returns the `value` that process `source` passed, on every process. Plain picklable values only."""
    if not _initialised():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def highest(value: torch.Tensor) -> torch.Tensor:
    """Returns the largest of the processes' values of a tensor, element by element, on every process."""
    if _initialised():
        value = value.clone()
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()
