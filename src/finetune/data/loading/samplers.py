"""The order of the rows: a pure function of (seed, epoch), so that any position can be resumed at once.

A sampler here never draws from a global random generator and keeps no iteration state. `order()` returns the whole
epoch as one array, `skip(n)` a sampler that starts `n` rows later, and `set_epoch` chooses the epoch. None of them
is a `torch.utils.data.RandomSampler`, because accelerate would replace that by its own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence, Sized
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import Sampler
from torch.utils.data import SequentialSampler as TorchSequentialSampler

from finetune.data.columns import list_lengths
from finetune.data.loading.randomness import FetchRandomness
from finetune.errors import DataFormatError

OrderedT = TypeVar("OrderedT", bound="OrderedSampler")
_CHUNK_ROWS = 4096  # rows turned into Python integers at a time


def permutation(num_rows: int, seed: int) -> np.ndarray:
    """Returns `torch.randperm(num_rows)` under its own generator seeded with `seed`, (num_rows,) int64."""
    generator = torch.Generator()
    generator.manual_seed(seed)
    return torch.randperm(num_rows, generator=generator).numpy()


class OrderedSampler(Sampler[int]):
    """Base: yields `order()[start:]`. Subclasses implement `order` from `seed` and `epoch` alone."""

    # Told before each fetch, which `rows_per_fetch` rows belong to (those of all processes), when it is there.
    fetches: FetchRandomness | None = None
    rows_per_fetch: int = 1

    def __init__(self, data_source: Sized, seed: int) -> None:
        self.data_source = data_source
        self.seed, self.epoch, self.start = seed, 0, 0

    def order(self) -> np.ndarray:
        """Returns the row indices of the whole epoch, (rows,) int64."""
        raise NotImplementedError

    @property
    def num_rows(self) -> int:
        """Rows in a whole epoch, whatever `start` is."""
        return len(self.data_source)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order the next iteration follows; called by the loader."""
        self.epoch = epoch

    def skip(self: OrderedT, num_rows: int) -> OrderedT:
        """Returns a sampler of the same epoch that starts `num_rows` further on; this one is left as it is."""
        other = copy.copy(self)
        other.start = min(self.start + num_rows, self.num_rows)
        return other

    def __iter__(self) -> Iterator[int]:
        order = self.order()
        if self.fetches is None:
            for first in range(self.start, len(order), _CHUNK_ROWS):
                yield from order[first : first + _CHUNK_ROWS].tolist()
            return
        self.fetches.start_epoch()
        for first in range(self.start, len(order), self.rows_per_fetch):
            self.fetches.before_fetch(first // self.rows_per_fetch)
            yield from order[first : first + self.rows_per_fetch].tolist()

    def __len__(self) -> int:
        return self.num_rows - self.start


class SeededRandomSampler(OrderedSampler):
    """Random order, `torch.randperm` seeded with `seed + epoch`.

    This is the order that `transformers.Trainer` and accelerate produce by default (accelerate turns the trainer's
    `RandomSampler` into a `SeedableRandomSampler`, whose seed is `data_seed`, or the seed given to `set_seed`).

    >>> sampler = SeededRandomSampler(range(5), seed=42)
    >>> first = list(sampler)
    >>> list(sampler.skip(2)) == first[2:]
    True
    """

    def order(self) -> np.ndarray:
        return permutation(self.num_rows, self.seed + self.epoch)


class SequentialSampler(OrderedSampler, TorchSequentialSampler):
    """Rows in their own order, in every epoch."""

    def __init__(self, data_source: Sized) -> None:
        OrderedSampler.__init__(self, data_source, seed=0)

    def order(self) -> np.ndarray:
        return np.arange(self.num_rows)


class LengthGroupedSampler(OrderedSampler):
    """Random order in which rows of similar length stand together, the longest row of all first.

    The rows are shuffled, cut into groups of `min(50, rows // (4 * batch_size)) * batch_size`, sorted within each
    group from long to short, and the longest row changes places with the first (memory trouble shows at once).

    Same grouping as transformers' `LengthGroupedSampler`. That one draws the shuffle from the global generator, so
    its order depends on everything that was drawn before; here it depends on `seed + epoch` only, as resuming needs.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, batch_size: int, seed: int = 0) -> None:
        self.lengths = np.asarray(lengths)
        super().__init__(self.lengths, seed)
        self.batch_size = batch_size

    def order(self) -> np.ndarray:
        order = permutation(self.num_rows, self.seed + self.epoch)
        group = max(1, min(self.num_rows // (self.batch_size * 4), 50)) * self.batch_size
        starts = range(0, len(order), group)
        for start in starts:
            rows = order[start : start + group]
            order[start : start + group] = rows[np.argsort(-self.lengths[rows], kind="stable")]
        if len(order):
            longest = starts[int(np.argmax(self.lengths[order[::group]]))]
            order[[0, longest]] = order[[longest, 0]]
        return order


def rank_batches(
    order: np.ndarray,
    batch_size: int,
    *,
    drop_last: bool = False,
    num_processes: int = 1,
    process_index: int = 0,
    split_batches: bool = False,
    even_batches: bool = True,
    start: int = 0,
) -> Iterator[list[int]]:
    """Yields the batches of one process from number `start` on, as accelerate's `BatchSamplerShard` would.

    Process `r` of `W` gets the batches r, r + W, r + 2W, … of `order`, or with `split_batches` its part of every
    batch. With `even_batches` the last round is filled up from the start of the epoch. Pure index arithmetic.

    >>> list(rank_batches(np.arange(5), 2, num_processes=2, process_index=1))
    [[2, 3], [1, 2]]
    """
    num_rows = len(order)
    if num_processes == 1:
        own, stride = batch_size, batch_size
    else:
        own = batch_size // num_processes if split_batches else batch_size
        stride = own * num_processes  # rows that all processes take together in one round
        if drop_last:
            order = order[: num_rows // stride * stride]
        elif even_batches and num_rows % stride:
            # accelerate fills up from the first round, which it repeats when it is short itself.
            order = np.concatenate([order, np.resize(order[:stride], stride - num_rows % stride)])
    if drop_last:
        order = order[: len(order) // own * own]
    for first in range(start * stride + process_index * own, len(order), stride):
        yield order[first : first + own].tolist()


def row_lengths(dataset: Any, length_column: str = "length", input_name: str = "input_ids") -> np.ndarray:
    """Returns the number of tokens of each row, (rows,) int64.

    From `length_column` when the dataset has it, else from the Arrow offsets of `input_name`, which takes no time
    however long the rows are; a dataset of another kind is read row by row.
    Raises `DataFormatError` when no length can be known.
    """
    names = getattr(dataset, "column_names", None)
    if not isinstance(names, list) or not hasattr(dataset, "data"):
        return _read_lengths(dataset, input_name)
    if length_column in names:
        values = dataset.data.column(length_column).to_numpy()
        return values if dataset._indices is None else values[dataset._indices.column(0).to_numpy()]
    if input_name in names and hasattr(dataset.features[input_name], "feature"):
        return list_lengths(dataset, input_name)
    raise DataFormatError(
        f"Grouping by length needs the column `{length_column}` (`length_column_name`) or lists in `{input_name}`; "
        f"the dataset has: {', '.join(names)}."
    )


def _read_lengths(dataset: Any, input_name: str) -> np.ndarray:
    try:
        rows = (dataset[i] for i in range(len(dataset)))
        return np.fromiter((len(row[input_name]) for row in rows), dtype=np.int64, count=len(dataset))
    except (TypeError, KeyError, IndexError) as error:
        raise DataFormatError(
            f"Grouping by length needs rows that are mappings with `{input_name}`; reading them failed: {error!r}. "
            "Use `train_sampling_strategy='random'`, or a `datasets.Dataset` with a length column."
        ) from error
