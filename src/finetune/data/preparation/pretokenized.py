"""Rows that come with `input_ids`: checked and read into the ragged form the pipeline works on."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from finetune.data.preparation.formats import Columns
from finetune.data.preparation.tokenize import TokenBatch, flag_doubled_bos
from finetune.data.rows import IGNORE_INDEX, WEIGHTS, fail, type_name


def read_tokenized(batch: Columns, rows: Sequence[int], tokenizer: Any, name: str = "train") -> TokenBatch:
    """Returns the tokens of rows with `input_ids` and, where present, `labels`, `completion_mask`, `assistant_masks`,
    `token_weights` (what each token's loss is multiplied by).

    Raises `DataFormatError` with the row index for lists of other lengths, values that are no integers, and ids that
    the vocabulary does not have (they would crash a GPU without saying why).
    """
    ids, offsets = _flat(batch["input_ids"], "input_ids", rows, name)
    limit = len(tokenizer)
    if len(ids) and (ids.min() < 0 or ids.max() >= limit):
        bad = int(np.flatnonzero((ids < 0) | (ids >= limit))[0])
        row = rows[int(np.searchsorted(offsets, bad, side="right")) - 1]
        fail(row, name, f"`input_ids` holds {ids[bad]}; the vocabulary has 0 to {limit - 1}", "Use the same tokenizer.")
    tokens = TokenBatch(ids.astype(np.int32), offsets)
    if "labels" in batch:
        labels = _column(batch, "labels", rows, offsets, name)
        wrong = np.flatnonzero((labels != IGNORE_INDEX) & ((labels < 0) | (labels >= limit)))
        if len(wrong):
            row = rows[int(np.searchsorted(offsets, wrong[0], side="right")) - 1]
            fail(row, name, f"`labels` holds {labels[wrong[0]]}", f"Allowed: ids, and {IGNORE_INDEX} where untrained.")
        tokens.labels = labels.astype(np.int32)
    else:
        if "completion_mask" in batch:
            tokens.completion_mask = _column(batch, "completion_mask", rows, offsets, name) != 0
        if "assistant_masks" in batch:
            tokens.assistant_mask = _column(batch, "assistant_masks", rows, offsets, name) != 0
    if WEIGHTS in batch:
        tokens.weights = _weights(batch, rows, offsets, name)
    flag_doubled_bos(tokens, tokenizer)
    return tokens


def _column(batch: Columns, column: str, rows: Sequence[int], offsets: np.ndarray, name: str) -> np.ndarray:
    values, own = _flat(batch[column], column, rows, name)
    if not np.array_equal(own, offsets):
        i = int(np.flatnonzero(np.diff(own) != np.diff(offsets))[0])
        found = f"`{column}` has {own[i + 1] - own[i]} values for {offsets[i + 1] - offsets[i]} `input_ids`"
        fail(rows[i], name, found, "Make them equally long.")
    return values


def _weights(batch: Columns, rows: Sequence[int], offsets: np.ndarray, name: str) -> np.ndarray:
    """Returns the column `token_weights` as (N,) float32."""
    for row, values, length in zip(rows, batch[WEIGHTS], np.diff(offsets).tolist(), strict=True):
        if not isinstance(values, (list, tuple, np.ndarray)) or len(values) != length:
            fail(row, name, f"`{WEIGHTS}` is not one number for each of the {length} `input_ids`", "Repair the row.")
        found = _numbers(values)
        if found is None or not (np.isfinite(found) & (found >= 0)).all():
            fail(row, name, f"`{WEIGHTS}` holds something else than numbers from 0 on", "Repair the row.")
    return np.concatenate([np.zeros(0, np.float32), *(np.asarray(v, np.float32) for v in batch[WEIGHTS])])


def _numbers(values: Any) -> np.ndarray | None:
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, OverflowError):
        return None
    return array.astype(np.float64) if array.ndim == 1 and (array.dtype.kind in "bif" or not len(array)) else None


def _flat(values: Sequence[Any], column: str, rows: Sequence[int], name: str) -> tuple[np.ndarray, np.ndarray]:
    for row, value in zip(rows, values, strict=True):
        if not isinstance(value, (list, tuple, np.ndarray)):
            found = f"`{column}` is {type_name(value)}, expected a list of integers"
            fail(row, name, found, "Remove or repair the row.")
    offsets = np.zeros(len(values) + 1, np.int64)
    np.cumsum([len(value) for value in values], out=offsets[1:])
    flat = _array(list(chain.from_iterable(values)))
    if flat is None:
        for row, value in zip(rows, values, strict=True):
            if _array(list(value)) is None:
                fail(row, name, f"`{column}` holds values that are not integers", "Give one flat list of integers.")
    assert flat is not None
    return flat, offsets


def _array(values: list[Any]) -> np.ndarray | None:
    """Returns integers or truth values as int64, or None for anything else."""
    if not values:
        return np.zeros(0, np.int64)
    try:
        array = np.array(values)
    except (TypeError, ValueError, OverflowError):
        return None
    return array.astype(np.int64) if array.dtype.kind in "bi" and array.ndim == 1 else None


def holds_integers(dataset: Any, column: str) -> bool:
    """Returns whether Arrow stores a column as lists of integers without a missing value."""
    import pyarrow as pa

    values = dataset.data.column(column)
    if not (pa.types.is_list(values.type) or pa.types.is_large_list(values.type)):
        return False
    whole = not values.null_count and not any(chunk.flatten().null_count for chunk in values.chunks)
    return whole and pa.types.is_integer(values.type.value_type)


def highest_token_id(dataset: Any) -> int:
    """Returns the largest value of `input_ids` in a map-style dataset; -1 for one that cannot be read by column."""
    if "input_ids" not in (getattr(dataset, "column_names", None) or ()) or not hasattr(dataset, "data"):
        return -1
    columns = dataset.with_format("arrow", columns=["input_ids"])
    batches = (table["input_ids"].combine_chunks().flatten() for table in columns.iter(batch_size=10_000))
    return max((int(ids.to_numpy(zero_copy_only=False).max()) for ids in batches if len(ids)), default=-1)
