"""Text and rendered conversations -> token ids and 0/1 masks, a batch at a time.

A batch is ragged: the ids of all its rows one after another (N) and `offsets` (B + 1), row i being
`ids[offsets[i]:offsets[i + 1]]`. Masks are (N) too. A token is masked in (1) when it holds at least one character of
the trained text, so a token that straddles the border between prompt and completion is trained, and counted.

Worked example, prompt "2+2=" and completion " 4" with EOS `</s>`: ids of "2+2= 4</s>" are [2, +, 2, =, " 4", </s>];
the completion begins at character 4, which lies in token 4, so `completion_mask` is [0, 0, 0, 0, 1, 1].
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from finetune.data.chat import common_prefix_length
from finetune.data.span_check import Span
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


class Encoded:
    """Token ids of one text that can say which token holds a character."""

    def __init__(self, ids: list[int], encoding: Any = None, text: str = "", encoder: "Encoder | None" = None) -> None:
        self.ids = ids
        self._encoding = encoding
        self._text = text
        self._encoder = encoder

    def token_at(self, character: int) -> int:
        """Returns the index of the first token that ends after a character position (the token count if none does)."""
        if self._encoding is None:
            return self._token_at_by_prefix(character)
        token = self._encoding.char_to_token(character)
        if token is not None:
            return token
        # Some tokenizers leave white space out of the offsets; then no token claims it.
        ends = np.fromiter((end for _, end in self._encoding.offsets), np.int64, len(self.ids))
        after = ends > character
        if character == 0:
            # White space that opens the text is left with the span (0, 0), as special tokens are, but is none.
            after |= ~np.array(self._encoding.special_tokens_mask, bool)
        return int(after.argmax()) if after.any() else len(self.ids)

    def starts_before(self, token: int, character: int) -> bool:
        """Returns whether a token begins before a character position and reaches past it."""
        if self._encoding is None or token >= len(self.ids):
            return False
        bounds = self._encoding.token_to_chars(token)
        return bounds is not None and bounds[0] < character < bounds[1]

    def first_character(self, token: int) -> int | None:
        """Returns where a token begins in the text, or None for one that the tokenizer added."""
        bounds = self._encoding.token_to_chars(token) if self._encoding is not None else None
        return None if bounds is None else bounds[0]

    def _token_at_by_prefix(self, character: int) -> int:
        assert self._encoder is not None
        prefix = self._encoder.encode([self._text[:character]], special=False)[0].ids
        return common_prefix_length(prefix, self.ids)


class Encoder:
    """Batched access to a tokenizer: the Rust backend directly where that gives the same ids, else the tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._backend = _plain_backend(tokenizer)
        self._turn = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_turn"}  # for worker processes

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._turn = threading.Lock()

    def in_turns(self, function: Callable[[Any], Any], parts: Sequence[Any]) -> list[Any]:
        """Returns `function(part)` for each part; while one part is in the tokenizer, the next one is worked on.

        Only the tokenizer runs beside other code: it needs no interpreter. Everything else is done by one thread at a
        time, so `function` need not be safe for threads. Of several errors the first part's is raised.
        """
        if self._backend is None or len(parts) < 2:
            return [function(part) for part in parts]
        self._settle()

        def run(part: Any) -> Any:
            with self._turn:
                return function(part)

        with ThreadPoolExecutor(2, thread_name_prefix="tokenize") as pool:
            return list(pool.map(run, parts))

    def _settle(self) -> None:
        """Switches off padding and truncation that an earlier call of the tokenizer may have left on."""
        assert self._backend is not None
        if self._backend.truncation is not None:
            self._backend.no_truncation()
        if self._backend.padding is not None:
            self._backend.no_padding()

    def encode(self, texts: Sequence[str], *, special: bool, positions: bool = False) -> list[Encoded]:
        """Returns the encoding of each text, with special tokens added if `special`; `positions` allows `token_at`."""
        if self._backend is not None:
            self._settle()
            encode = self._backend.encode_batch if positions else self._backend.encode_batch_fast
            others_wait = self._turn.locked()
            if others_wait:
                self._turn.release()
            try:
                encodings = encode(list(texts), add_special_tokens=special)
            finally:
                if others_wait:
                    self._turn.acquire()
            return [Encoded(e.ids, e) for e in encodings]
        output = self.tokenizer(list(texts), add_special_tokens=special, return_attention_mask=False)
        encodings = output.encodings
        if encodings is not None:
            return [Encoded(e.ids, e) for e in encodings]
        return [Encoded(ids, None, text, self) for ids, text in zip(output["input_ids"], texts, strict=True)]

    def added_at_end(self) -> int:
        """Returns how many special tokens the tokenizer itself writes after a text."""
        whole, plain = (self.encode(["a"], special=special)[0].ids for special in (True, False))
        starts = range(len(whole) - len(plain) + 1)
        first = next((i for i in starts if whole[i : i + len(plain)] == plain), len(whole) - len(plain))
        return len(whole) - first - len(plain)


def _plain_backend(tokenizer: Any) -> Any:
    """Returns the Rust tokenizer if the Python class around it adds nothing to `tokenizer(texts)`, else None."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    backend = tokenizer.backend_tokenizer
    probes = [
        "",
        "a b",
        " Hello, world! ",
        "x\n\n\ty  é😀",
        (tokenizer.bos_token or "") + "z" + (tokenizer.eos_token or ""),
    ]
    for special in (True, False):
        backend.no_truncation()
        backend.no_padding()
        direct = [e.ids for e in backend.encode_batch_fast(probes, add_special_tokens=special)]
        if direct != tokenizer(probes, add_special_tokens=special)["input_ids"]:
            return None
    return backend


def join(batches: Sequence[TokenBatch]) -> TokenBatch:
    """Returns the rows of several batches, which have the same masks, as one batch."""
    lengths = np.concatenate([batch.lengths for batch in batches])

    def joined(name: str) -> Any:
        values = [getattr(batch, name) for batch in batches]
        return None if values[0] is None else np.concatenate(values)

    names = ("completion_mask", "assistant_mask", "labels", "weights", "flags")
    offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    return TokenBatch(joined("ids"), offsets, **{name: joined(name) for name in names})


def flatten(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns (values (N,) int32, offsets (B + 1,) int64) of a list of lists."""
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    return np.fromiter(chain.from_iterable(rows), np.int32, int(offsets[-1])), offsets


def tokenize_plain(encoder: Encoder, texts: Sequence[str], *, special: bool) -> TokenBatch:
    """Returns the tokens of texts that are trained whole: text rows (`special`) and rendered conversations."""
    ids, offsets = flatten([encoded.ids for encoded in encoder.encode(texts, special=special)])
    batch = TokenBatch(ids, offsets)
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
    encoded = encoder.encode(texts, special=False, positions=True)
    ids, offsets = flatten([e.ids for e in encoded])
    bounds = span_tokens(encoded, spans, offsets, texts)
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

    The completion begins where prompt and text part. Rows where the tokens of the prompt alone are not the first
    tokens of the whole get `BOUNDARY_MISMATCH`, rows where its characters are not get `TEMPLATE_DRIFT`; the mask is
    right in both cases, but the model sees other prompt tokens in training than in use.
    """
    encoded = encoder.encode(texts, special=special, positions=True)
    ids, offsets = flatten([e.ids for e in encoded])
    borders = [common_prefix_length(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    starts = np.array([e.token_at(border) for e, border in zip(encoded, borders, strict=True)], np.int64)
    position = np.arange(len(ids)) - np.repeat(offsets[:-1], np.diff(offsets))
    batch = TokenBatch(ids, offsets, completion_mask=position >= np.repeat(starts, np.diff(offsets)))
    if spans is not None:
        bounds = span_tokens(encoded, spans, offsets, texts)
        batch.assistant_mask, batch.weights = _mask(bounds, len(ids)), _spread(bounds, weights, len(ids))
    drifted = np.array([border < len(prompt) for border, prompt in zip(borders, prompts, strict=True)], bool)
    batch.flags[drifted] |= TEMPLATE_DRIFT
    batch.flags[_mismatched(encoder, prompts, texts, encoded, borders, starts, special) | drifted] |= BOUNDARY_MISMATCH
    return drop_doubled_bos(batch, encoder.tokenizer)


def span_tokens(
    encoded: Sequence[Encoded], spans: Sequence[Sequence[Span]], offsets: np.ndarray, texts: Sequence[str]
) -> np.ndarray:
    """Returns (S, 2): for each span of each row, its first token and the one behind its last, counted in the batch.

    A token belongs to a span when it holds at least one of its characters.
    """
    bounds: list[tuple[int, int]] = []
    for i, row_spans in enumerate(spans):
        row, before = encoded[i], int(offsets[i])
        for start, end in row_spans:
            first = row.token_at(start)
            last = len(row.ids) if end >= len(texts[i]) else row.token_at(end)
            if last < len(row.ids) and row.starts_before(last, end):
                last += 1
            if last <= first:
                raise DataFormatError(f"No token covers the characters {start} to {end} of {texts[i]!r}.")
            bounds.append((before + first, before + last))
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
    encoded: Sequence[Encoded],
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
    for i, (row, border, start) in enumerate(zip(encoded, borders, starts.tolist(), strict=True)):
        if border == 0:
            continue
        cut = row.first_character(max(0, start - _TAIL_TOKENS))
        if row.starts_before(start, border):
            result[i] = True
        elif cut is None or start <= _TAIL_TOKENS:
            suspects.append(i)
        else:
            tails.append(texts[i][cut:border])
            tail_rows.append(i)
    for i, tail in zip(tail_rows, encoder.encode(tails, special=False) if tails else (), strict=True):
        start = int(starts[i])
        kept = tail.ids[-_TAIL_MARGIN:]
        if kept != encoded[i].ids[start - len(kept) : start]:
            suspects.append(i)
    if suspects:
        added = encoder.added_at_end() if special else 0
        alone = encoder.encode([prompts[i][: borders[i]] for i in suspects], special=special)
        for i, prompt in zip(suspects, alone, strict=True):
            ids = prompt.ids[: len(prompt.ids) - added]
            result[i] = len(ids) != starts[i] or ids != encoded[i].ids[: len(ids)]
    return result


def drop_doubled_bos(batch: TokenBatch, tokenizer: Any) -> TokenBatch:
    """Returns the batch without the first of two BOS tokens at the start of a row, those rows being flagged.

    A template that writes BOS and a tokenizer that adds one give two. Models whose BOS is also their EOS are left
    alone: there, an empty text is rightly BOS EOS.
    """
    bos = tokenizer.bos_token_id
    if bos is None or bos == tokenizer.eos_token_id:
        return batch
    starts = batch.offsets[:-1]
    doubled = batch.lengths > 1
    doubled[doubled] = (batch.ids[starts[doubled]] == bos) & (batch.ids[starts[doubled] + 1] == bos)
    batch.flags[doubled] |= DOUBLED_BOS
    if not doubled.any():
        return batch
    keep = np.ones(len(batch.ids), bool)
    keep[starts[doubled]] = False
    return take_tokens(batch, keep)


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
