"""Text and rendered conversations -> token ids and 0/1 masks, a batch at a time.

A batch is ragged: the ids of all its rows one after another (N) and `offsets` (B + 1), row i being
`ids[offsets[i]:offsets[i + 1]]`. Masks are (N) too. A token is masked in (1) when it holds at least one character of
the trained text, so a token that straddles the border between prompt and completion is trained, and counted.

Worked example, prompt "2+2=" and completion " 4" with EOS `</s>`: ids of "2+2= 4</s>" are [2, +, 2, =, " 4", </s>];
the completion begins at character 4, which lies in token 4, so `completion_mask` is [0, 0, 0, 0, 1, 1].
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from finetune.data.chat.messages import common_prefix_length
from finetune.data.chat.span_search import Span
from finetune.data.preparation.encoder import EncodedBatch, Encoder
from finetune.errors import DataFormatError

TRUNCATED, STOP_EXPECTED, STOP_TRAINED, DOUBLED_BOS = 1, 2, 4, 8
BOUNDARY_MISMATCH, TEMPLATE_DRIFT, NOTHING_TRAINED, NOTHING_BEFORE_TRUNCATION = 16, 32, 64, 128
"""Bits of the per-row flags that the audit counts."""

_TAIL_TOKENS = 12
_TAIL_MARGIN = 6


@dataclass
class TokenBatch:
    """Token ids and masks of B rows (see the module's docstring). `labels` is set for rows that came with labels."""

    ids: np.ndarray  # (N,) int32
    offsets: np.ndarray  # (B + 1,) int64
    completion_mask: np.ndarray | None = None  # (N,) bool
    assistant_mask: np.ndarray | None = None  # (N,) bool
    labels: np.ndarray | None = None  # (N,) int32
    weights: np.ndarray | None = None  # (N,) float32, what each token's loss is multiplied by
    flags: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))  # (B,) bits

    def __post_init__(self) -> None:
        if len(self.flags) != len(self.offsets) - 1:
            self.flags = np.zeros(len(self.offsets) - 1, np.uint8)

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each row, (B,)."""
        return np.diff(self.offsets)


def join(batches: Sequence[TokenBatch]) -> TokenBatch:
    """Returns the rows of several batches, which have the same masks, as one batch."""
    lengths = np.concatenate([batch.lengths for batch in batches])

    def joined(name: str) -> Any:
        values = [getattr(batch, name) for batch in batches]
        return None if values[0] is None else np.concatenate(values)

    names = ("completion_mask", "assistant_mask", "labels", "weights", "flags")
    offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    return TokenBatch(joined("ids"), offsets, **{name: joined(name) for name in names})


def tokenize_plain(encoder: Encoder, texts: Sequence[str], *, special: bool) -> TokenBatch:
    """Returns the tokens of texts that are trained whole: text rows (`special`) and rendered conversations."""
    encoded = encoder.encode_batch(texts, special=special)
    batch = TokenBatch(encoded.ids, encoded.offsets)
    return drop_doubled_bos(batch, encoder.tokenizer)


def tokenize_spans(
    encoder: Encoder,
    texts: Sequence[str],
    spans: Sequence[Sequence[Span]],
    weights: Sequence[Sequence[float]] | None = None,
) -> TokenBatch:
    """Returns the tokens of rendered conversations with `assistant_mask` set on the tokens of the spans.

    With `weights`, one per span, every token of a span gets its weight, and all others 1.
    """
    encoded = encoder.encode_batch(texts, special=False, positions=True)
    ids, offsets = encoded.ids, encoded.offsets
    bounds = span_tokens(encoded, spans, texts)
    batch = TokenBatch(ids, offsets, assistant_mask=_mask(bounds, len(ids)), weights=_spread(bounds, weights, len(ids)))
    return drop_doubled_bos(batch, encoder.tokenizer)


def tokenize_pairs(
    encoder: Encoder,
    prompts: Sequence[str],
    texts: Sequence[str],
    *,
    special: bool,
    spans: Sequence[Sequence[Span]] | None = None,
    weights: Sequence[Sequence[float]] | None = None,
) -> TokenBatch:
    """Returns the tokens of `texts` (prompt + completion) with `completion_mask`, and `assistant_mask` for `spans`.

    `weights` are those of the spans, as in `tokenize_spans`.

    The completion begins where the prompt ends. Rows where the tokens of the prompt alone are not the first tokens of
    the whole get `BOUNDARY_MISMATCH`: the mask is right, but the model sees other prompt tokens in training than in
    use. Rows where its characters are not get `TEMPLATE_DRIFT` too. Their completion begins at the first token that
    prompt and text do not share, because an answer `<b>` shares the character `<` with a `<think>` of the prompt.
    """
    encoded = encoder.encode_batch(texts, special=special, positions=True)
    ids, offsets = encoded.ids, encoded.offsets
    borders = [common_prefix_length(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    starts = encoded.positions.tokens_at(range(len(texts)), borders)
    drifted = np.array([border < len(prompt) for border, prompt in zip(borders, prompts, strict=True)], bool)
    rows: list[int] = np.flatnonzero(drifted).tolist()
    for i, alone in zip(rows, encoder.encode([prompts[i] for i in rows], special=special), strict=True):
        starts[i] = min(starts[i], common_prefix_length(alone.ids, encoded.row(i)))
    position = np.arange(len(ids)) - np.repeat(offsets[:-1], np.diff(offsets))
    batch = TokenBatch(ids, offsets, completion_mask=position >= np.repeat(starts, np.diff(offsets)))
    if spans is not None:
        bounds = span_tokens(encoded, spans, texts)
        batch.assistant_mask, batch.weights = _mask(bounds, len(ids)), _spread(bounds, weights, len(ids))
    batch.flags[drifted] |= TEMPLATE_DRIFT
    batch.flags[_mismatched(encoder, prompts, texts, encoded, borders, starts, special) | drifted] |= BOUNDARY_MISMATCH
    return drop_doubled_bos(batch, encoder.tokenizer)


def span_tokens(encoded: EncodedBatch, spans: Sequence[Sequence[Span]], texts: Sequence[str]) -> np.ndarray:
    """Returns (S, 2): for each span of each row, its first token and the one behind its last, counted in the batch.

    A token belongs to a span when it holds at least one of its characters.
    """
    rows = [row for row, row_spans in enumerate(spans) for _ in row_spans]
    flat = [span for row_spans in spans for span in row_spans]
    firsts = encoded.positions.tokens_at(rows, [start for start, _ in flat]).tolist()
    lasts = encoded.positions.tokens_at(rows, [end for _, end in flat]).tolist()
    lengths, before = np.diff(encoded.offsets).tolist(), encoded.offsets.tolist()
    bounds: list[tuple[int, int]] = []
    for row, (start, end), first, last in zip(rows, flat, firsts, lasts, strict=True):
        if end >= len(texts[row]):
            last = lengths[row]
        elif encoded.positions.starts_before(row, last, end):
            last += 1
        if last <= first:
            raise DataFormatError(f"No token covers the characters {start} to {end} of {texts[row]!r}.")
        bounds.append((before[row] + first, before[row] + last))
    return np.array(bounds, np.int64).reshape(-1, 2)


def _mask(bounds: np.ndarray, num_tokens: int) -> np.ndarray:
    """Returns (N,) bool, true within the bounds (S, 2)."""
    change = np.bincount(bounds[:, 0], minlength=num_tokens + 1) - np.bincount(bounds[:, 1], minlength=num_tokens + 1)
    return np.cumsum(change[:-1]) > 0


def _spread(bounds: np.ndarray, weights: Sequence[Sequence[float]] | None, num_tokens: int) -> np.ndarray | None:
    """Returns (N,) float32: each span's weight on its tokens, 1 elsewhere; None without weights."""
    if weights is None:
        return None
    spread = np.ones(num_tokens, np.float32)
    for (first, last), weight in zip(bounds.tolist(), chain.from_iterable(weights), strict=True):
        spread[first:last] = weight
    return spread


def _mismatched(
    encoder: Encoder,
    prompts: Sequence[str],
    texts: Sequence[str],
    encoded: EncodedBatch,
    borders: Sequence[int],
    starts: np.ndarray,
    special: bool,
) -> np.ndarray:
    """Returns (B,) bool: the tokens of the prompt alone differ from those it has before its completion.

    Tokens depend on their neighbourhood only, so the last few of the prompt are tokenized again and compared; a
    difference is confirmed on the whole prompt, because the cut itself can cause one.
    """
    suspects: list[int] = []
    tails, tail_rows = [], []
    result = np.zeros(len(texts), bool)
    for i, (border, start) in enumerate(zip(borders, starts.tolist(), strict=True)):
        if border == 0:
            continue
        cut = encoded.positions.first_character(i, max(0, start - _TAIL_TOKENS))
        if encoded.positions.starts_before(i, start, border):
            result[i] = True
        elif cut is None or start <= _TAIL_TOKENS:
            suspects.append(i)
        else:
            tails.append(texts[i][cut:border])
            tail_rows.append(i)
    tail_tokens = encoder.encode_batch(tails, special=False)
    for number, i in enumerate(tail_rows):
        start = int(starts[i])
        kept = tail_tokens.row(number)[-_TAIL_MARGIN:]
        if kept != encoded.row(i)[start - len(kept) : start]:
            suspects.append(i)
    if suspects:
        added = encoder.added_around()[1] if special else 0
        alone = encoder.encode([prompts[i][: borders[i]] for i in suspects], special=special)
        for i, prompt in zip(suspects, alone, strict=True):
            ids = prompt.ids[: len(prompt.ids) - added]
            result[i] = len(ids) != starts[i] or ids != encoded.row(i)[: len(ids)]
    return result


def drop_doubled_bos(batch: TokenBatch, tokenizer: Any) -> TokenBatch:
    """Returns the batch without the first of two BOS tokens at the start of a row, those rows being flagged.

    A template that writes BOS and a tokenizer that adds one give two. Models whose BOS is also their EOS are left
    alone: there, an empty text is rightly BOS EOS.
    """
    doubled = flag_doubled_bos(batch, tokenizer)
    if not doubled.any():
        return batch
    keep = np.ones(len(batch.ids), bool)
    keep[batch.offsets[:-1][doubled]] = False
    return take_tokens(batch, keep)


def flag_doubled_bos(batch: TokenBatch, tokenizer: Any) -> np.ndarray:
    """Returns (B,) bool, true for rows that begin with two BOS tokens, and flags these rows."""
    bos = tokenizer.bos_token_id
    if bos is None or bos == tokenizer.eos_token_id:
        return np.zeros(len(batch.lengths), bool)
    starts, doubled = batch.offsets[:-1], batch.lengths > 1
    doubled[doubled] = (batch.ids[starts[doubled]] == bos) & (batch.ids[starts[doubled] + 1] == bos)
    batch.flags[doubled] |= DOUBLED_BOS
    return doubled


def take_tokens(batch: TokenBatch, keep: np.ndarray) -> TokenBatch:
    """Returns the batch with the tokens where `keep` (N,) is true; every row stays, possibly empty."""
    kept_before = np.concatenate(([0], np.cumsum(keep)))
    offsets = kept_before[batch.offsets].astype(np.int64)

    def select(values: np.ndarray | None) -> np.ndarray | None:
        return None if values is None else values[keep]

    return TokenBatch(
        batch.ids[keep],
        offsets,
        completion_mask=select(batch.completion_mask),
        assistant_mask=select(batch.assistant_mask),
        labels=select(batch.labels),
        weights=select(batch.weights),
        flags=batch.flags,
    )
