"""Masks -> labels, truncation, and what became of every row, on ragged batches (see `tokenize.py`).

Worked example: `input_ids` [5, 6, 7, 8, 2] with `completion_mask` [0, 0, 0, 1, 1] gives `labels`
[-100, -100, -100, 8, 2]. `max_length=3` with `keep_start` leaves [5, 6, 7] and [-100, -100, -100]: nothing to learn,
so the row is dropped and counted. `keep_end` leaves [7, 8, 2] and [-100, 8, 2].
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from finetune.data.preparation.tokenize import (
    NOTHING_BEFORE_TRUNCATION,
    NOTHING_TRAINED,
    STOP_EXPECTED,
    STOP_TRAINED,
    TRUNCATED,
    TokenBatch,
    join,
    take_tokens,
)
from finetune.data.rows import IGNORE_INDEX

if TYPE_CHECKING:
    import pyarrow as pa

TruncationMode = Literal["keep_start", "keep_end"]


@dataclass
class LabelledBatch:
    """Rows ready to be trained on, with what the audit needs to know of each.

    `source_lengths` are the lengths before truncation; `supervised` counts the labels that enter the loss, which
    leaves out the first position of a row, because no earlier token predicts it.
    """

    tokens: TokenBatch
    source_lengths: np.ndarray  # (B,) int32
    supervised: np.ndarray  # (B,) int32


def join_labelled(batches: Sequence[LabelledBatch]) -> LabelledBatch:
    """Returns the rows of several batches as one batch."""
    return LabelledBatch(
        join([batch.tokens for batch in batches]),
        np.concatenate([batch.source_lengths for batch in batches]),
        np.concatenate([batch.supervised for batch in batches]),
    )


def build_labels(batch: TokenBatch, *, completion_only: bool) -> np.ndarray:
    """Returns labels (N,) int32: the ids, or IGNORE_INDEX where a mask that applies is 0.

    `assistant_mask` always applies, `completion_mask` with `completion_only`; labels that came with the rows are kept.
    A token of weight 0 is not trained either way.
    """
    if batch.labels is not None:
        return batch.labels if batch.weights is None else np.where(batch.weights == 0, IGNORE_INDEX, batch.labels)
    trained = np.ones(len(batch.ids), bool)
    if completion_only and batch.completion_mask is not None:
        trained &= batch.completion_mask
    if batch.assistant_mask is not None:
        trained &= batch.assistant_mask
    if batch.weights is not None:
        trained &= batch.weights != 0
    return np.where(trained, batch.ids, np.int32(IGNORE_INDEX))


def count_supervised(labels: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Returns (B,) int32: per row, the labels that enter the loss. Those are what `num_items_in_batch` counts.

    >>> count_supervised(np.array([7, 8, -100, 9], np.int32), np.array([0, 3, 4]))
    array([1, 0], dtype=int32)
    """
    counts = labels != IGNORE_INDEX
    counts[offsets[:-1][np.diff(offsets) > 0]] = False
    before = np.concatenate(([0], np.cumsum(counts)))
    return np.diff(before[offsets]).astype(np.int32)


def count_supervised_in(table: "pa.Table") -> np.ndarray:
    """Returns (B,) int32: per row of a table with `labels`, the labels that enter the loss.

    With a column `seq_lengths` a row holds several samples, and the first label of each of them is left out.
    """
    values, offsets = _flat(table["labels"])
    if "seq_lengths" not in table.column_names:
        return count_supervised(values, offsets)
    lengths, samples = _flat(table["seq_lengths"])
    of_samples = count_supervised(values, np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))))
    return np.diff(np.concatenate(([0], np.cumsum(of_samples)))[samples]).astype(np.int32)


def _flat(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns the values of an Arrow column of lists, joined, and their offsets (rows + 1)."""
    column = column.combine_chunks()
    values = np.asarray(column.flatten().to_numpy(zero_copy_only=False))
    lengths = column.value_lengths().to_numpy(zero_copy_only=False)
    return values, np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))


def truncate(batch: TokenBatch, max_length: int, mode: TruncationMode) -> TokenBatch:
    """Returns the batch with at most `max_length` tokens per row, from its start or its end; cut rows are flagged."""
    lengths = batch.lengths
    too_long = lengths > max_length
    if not too_long.any():
        return batch
    batch.flags[too_long] |= TRUNCATED
    position = np.arange(len(batch.ids)) - np.repeat(batch.offsets[:-1], lengths)
    if mode == "keep_start":
        return take_tokens(batch, position < max_length)
    return take_tokens(batch, position >= np.repeat(lengths - max_length, lengths))


class StopTokens:
    """Knows which ids end an answer, and which are white space that may follow them."""

    def __init__(self, tokenizer: Any, stop_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._stops = np.fromiter(stop_ids, np.int64)
        self._blank: dict[int, bool] = {}

    def trained(self, labels: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """Returns (B,) bool: the last trained token of the row, white space aside, ends an answer."""
        supervised = labels != IGNORE_INDEX
        result = np.zeros(len(offsets) - 1, bool)
        rows = np.flatnonzero(np.diff(offsets))
        if not len(rows) or not len(self._stops):
            return result
        # The last trained position at or before each position; -1 before the first.
        last = np.maximum.accumulate(np.where(supervised, np.arange(len(labels)), -1))
        position = last[offsets[rows + 1] - 1]
        start = offsets[rows]
        for _ in range(4):
            inside = position >= start
            ids = labels[np.maximum(position, 0)]
            blank = inside & self._is_blank(ids)
            position = np.where(blank, position - 1, position)
        inside = position >= start
        result[rows] = inside & np.isin(labels[np.maximum(position, 0)], self._stops)
        return result

    def _is_blank(self, ids: np.ndarray) -> np.ndarray:
        unique, inverse = np.unique(ids, return_inverse=True)
        for token in unique.tolist():
            if token not in self._blank:
                known = token >= 0 and token not in self._stops
                self._blank[token] = known and not self._tokenizer.decode([token]).strip()
        return np.array([self._blank[token] for token in unique.tolist()], bool)[inverse]


def label_batch(
    batch: TokenBatch,
    *,
    completion_only: bool,
    max_length: int | None,
    truncation_mode: TruncationMode,
    stop_tokens: StopTokens,
    expects_stop: np.ndarray | bool,
) -> LabelledBatch:
    """Returns the batch with labels, truncated to `max_length` (None: not), every row flagged with what happened.

    `expects_stop` (B,) says which rows end with an answer, so that training on them should teach to stop.
    """
    batch.labels = build_labels(batch, completion_only=completion_only)
    source_lengths = batch.lengths.astype(np.int32)
    untrained = count_supervised(batch.labels, batch.offsets) == 0
    batch.flags[untrained] |= NOTHING_BEFORE_TRUNCATION
    if max_length is not None:
        batch = truncate(batch, max_length, truncation_mode)
    assert batch.labels is not None
    supervised = count_supervised(batch.labels, batch.offsets)
    batch.flags[supervised == 0] |= NOTHING_TRAINED
    batch.flags[np.broadcast_to(expects_stop, batch.flags.shape)] |= STOP_EXPECTED
    batch.flags[stop_tokens.trained(batch.labels, batch.offsets)] |= STOP_TRAINED
    return LabelledBatch(batch, source_lengths, supervised)
