"""Windows of micro-batches: fetching them and counting their items over all processes."""

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from finetune.engine.step import count_items

if TYPE_CHECKING:
    from accelerate import Accelerator


def take(iterator: Iterator[Any], num_batches: int) -> list[Any]:
    """Returns up to `num_batches` batches; fewer at the end of the data."""
    return list(itertools.islice(iterator, num_batches))


def global_count(
    batches: list[Any],
    *,
    accelerator: "Accelerator",
    device: torch.device,
    shifts_labels: bool,
    across_processes: bool,
) -> Tensor | None:
    """Returns the number of supervised items of a window, summed over processes when `across_processes`.

    A 0-d float or int tensor on `device`, never read by the host; None when the batches have no labels to count.
    """
    count = count_items(batches, shifts_labels=shifts_labels)
    if count is None:
        return None
    count = count.to(device)
    if across_processes and accelerator.num_processes > 1:
        count = accelerator.reduce(count, reduction="sum")
        assert isinstance(count, Tensor)
    return count
