"""Which rows of an evaluation batch count.

Processes stay in step, so the last round of batches is filled up with rows that were seen before. Example: 5 rows,
2 processes, batch 2. The last round holds the rows [4, 0 | 1, 2], of which one counts. (A stream shares the short
round out: [4 | 4].)
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from finetune.data.loading.position import batch_rows, has_length, is_stream, rows_per_batch
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


def require_rounds(dataloader: Any, accelerator: "Accelerator") -> None:
    """Raises `ArgumentError` when the processes would get different numbers of batches, or batches of different sizes.

    So does a loader of the user's own that was prepared with `even_batches=False`.
    """
    sampler = getattr(dataloader, "batch_sampler", None)
    if accelerator.num_processes == 1 or getattr(sampler, "even_batches", True) or getattr(sampler, "drop_last", False):
        return
    everywhere, dataset = rows_per_batch(dataloader), getattr(dataloader, "dataset", None)
    if not everywhere or not has_length(dataset) or len(dataset) % everywhere:  # pyright: ignore[reportArgumentType]
        raise ArgumentError(
            "the evaluation loader was prepared with `even_batches=False`, and its rows do not fill the last round of "
            f"batches of {accelerator.num_processes} processes: some of them would wait forever. Set "
            "`accelerator_config={'even_batches': True}`; no repeated row is scored."
        )


def count_rows(inputs: Any, number: int, accelerator: "Accelerator", dataloader: Any) -> CountedBatch:
    """Returns micro-batch `number` of this process without the rows that another process, or this one, saw before."""
    size = find_batch_size(inputs) or 0
    if accelerator.num_processes == 1:
        return CountedBatch(inputs, size, size)
    state = accelerator.gradient_state
    filled_up = getattr(getattr(dataloader, "batch_sampler", None), "even_batches", True)
    last = filled_up and state.end_of_dataloader and state.remainder > 0
    own = _rows_of_a_process(size, state.remainder if last else None, accelerator, dataloader)
    if not last:
        return CountedBatch(inputs, own, own * accelerator.num_processes)
    valid = min(max(state.remainder - accelerator.process_index * own, 0), own)
    if valid < own:
        inputs = without_repetitions(inputs, valid, own, number, dataloader)
    return CountedBatch(inputs, valid, state.remainder)


def _rows_of_a_process(size: int, remainder: int | None, accelerator: "Accelerator", dataloader: Any) -> int:
    """Returns the rows in a batch of one process. Packed and padding-free batches have one long row for several."""
    everywhere = rows_per_batch(dataloader)
    if not everywhere:
        return size
    if remainder is not None and is_stream(getattr(dataloader, "dataset", None)):
        everywhere = min(everywhere, remainder)
    return -(-everywhere // accelerator.num_processes)


def without_repetitions(inputs: Any, valid: int, own: int, number: int, dataloader: Any) -> Any:
    """Returns micro-batch `number`, of `own` rows, with its first `valid` rows only: cut, collated anew or masked.

    Without a valid row one repeated row stays, because a model cannot run on nothing; where batches have no row
    dimension everything stays. Labels of tokens are masked then, so that metrics of tokens do not count them.
    """
    if _has_rows(inputs, own):
        inputs = {key: value[: max(valid, 1)] if isinstance(value, Tensor) else value for key, value in inputs.items()}
        return inputs if valid else _without_labels(inputs)
    if valid == 0:
        return _without_labels(inputs)
    indices = batch_rows(dataloader, number)
    if indices is not None and len(indices) == own:
        device = next((value.device for value in inputs.values() if isinstance(value, Tensor)), None)
        batch = dataloader.collate_fn([dataloader.dataset[index] for index in indices[:valid]])
        return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    ends = inputs.get("cu_seq_lens_q")
    if isinstance(ends, Tensor) and len(ends) == own + 1:
        real = torch.arange(inputs["labels"].shape[-1], device=ends.device) < ends[valid]
        return {**inputs, "labels": inputs["labels"].masked_fill(~real, IGNORE_INDEX)}
    raise ArgumentError(
        "The last evaluation batch repeats rows to keep the processes in step, and they cannot be told from the others "
        "in these batches, which have no row dimension. Evaluate on a map-style dataset with the default sampler, or "
        "on rows that are not packed (`eval_packing=False`)."
    )


def _without_labels(inputs: Any) -> dict[str, Any]:
    """Returns a batch whose tokens are all masked. Labels of whole rows stay: a classifier refuses a masked one."""
    masked = {
        name: torch.full_like(labels, IGNORE_INDEX)
        for name in ("labels", "shift_labels")
        if isinstance(labels := inputs.get(name), Tensor) and labels.ndim > 1 and not labels.is_floating_point()
    }
    return {**inputs, **masked}


def _has_rows(inputs: Any, size: int) -> bool:
    return isinstance(inputs, Mapping) and all(
        value.ndim > 0 and value.shape[0] == size for value in inputs.values() if isinstance(value, Tensor)
    )
