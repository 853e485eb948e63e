"""Rows to batches: padded, padding-free, and the collators for classification.

Legend: B rows, T tokens of the longest row, N tokens of all rows together, S samples in a padding-free batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from finetune.data.rows import IGNORE_INDEX, WEIGHTS
from finetune.errors import ArgumentError, DataFormatError

_MASKS = ("completion_mask", "assistant_masks")


@dataclass
class DataCollatorForLanguageModeling:
    """Turns tokenised rows into a batch for a causal language model; same name, fields and output as in TRL.

    A row is a mapping with `input_ids`, and optionally `labels` (unshifted, -100 where not trained; the default is
    `input_ids`), `completion_mask`/`assistant_masks` (0/1; used only when there are no labels), `seq_lengths` (the
    samples of a packed row), and `token_weights` (float32 in the batch, 0 on padding). Other keys, such as
    `length`, are ignored.

    Padded, all int64:

    >>> collator = DataCollatorForLanguageModeling(pad_token_id=0)
    >>> collator([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4, 5], "labels": [-100, 5]}])
    {'input_ids': tensor([[1, 2, 3],
            [4, 5, 0]]), 'labels': tensor([[-100,    2,    3],
            [-100,    5, -100]]), 'attention_mask': tensor([[1, 1, 1],
            [1, 1, 0]])}

    Padding-free (one row; every sample restarts at position 0, and nobody predicts its first token):

    >>> batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(
    ...     [{"input_ids": [1, 2, 3], "seq_lengths": [3]}, {"input_ids": [4, 5, 6], "seq_lengths": [2, 1]}])
    >>> batch["input_ids"], batch["position_ids"]
    (tensor([[1, 2, 3, 4, 5, 6]]), tensor([[0, 1, 2, 0, 1, 0]]))
    >>> batch["labels"]
    tensor([[-100,    2,    3, -100,    5, -100]])
    >>> batch["cu_seq_lens_q"], batch["max_length_q"], batch["seq_idx"]
    (tensor([0, 3, 5, 6], dtype=torch.int32), 3, tensor([[0, 0, 0, 1, 1, 2]], dtype=torch.int32))

    `attention_mask` is left out there on purpose: with it, FlashAttention would ignore `position_ids`.
    With `pad_to_multiple_of`, the tokens added to a padding-free batch are samples of length one.
    `return_position_ids` adds `position_ids` to padded batches (sequence parallelism).

    Raises `DataFormatError` for rows without tokens or ids, for lengths that differ within a row, and for packed
    rows in a padded batch, whose samples would attend to each other.
    """

    pad_token_id: int
    padding_free: bool = False
    return_position_ids: bool = False
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def __post_init__(self) -> None:
        if self.return_tensors != "pt":
            raise ArgumentError(f"`return_tensors={self.return_tensors!r}` is not supported; allowed: 'pt'.")
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ArgumentError(f"`pad_to_multiple_of={self.pad_to_multiple_of}` must be a positive number or None.")

    def __call__(self, features: list[Mapping[str, Any]], return_tensors: str | None = None) -> dict[str, Any]:
        if return_tensors not in (None, "pt"):
            raise ArgumentError(f"`return_tensors={return_tensors!r}` is not supported; allowed: 'pt'.")
        return self.torch_call(features)

    def torch_call(self, examples: list[Mapping[str, Any]]) -> dict[str, Any]:
        """Returns the batch, see the class."""
        ids = _flat(examples, "input_ids")
        labels = _labels(examples, ids)
        weights = _weights(examples, ids)
        packed = _has(examples, "seq_lengths")
        samples = _sample_lengths(examples, ids.lengths) if packed else ids.lengths
        if self.padding_free:
            return self._flattened(ids.values, labels, samples, weights)
        if packed and len(samples) > len(examples) and not self.return_position_ids:
            raise DataFormatError(
                "These rows are packed (`seq_lengths` counts several samples per row), and a padded batch would let "
                "the samples of a row attend to each other. Use `padding_free=True`."
            )
        width = _round_up(int(ids.lengths.max()), self.pad_to_multiple_of)
        inside = np.arange(width) < ids.lengths[:, None]  # (B, T)
        batch = {
            "input_ids": _padded(ids.values, inside, self.pad_token_id),
            "labels": _padded(labels, inside, IGNORE_INDEX),
        }
        if weights is not None:
            batch[WEIGHTS] = _padded(weights, inside, 0)
        if self.return_position_ids:
            batch["position_ids"] = _padded(_positions(samples), inside, 0)
        batch["attention_mask"] = torch.from_numpy(inside.astype(np.int64))
        return batch

    def _flattened(
        self, ids: np.ndarray, labels: np.ndarray, samples: np.ndarray, weights: np.ndarray | None
    ) -> dict[str, Any]:
        num_added = _round_up(len(ids), self.pad_to_multiple_of) - len(ids)
        if num_added:
            ids = np.pad(ids, (0, num_added), constant_values=self.pad_token_id)
            labels = np.pad(labels, (0, num_added), constant_values=IGNORE_INDEX)
            samples = np.pad(samples, (0, num_added), constant_values=1)
            weights = None if weights is None else np.pad(weights, (0, num_added))
        samples = samples[samples > 0]
        ends = np.cumsum(samples)
        labels[ends - samples] = IGNORE_INDEX
        cu_seq_lens = torch.from_numpy(np.concatenate(([0], ends)).astype(np.int32))  # (S + 1)
        longest = int(samples.max())
        sample_of_token = np.repeat(np.arange(len(samples), dtype=np.int32), samples)
        return {
            "input_ids": torch.from_numpy(ids)[None],
            "labels": torch.from_numpy(labels)[None],
            **({} if weights is None else {WEIGHTS: torch.from_numpy(weights)[None]}),
            "position_ids": torch.from_numpy(_positions(samples))[None],
            "cu_seq_lens_q": cu_seq_lens,
            "cu_seq_lens_k": cu_seq_lens,
            "max_length_q": longest,
            "max_length_k": longest,
            "seq_idx": torch.from_numpy(sample_of_token)[None],
        }


@dataclass(frozen=True)
class _Flat:
    values: np.ndarray  # (N,) int64 (weights: float32), a fresh array
    lengths: np.ndarray  # (B,) int64


def _flat(rows: Sequence[Mapping[str, Any]], name: str) -> _Flat:
    """Returns the rows' lists in `name`, joined."""
    try:
        columns = [row[name] for row in rows]
        lengths = np.fromiter(map(len, columns), dtype=np.int64, count=len(columns))
        if isinstance(columns[0], list):
            values = np.fromiter(chain.from_iterable(columns), dtype=np.int64, count=int(lengths.sum()))
        else:
            values = np.concatenate([np.asarray(column) for column in columns]).astype(np.int64)
    except KeyError:
        found = sorted({key for row in rows for key in row})
        raise DataFormatError(
            f"A row has no `{name}`; the batch has these columns: {', '.join(map(str, found)) or 'none'}. "
            "Every row of a dataset must have the same columns; text must be tokenised before collation."
        ) from None
    except (TypeError, ValueError) as error:
        raise DataFormatError(f"`{name}` must be a list of integers in every row: {error}.") from error
    if not lengths.all():
        raise DataFormatError(f"Row {int(np.argmin(lengths))} of the batch has an empty `{name}`; drop such rows.")
    return _Flat(values, lengths)


def _has(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    """Returns whether any row has the column; one that lacks it is then an error, never a guess."""
    return any(name in row for row in rows)


def _labels(rows: Sequence[Mapping[str, Any]], ids: _Flat) -> np.ndarray:
    """Returns the labels of all rows, joined: `labels`, else `input_ids` under the masks that are there. (N,)"""
    if _has(rows, "labels"):
        return _same_length(_flat(rows, "labels"), ids, "labels").values
    labels = ids.values.copy()
    for name in _MASKS:
        if _has(rows, name):
            labels[_same_length(_flat(rows, name), ids, name).values == 0] = IGNORE_INDEX
    return labels


def _weights(rows: Sequence[Mapping[str, Any]], ids: _Flat) -> np.ndarray | None:
    """Returns the column `token_weights` of all rows, joined; None where no row has it. (N,) float32"""
    if not _has(rows, WEIGHTS):
        return None
    try:
        columns = [np.asarray(row[WEIGHTS], np.float32) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise DataFormatError(f"`{WEIGHTS}` must be a list of numbers in every row, or in none: {error}.") from error
    lengths = np.array([len(column) for column in columns], np.int64)
    return _same_length(_Flat(np.concatenate(columns), lengths), ids, WEIGHTS).values


def _same_length(flat: _Flat, ids: _Flat, name: str) -> _Flat:
    if not np.array_equal(flat.lengths, ids.lengths):
        row = int(np.flatnonzero(flat.lengths != ids.lengths)[0])
        raise DataFormatError(
            f"Row {row} of the batch has {ids.lengths[row]} items in `input_ids` and {flat.lengths[row]} in `{name}`; "
            "they must be equal."
        )
    return flat


def _sample_lengths(rows: Sequence[Mapping[str, Any]], lengths: np.ndarray) -> np.ndarray:
    """Returns the lengths of the samples of all packed rows, joined. (S,)"""
    samples = _flat(rows, "seq_lengths")
    last = np.cumsum(samples.lengths)
    sums = np.add.reduceat(samples.values, last - samples.lengths)
    if not np.array_equal(sums, lengths):
        row = int(np.flatnonzero(sums != lengths)[0])
        raise DataFormatError(
            f"Row {row} of the batch has {lengths[row]} tokens, but its `seq_lengths` sum to {sums[row]}: the row was "
            "changed after it was packed (truncated?)."
        )
    return samples.values


def _positions(samples: np.ndarray) -> np.ndarray:
    """Returns 0, 1, 2 … within each sample: `[3, 2]` gives `[0, 1, 2, 0, 1]`. (N,) int64"""
    starts = np.cumsum(samples) - samples
    return np.arange(int(samples.sum())) - np.repeat(starts, samples)


def _padded(values: np.ndarray, inside: np.ndarray, fill: int) -> torch.Tensor:
    """Returns (B, T) with `values` where `inside` is true, row by row, and `fill` elsewhere."""
    out = np.full(inside.shape, fill, dtype=values.dtype)
    out[inside] = values
    return torch.from_numpy(out)


def _round_up(number: int, multiple: int | None) -> int:
    """Returns the smallest multiple that is not below `number`; a number that divides already stays."""
    return number if multiple is None else -(-number // multiple) * multiple


def default_collator(
    processing_class: Any = None, pad_to_multiple_of: int | None = None
) -> Callable[[list[Any]], dict[str, Any]]:
    """Returns the collator for rows that are not language-model rows, as `transformers.Trainer` chooses it.

    With a tokenizer or feature extractor: pad `input_ids` and friends to the longest row, rename `label` to
    `labels` (classification). Without: stack what is stackable.
    """
    from transformers.data.data_collator import DataCollatorWithPadding, default_data_collator
    from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    if isinstance(processing_class, (PreTrainedTokenizerBase, SequenceFeatureExtractor)):
        return DataCollatorWithPadding(processing_class, pad_to_multiple_of=pad_to_multiple_of)  # pyright: ignore
    return default_data_collator
