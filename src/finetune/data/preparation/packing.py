"""Packing: several tokenised rows share one training row, so that no step pays for padding.

A packed row keeps the columns it was made of, one after the other, and gains `seq_lengths`, the lengths of the
samples inside it. With `seq_length=4` and the `bfd` strategy:

    input_ids            packed input_ids     seq_lengths
    [1, 2, 3, 4, 5]      [1, 2, 3, 4]         [4]        token 5 is lost (and counted)
    [6, 7]               [8, 9, 10, 11]       [3, 1]
    [8, 9, 10]           [6, 7]               [2]
    [11]

Everything works on the Arrow buffers with numpy; no Python object is made per token.
Source of the method: "Fewer Truncations Improve Language Modeling", https://huggingface.co/papers/2404.10830.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from finetune.data.preparation.packing_report import packing_report
from finetune.data.rows import LENGTH
from finetune.errors import ArgumentError, DataFormatError, nearest

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

STRATEGIES = ("bfd", "bfd_split", "wrapped")
SEQ_LENGTHS = "seq_lengths"

DatasetT = TypeVar("DatasetT")


def best_fit_decreasing(lengths: np.ndarray, seq_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns `(order, bin_sizes)`: row indices, bin after bin, and how many of them each bin holds.

    Longest rows first (ties in their given order); each goes to the bin whose free space fits tightest (the one
    that has waited longest among equals), or opens a new bin. Same bins, in the same order, as TRL.

    Rows of equal length are placed together: the tightest bin, once opened for a length, takes as many rows of it
    as fit, because what is left after one of them is tighter still. So the loop runs over distinct
    (length, free space) pairs and not over rows.

    >>> order, sizes = best_fit_decreasing(np.array([4, 2, 3, 1]), 4)
    >>> order.tolist(), sizes.tolist()
    ([0, 2, 3, 1], [1, 2, 1])
    """
    if len(lengths) == 0:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    assert lengths.min() > 0 and lengths.max() <= seq_length
    by_length = np.argsort(-lengths, kind="stable")
    distinct, counts = np.unique(lengths, return_counts=True)
    waiting: dict[int, deque[int]] = {}  # free space -> bins that have exactly that much left
    free_spaces = 0  # bit s is set when `waiting[s]` is not empty
    placed: list[int] = []  # bin of each row, in the order of `by_length`
    num_bins = 0
    for length, count in zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            fitting = free_spaces >> length
            if fitting:
                space = length + (fitting & -fitting).bit_length() - 1
                bin_index = waiting[space].popleft()
                if not waiting[space]:
                    free_spaces ^= 1 << space
            else:
                space, bin_index = seq_length, num_bins
                num_bins += 1
            taken = min(count, space // length)
            placed += [bin_index] * taken
            count -= taken
            left = space - taken * length
            if left:
                waiting.setdefault(left, deque()).append(bin_index)
                free_spaces |= 1 << left
    bin_of_row = np.array(placed, dtype=np.int64)
    return by_length[np.argsort(bin_of_row, kind="stable")], np.bincount(bin_of_row, minlength=num_bins)


def _list_columns(table: pa.Table) -> tuple[dict[str, Any], np.ndarray]:
    """Returns the Arrow list arrays of the columns to pack, by name, and their common int64 offsets (rows + 1)."""
    import pyarrow as pa

    table = table.combine_chunks()
    names = [name for name in table.column_names if name != LENGTH]
    scalar = [n for n in names if not (pa.types.is_list(t := table.schema.field(n).type) or pa.types.is_large_list(t))]
    if scalar or not names:
        raise DataFormatError(
            f"Packing joins rows token by token, so every column must hold lists; these do not: {scalar}. "
            f"Columns found: {table.column_names}. Remove them (`dataset.remove_columns`) before packing."
        )
    # A chunk without rows has no chunk at all after `combine_chunks`.
    arrays = {n: c.chunks[0] if (c := table.column(n)).num_chunks else pa.array([], c.type) for n in names}
    valid = np.logical_and.reduce([np.asarray(array.is_valid()) for array in arrays.values()])
    if not valid.all():
        arrays = {name: array.filter(pa.array(valid)) for name, array in arrays.items()}
    # Lengths and not offsets are compared: the columns of a slice start at different places in their buffers.
    lengths = {name: np.diff(array.offsets.to_numpy()) for name, array in arrays.items()}
    common = lengths[names[0]]
    for name, other in lengths.items():
        if not np.array_equal(common, other):
            row = int(np.flatnonzero(common != other)[0])
            raise DataFormatError(
                f"Packing needs columns of equal length in every row: row {row} of the batch has {common[row]} "
                f"items in `{names[0]}` and {other[row]} in `{name}`."
            )
    return arrays, np.concatenate(([0], np.cumsum(common, dtype=np.int64)))


def _cut(table: pa.Table, arrays: dict[str, Any], values: list[Any], offsets: np.ndarray) -> dict[str, Any]:
    """Returns list arrays of the types of `arrays` over `values`, cut at `offsets` (rows + 1), and the new `length`."""
    import pyarrow as pa

    columns: dict[str, Any] = {}
    for (name, array), flat in zip(arrays.items(), values, strict=True):
        cuts = offsets.astype(array.offsets.type.to_pandas_dtype())
        columns[name] = type(array).from_arrays(cuts, flat).cast(array.type)
    if LENGTH in table.column_names:
        columns[LENGTH] = pa.array(np.diff(offsets), table.schema.field(LENGTH).type)
    return columns


def _gather(array: Any, index: np.ndarray) -> Any:
    """Returns the flat values of a list array at `index`, in their Arrow type."""
    import pyarrow as pa

    flat = array.flatten()
    if flat.null_count or (not pa.types.is_integer(flat.type) and not pa.types.is_floating(flat.type)):
        return flat.take(pa.array(index))
    return pa.array(flat.to_numpy()[index], flat.type)


def _pack_bfd(table: pa.Table, seq_length: int, split: bool) -> pa.Table:
    """Returns the batch packed by best fit decreasing, with `seq_lengths`; longer rows are cut or split."""
    import pyarrow as pa

    arrays, offsets = _list_columns(table)
    starts, lengths = offsets[:-1], np.diff(offsets)
    starts, lengths = starts[lengths > 0], lengths[lengths > 0]
    if split:
        pieces = -(-lengths // seq_length)
        # Position of each piece within its row: 0, 1, 2 for a row of three pieces.
        piece = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        lengths = np.minimum(seq_length, np.repeat(lengths, pieces) - piece * seq_length)
        starts = np.repeat(starts, pieces) + piece * seq_length
    else:
        lengths = np.minimum(lengths, seq_length)
    order, bin_sizes = best_fit_decreasing(lengths, seq_length)
    starts, lengths = starts[order], lengths[order]
    ends = np.cumsum(lengths)
    index = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)
    rows = np.concatenate(([0], np.cumsum(bin_sizes)))  # (packed rows + 1) in samples
    cuts = np.concatenate(([0], ends))[rows]  # (packed rows + 1) in tokens
    columns = _cut(table, arrays, [_gather(array, index) for array in arrays.values()], cuts)
    columns[SEQ_LENGTHS] = pa.ListArray.from_arrays(rows.astype(np.int32), pa.array(lengths.astype(np.int32)))
    return pa.table(columns)


def _pack_wrapped(table: pa.Table, seq_length: int) -> pa.Table:
    """Returns the batch as one stream of tokens cut every `seq_length`; sample boundaries are forgotten."""
    import pyarrow as pa

    arrays, offsets = _list_columns(table)
    cuts = np.append(np.arange(0, offsets[-1], seq_length, dtype=np.int64), offsets[-1])
    return pa.table(_cut(table, arrays, [array.flatten() for array in arrays.values()], cuts))


def _kept(table: pa.Table, pack: Callable[[pa.Table], pa.Table], keep: Callable[[pa.Table], np.ndarray]) -> pa.Table:
    import pyarrow as pa

    packed = pack(table)
    return packed.filter(pa.array(keep(packed)))


def pack_dataset(
    dataset: DatasetT,
    seq_length: int,
    strategy: str = "bfd",
    map_kwargs: dict[str, Any] | None = None,
    *,
    keep: Callable[[pa.Table], np.ndarray] | None = None,
) -> DatasetT:
    """Returns the dataset with its rows packed into rows of at most `seq_length` tokens.

    Every column must hold lists of equal length per row; an integer column `length` is made anew. Rows are packed
    within batches of 1000 (`map_kwargs={"batch_size": n}` changes it; larger batches pack tighter). The number of
    rows shrinks, and `bfd`/`bfd_split` add `seq_lengths` (list of int32), the samples inside each row:

    - `bfd` (best fit decreasing): samples stay whole; what exceeds `seq_length` is cut off, counted and logged.
    - `bfd_split`: longer samples continue as samples of their own; no token is lost.
    - `wrapped`: one stream cut every `seq_length` tokens; no token is lost, samples run into each other.

    >>> from datasets import Dataset
    >>> ds = Dataset.from_dict({"input_ids": [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10], [11]]})
    >>> pack_dataset(ds, seq_length=4, strategy="bfd_split")[:]
    {'input_ids': [[1, 2, 3, 4], [8, 9, 10, 5], [6, 7, 11]], 'seq_lengths': [[4], [3, 1], [2, 1]]}

    `keep` says of the packed rows in an Arrow table which ones stay, (rows,) bool; by default all do.

    Accepts `Dataset`, `DatasetDict`, `IterableDataset`, `IterableDatasetDict`; agrees with `trl.pack_dataset`.
    Raises `ArgumentError` for an unknown strategy or length, `DataFormatError` for columns that cannot be packed.
    """
    if strategy not in STRATEGIES:
        raise ArgumentError(
            f"`packing_strategy={strategy!r}` is not known; allowed: {', '.join(STRATEGIES)}."
            + nearest(str(strategy), STRATEGIES)
        )
    if not isinstance(seq_length, int) or seq_length < 1:
        raise ArgumentError(f"`seq_length={seq_length!r}` must be a positive number of tokens (`max_length`).")
    function, extra = (_pack_wrapped, {}) if strategy == "wrapped" else (_pack_bfd, {"split": strategy == "bfd_split"})
    new_columns = [] if strategy == "wrapped" else [SEQ_LENGTHS]
    if keep is not None:
        function = partial(_kept, pack=partial(function, seq_length=seq_length, **extra), keep=keep)
        return _map_arrow(dataset, function, {}, map_kwargs, new_columns)
    packed = _map_arrow(dataset, function, {"seq_length": seq_length, **extra}, map_kwargs, new_columns)
    for name, before, after in _splits(dataset, packed):
        report = packing_report(before, after, seq_length)
        level = logging.WARNING if report.lost_tokens else logging.INFO
        hint = " `packing_strategy='bfd_split'` keeps them." if report.lost_tokens else ""
        logger.log(level, "%s%s.%s", f"{name}: " if name else "", report, hint)
    return packed


def truncate_dataset(dataset: DatasetT, max_length: int, map_kwargs: dict[str, Any] | None = None) -> DatasetT:
    """Returns the dataset with every list column cut to its first `max_length` items; others stay as they are.

    >>> from datasets import Dataset
    >>> ds = Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5, 6, 7], [8]], "id": ["a", "b", "c"]})
    >>> truncate_dataset(ds, max_length=2)[:]
    {'input_ids': [[1, 2], [4, 5], [8]], 'id': ['a', 'b', 'c']}
    """
    if not isinstance(max_length, int) or max_length < 1:
        raise ArgumentError(f"`max_length={max_length!r}` must be a positive number of tokens.")
    return _map_arrow(dataset, _truncate, {"max_length": max_length}, map_kwargs, [])


def _truncate(table: pa.Table, max_length: int) -> pa.Table:
    import pyarrow as pa
    import pyarrow.compute as pc

    columns: dict[str, Any] = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            column = pc.list_slice(column, 0, max_length)  # pyright: ignore[reportAttributeAccessIssue]
        elif name == LENGTH and pa.types.is_integer(column.type):
            column = pc.min_element_wise(column, pa.scalar(max_length, column.type))  # pyright: ignore
        columns[name] = column
    return pa.table(columns)


def _splits(dataset: Any, packed: Any) -> list[tuple[str, Any, Any]]:
    """Returns `(split name, before, after)` of everything whose rows can be counted without reading a stream."""
    import datasets

    if isinstance(dataset, datasets.DatasetDict):
        return [(str(name), dataset[name], packed[name]) for name in dataset]
    return [("", dataset, packed)] if isinstance(dataset, datasets.Dataset) else []


def _map_arrow(
    dataset: Any, function: Any, fn_kwargs: dict[str, Any], map_kwargs: dict[str, Any] | None, new_columns: list[str]
) -> Any:
    """Returns `dataset.map(function)` over Arrow tables, with the format that the dataset had before."""
    import datasets

    one = next(iter(dataset.values())) if hasattr(dataset, "values") else dataset  # a dictionary of splits
    if isinstance(one, datasets.Dataset):
        old = one.format
        shown = [c for c in old["columns"] if c in one.column_names] + new_columns
        restore: dict[str, Any] = {"type": old["type"], "columns": shown, **old["format_kwargs"]}
    else:
        restore = {"type": getattr(one._formatting, "format_type", None)}
    # Packed rows are not the rows that came in, so a column left out of the format cannot be carried along.
    mapped = dataset.with_format("arrow").map(function, batched=True, fn_kwargs=fn_kwargs, **(map_kwargs or {}))
    return mapped.with_format(**restore)
