"""Which token holds a character, from the bytes that each token stands for.

A byte-level tokenizer (GPT-2, Llama 3, Qwen) cuts the UTF-8 bytes of a text into tokens and changes none of them, so
positions follow from the lengths of the tokens. The positions that the tokenizers library keeps for every token cost a
quarter of its time.

Worked example: "é cat" is the bytes C3 A9 20 63 61 74. Its tokens "é" and " cat" stand for 2 and 4 of them and end at
2 and 6. The space, character 1, is byte 2, and the first token that ends behind byte 2 is token 1.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

# Every kind of text on which a tokenizer that is not byte-level gives other lengths, or positions, than its bytes.
_PROBES = ("a b", " Hello, world!  two", "x\n\n\ty", "é😀 ü日本語", "don't 12345", "e\u0301")


class ByteLengths:
    """How many bytes of a text each token of a byte-level tokenizer stands for."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._added = {token: len(each.content.encode()) for token, each in backend.get_added_tokens_decoder().items()}
        self._known = np.full(max(backend.get_vocab_size(), *self._added, 0) + 1, -1, np.int64)

    @classmethod
    def of(cls, backend: Any) -> "ByteLengths | None":
        """Returns the lengths for a tokenizer of the tokenizers library, or None for one that is not byte-level."""
        if backend.normalizer is not None:
            return None
        lengths = cls(backend)
        for text, encoding in zip(_PROBES, backend.encode_batch(list(_PROBES), add_special_tokens=False), strict=True):
            ends = np.cumsum(lengths(np.array(encoding.ids, np.int64)))
            if not len(ends) or ends[-1] != len(text.encode()):
                return None
            for character in range(len(text)):
                token = encoding.char_to_token(character)  # None where white space is left out of the positions
                if token is not None and token != np.searchsorted(ends, len(text[:character].encode()), "right"):
                    return None
        return lengths

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """Returns the lengths (N,) int64 of tokens (N,)."""
        highest = int(ids.max(initial=0))
        if highest >= len(self._known):
            self._known = np.concatenate((self._known, np.full(highest + 1 - len(self._known), -1, np.int64)))
        for token in np.unique(ids[self._known[ids] < 0]).tolist():
            # One letter of a byte-level token stands for one byte.
            length = self._added.get(token)
            self._known[token] = len(self._backend.id_to_token(token)) if length is None else length
        return self._known[ids]


class BytePositions:
    """Finds the tokens of B texts by character, from their ids (N,) and `offsets` (B + 1,).

    `added` tokens at the start and at the end of each row are the tokenizer's own and stand for no text.
    """

    def __init__(
        self,
        texts: Sequence[str],
        ids: np.ndarray,
        offsets: np.ndarray,
        lengths: ByteLengths,
        added: tuple[int, int] = (0, 0),
    ) -> None:
        self._texts, self._offsets = texts, offsets
        self._lengths = lengths(ids)
        first, last = added
        for place in (*(offsets[:-1] + i for i in range(first)), *(offsets[1:] - 1 - i for i in range(last))):
            self._lengths[place] = 0
        self._ends = np.cumsum(self._lengths)
        # Where each row begins, and the last one ends, in the bytes of all texts.
        self._bounds = np.concatenate(([0], self._ends))[offsets]

    def fit(self) -> bool:
        """Returns whether the tokens of every text stand for exactly its bytes."""
        sizes = [len(text) if text.isascii() else len(text.encode()) for text in self._texts]
        return np.array_equal(np.diff(self._bounds), sizes)

    def tokens_at(self, rows: Sequence[int], characters: Sequence[int]) -> np.ndarray:
        """Returns, for each pair, the first token of the row that ends after the character, (pairs,) int64.

        It is the row's number of tokens if none does.
        """
        places = [self._byte(row, character) for row, character in zip(rows, characters, strict=True)]
        where = np.asarray(rows, np.int64)
        found = np.searchsorted(self._ends, np.array(places, np.int64), "right")
        return np.minimum(found, self._offsets[where + 1]) - self._offsets[where]

    def starts_before(self, row: int, token: int, character: int) -> bool:
        """Returns whether a token begins before a character position and reaches past it."""
        at = self._offsets[row] + token
        if at >= self._offsets[row + 1]:
            return False
        return bool(self._ends[at] - self._lengths[at] < self._byte(row, character) < self._ends[at])

    def first_character(self, row: int, token: int) -> int | None:
        """Returns where a token begins in its text, or None for one that the tokenizer added."""
        at = self._offsets[row] + token
        if self._lengths[at] == 0:
            return None
        before, text = int(self._ends[at] - self._lengths[at] - self._bounds[row]), self._texts[row]
        return before if text.isascii() else len(text.encode()[:before].decode(errors="ignore"))

    def _byte(self, row: int, character: int) -> int:
        """Returns which byte of all texts a character of a row begins at."""
        text = self._texts[row]
        return int(self._bounds[row]) + (character if text.isascii() else len(text[:character].encode()))
