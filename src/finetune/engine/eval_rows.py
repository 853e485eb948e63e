"""Which rows of an evaluation batch count.

Processes stay in step, so accelerate fills up the last round of batches with rows that were seen before. Example: 5
rows, 2 processes, batch 2. The last round holds the rows [4, 0 | 1, 2], of which one counts.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from finetune.data.position import batch_rows, rows_per_batch
from finetune.data.rows import IGNORE_INDEX
from finetune.engine.gather import find_batch_size
from finetune.errors import ArgumentError

if TYPE_CHECKING:
    from accelerate import Accelerator


class CountedBatch(NamedTuple):
    """A batch of one process: `inputs` without repeated rows, `valid` rows of this process, `rows` of all of them.

    With `valid` 0 the batch is run all the same, because the other processes wait in it, and counts nothing.
    """

    inputs: Any
    valid: int
    rows: int


def count_rows(inputs: Any, number: int, accelerator: "Accelerator", dataloader: Any) -> CountedBatch:
    """Returns micro-batch `number` of this process without the rows that another process, or this one, saw before."""
    size = find_batch_size(inputs) or 0
    if accelerator.num_processes == 1:
        return CountedBatch(inputs, size, size)
    state, rank = accelerator.gradient_state, accelerator.process_index
    everywhere = rows_per_batch(dataloader)
    # Packed and padding-free batches have one long row for several of the data set.
    own = everywhere // accelerator.num_processes if everywhere else size
    filled_up = getattr(getattr(dataloader, "batch_sampler", None), "even_batches", True)
    if not (filled_up and state.end_of_dataloader and state.remainder > 0):
        return CountedBatch(inputs, own, own * accelerator.num_processes)
    valid = min(max(state.remainder - rank * own, 0), own)
    if valid < own:
        inputs = _without_repetitions(inputs, valid, own, number, dataloader)
    return CountedBatch(inputs, valid, state.remainder)


def _without_repetitions(inputs: Any, valid: int, own: int, number: int, dataloader: Any) -> Any:
    if _has_rows(inputs, own):
        keep = max(valid, 1)
        return {key: value[:keep] if isinstance(value, Tensor) else value for key, value in inputs.items()}
    if valid == 0:
        labels = inputs.get("labels")
        return {**inputs, "labels": torch.full_like(labels, IGNORE_INDEX)} if isinstance(labels, Tensor) else inputs
    indices = batch_rows(dataloader, number)
    if indices is None or len(indices) != own:
        raise ArgumentError(
            "The rows that accelerate repeats in the last evaluation batch cannot be taken out of these batches, "
            "whose tensors have no row dimension. Evaluate with the default sampler, or set "
            "`accelerator_config={'even_batches': False}`."
        )
    device = next((value.device for value in inputs.values() if isinstance(value, Tensor)), None)
    batch = dataloader.collate_fn([dataloader.dataset[index] for index in indices[:valid]])
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def _has_rows(inputs: Any, size: int) -> bool:
    return isinstance(inputs, Mapping) and all(
        value.ndim > 0 and value.shape[0] == size for value in inputs.values() if isinstance(value, Tensor)
    )
