"""Batched access to a tokenizer: token ids of many texts at once, and which token holds a character."""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import numpy as np

from finetune import environment
from finetune.data.chat.messages import common_prefix_length
from finetune.data.preparation.byte_positions import ByteLengths, BytePositions

_PARALLELISM = "TOKENIZERS_PARALLELISM"  # the tokenizers library reads it at every call


def flatten(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns (values (N,) int32, offsets (B + 1,) int64) of a list of lists."""
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    return np.fromiter(chain.from_iterable(rows), np.int32, int(offsets[-1])), offsets


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


class _Offsets:
    """Finds tokens by character from the positions that the tokenizer kept, or from what a prefix is tokenized to."""

    def __init__(self, encoded: Sequence[Encoded]) -> None:
        self._encoded = encoded

    def tokens_at(self, rows: Sequence[int], characters: Sequence[int]) -> np.ndarray:
        pairs = zip(rows, characters, strict=True)
        return np.array([self._encoded[row].token_at(character) for row, character in pairs], np.int64)

    def starts_before(self, row: int, token: int, character: int) -> bool:
        return self._encoded[row].starts_before(token, character)

    def first_character(self, row: int, token: int) -> int | None:
        return self._encoded[row].first_character(token)


class EncodedBatch:
    """Token ids (N,) int32 of B texts with `offsets` (B + 1,), and `positions` that find tokens by character."""

    def __init__(self, encoded: Sequence[Encoded]) -> None:
        self.ids, self.offsets = flatten([row.ids for row in encoded])
        self.positions: BytePositions | _Offsets = _Offsets(encoded)

    def row(self, row: int) -> list[int]:
        """Returns the token ids of one text."""
        return self.ids[self.offsets[row] : self.offsets[row + 1]].tolist()


class Encoder:
    """Batched access to a tokenizer: the Rust backend directly where that gives the same ids, else the tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._backend = _plain_backend(tokenizer)
        self._byte_lengths = None if self._backend is None else ByteLengths.of(self._backend)
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

        with ThreadPoolExecutor(2, thread_name_prefix="tokenize") as pool, _one_core_for_python():
            return list(pool.map(run, parts))

    def _settle(self) -> None:
        """Switches off padding and truncation that an earlier call of the tokenizer may have left on."""
        assert self._backend is not None
        if self._backend.truncation is not None:
            self._backend.no_truncation()
        if self._backend.padding is not None:
            self._backend.no_padding()

    def encode_batch(self, texts: Sequence[str], *, special: bool, positions: bool = False) -> EncodedBatch:
        """Returns the tokens of the texts, with special tokens if `special`; `positions`: which hold a character."""
        lengths = self._byte_lengths  # another part may find meanwhile that they do not fit
        if not positions or lengths is None:
            return EncodedBatch(self.encode(texts, special=special, positions=positions))
        batch = EncodedBatch(self.encode(texts, special=special))
        added = self.added_around() if special else (0, 0)
        found = BytePositions(texts, batch.ids, batch.offsets, lengths, added)
        if not found.fit():
            # A token that swallows white space, for one. Such texts are tokenized twice once, then never again.
            self._byte_lengths = None
            return self.encode_batch(texts, special=special, positions=True)
        batch.positions = found
        return batch

    def encode(self, texts: Sequence[str], *, special: bool, positions: bool = False) -> list[Encoded]:
        """Returns the encoding of each text, with special tokens added if `special`; `positions` allows `token_at`."""
        if not texts:
            return []
        if self._backend is not None:
            self._settle()
            encode = self._backend.encode_batch if positions else self._backend.encode_batch_fast
            encodings = self._while_others_work(lambda: encode(list(texts), add_special_tokens=special))
            return [Encoded(e.ids, e) for e in encodings]
        output = self.tokenizer(list(texts), add_special_tokens=special, return_attention_mask=False)
        encodings = output.encodings
        if encodings is not None:
            return [Encoded(e.ids, e) for e in encodings]
        return [Encoded(ids, None, text, self) for ids, text in zip(output["input_ids"], texts, strict=True)]

    def _while_others_work(self, function: Callable[[], Any]) -> Any:
        """Returns `function()`, a call of the tokenizer; within `in_turns`, another part has its turn meanwhile."""
        others_wait = self._turn.locked()
        if others_wait:
            self._turn.release()
        try:
            return function()
        finally:
            if others_wait:
                self._turn.acquire()

    def added_around(self) -> tuple[int, int]:
        """Returns how many special tokens the tokenizer itself writes before and after a text."""
        whole, plain = (self.encode(["a"], special=special)[0].ids for special in (True, False))
        added = len(whole) - len(plain)
        first = next((i for i in range(added + 1) if whole[i : i + len(plain)] == plain), added)
        return first, added - first


def _one_core_for_python() -> AbstractContextManager[None]:
    """Returns a context that keeps the tokenizer to one thread where there are two cores and nobody said otherwise.

    With one part in the tokenizer and one in Python, three threads on two cores were slower by a sixth.
    """
    if _PARALLELISM in os.environ or (os.cpu_count() or 1) > 2:
        return nullcontext()
    return environment.temporarily(_PARALLELISM, "false")


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
