"""Windows of micro-batches: fetching them and counting their items over all processes."""

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from finetune.data.loading.position import has_length, is_stream, rows_per_batch
from finetune.data.rows import IGNORE_INDEX
from finetune.distributed import ranks
from finetune.engine.eval_rows import without_repetitions
from finetune.engine.step import count_items
from finetune.errors import ArgumentError

if TYPE_CHECKING:
    from accelerate import Accelerator


def take(iterator: Iterator[Any], num_batches: int) -> list[Any]:
    """Returns up to `num_batches` batches; fewer at the end of the data."""
    return list(itertools.islice(iterator, num_batches))


def without_repeated_rows(
    batches: list[Any], first: int, *, accelerator: "Accelerator", loader: Any, sums: bool
) -> list[Any]:
    """Returns a window's micro-batches, the epoch's last one without the rows that were seen before.

    accelerate fills the last round of batches up with rows from the start of the epoch, so that processes stay in
    step, and one process alone would not train on them. 5 rows, 2 processes, batches of 2: the last round holds the
    rows [4, 0 | 1, 2], and [4 | nothing] is trained. A process without a row of its own computes a loss of no items.

    `first` is the number of the window's first micro-batch in its epoch. With `sums` False a loss without items could
    be 0/0, and a process that has only repeated rows trains on them, as in transformers. So do runs whose order or
    shares are not known here: streams, `dispatch_batches`, `split_batches`, `batch_rebalance`, `drop_last`.
    """
    if accelerator.num_processes == 1:
        return batches
    dataset, sampler = getattr(loader, "dataset", None), getattr(loader, "batch_sampler", None)
    everywhere = rows_per_batch(loader)
    shared_out = getattr(sampler, "num_processes", 1) == accelerator.num_processes
    known = everywhere and shared_out and has_length(dataset)
    if not known or is_stream(dataset) or getattr(sampler, "drop_last", False):
        return batches
    assert everywhere is not None and dataset is not None
    last, short = len(loader) - 1, len(dataset) % everywhere
    filled_up = getattr(sampler, "even_batches", False) and not getattr(sampler, "split_batches", False)
    if not (filled_up and short and first <= last < first + len(batches) and last == len(dataset) // everywhere):
        return batches
    inputs, own = batches[last - first], everywhere // accelerator.num_processes
    valid = min(max(short - accelerator.process_index * own, 0), own)
    labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
    if valid == own or not isinstance(labels, Tensor) or not (valid or sums):
        return batches
    # Batches without rows in an order of the user's own: repeated samples cannot be told from the others.
    with contextlib.suppress(ArgumentError):
        inputs = without_repetitions(inputs, valid, own, last, loader)
    if not valid:
        shown = {name: torch.full_like(inputs[name], IGNORE_INDEX) for name in ("labels", "shift_labels")
                 if name in inputs}  # fmt: skip
        inputs = {**inputs, **shown}
    return [inputs if index == last - first else batch for index, batch in enumerate(batches)]


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
    return ranks.sum_over_processes(count, accelerator) if across_processes else count
