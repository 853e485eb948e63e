"""Token ids of texts put together from those of their words, each word being tokenized once.

A text is cut before every space that follows something else than white space, at the end of lines, and around special
tokens. Byte-level BPE tokenizers never join two such pieces: their first step is a regular expression of whose matches
none runs from anything but white space into a space, and what follows a cut does not depend on what stands before it.
So the ids of a text are those of its pieces, one after another. `word_table` answers None for tokenizers of which that
is not known.

Worked example: "<s>the cat, the hat" with the special token `<s>` is cut into "<s>", "the", " cat,", " the", " hat". A
second text "a cat, the hat" needs only "a" tokenized anew.
"""

import json
import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

# Alternatives of pre-tokenizers' expressions (GPT-2, cl100k, o200k, Llama 3, Qwen). None matches a space after
# anything that is not white space, and none looks behind.
_KNOWN = {
    "'s", "'t", "'re", "'ve", "'m", "'ll", "'d", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"'(?i:[sdmt]|ll|ve|re)",
    r" ?\p{L}+", r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r" ?\p{N}+", r"\p{N}", r"\p{N}+", r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
}  # fmt: skip

# Python's white space holds all of Unicode's; U+180E was white space in old versions of it.
_before_space = re.compile(" (?<=[^\\s\u180e] )")

# The end of a line that text follows. An expression with `\\s*[\\r\\n]+` takes all white space up to the last end of a
# line at once; others look at what follows white space, so only one that stands alone may be cut off from it.
_lines = re.compile("\n(?=[^\\S\r\n]*[^\\s/\u180e])")
_lone_lines = re.compile("\n(?<=[^\\s\u180e]\n)(?=[!-.0-~])")

Encoding = tuple[list[int], list[tuple[int, int]]]
"""Token ids of a piece, and the characters that each covers."""

_START = "\0"  # marks a piece that begins without a space; texts that hold it are not cut
_BEFORE, _AFTER = "\0\0<", "\0\0>"  # the pieces that stand for the special tokens around a text
_MOST_TOKENS = 2_000_000
_PROBATION = 200_000


class WordTable:
    """The pieces seen so far with their tokens.

    `backend` is the Rust tokenizer, `special` are the tokens that it finds before anything else, and `around` the ids
    that it writes before and after a text when asked for special tokens (None: not the same for every text). `lines`
    finds the ends of lines behind which a text may be cut.
    """

    def __init__(
        self,
        backend: Any,
        special: Sequence[str],
        around: tuple[list[int], list[int]] | None,
        lines: re.Pattern[str],
    ) -> None:
        self._backend, self._lines = backend, lines
        longest_first = sorted(special, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if special else None
        self._index: dict[str, int] = {}
        self._first = _Numbers()  # where the tokens of a piece begin in the three columns of tokens
        self._count = _Numbers()
        self._characters = _Numbers()
        self._odd = _Numbers()
        self._ids = _Numbers()
        self._begin = _Numbers()
        self._end = _Numbers()
        self._num_tokens = 0
        self._special_tokens, self._around = list(special), around
        # Some tokenizers leave the space before a word out of its place, except at the start of a text.
        self._trims = backend.encode("a a", add_special_tokens=False).offsets[-1][0] == 2
        for key, ids in zip((_BEFORE, _AFTER), around or (), strict=False):
            self._append([key], [0], [len(ids)], [False], ids, [0] * len(ids), [0] * len(ids))

    def renewed(self) -> "WordTable":
        """Returns an empty table for the same tokenizer."""
        return WordTable(self._backend, self._special_tokens, self._around, self._lines)

    @property
    def is_full(self) -> bool:
        """Whether it holds so much that a new table should take its place."""
        return len(self._ids) > _MOST_TOKENS

    @property
    def is_useful(self) -> bool:
        """Whether pieces come again often enough; where a quarter of the tokens are new, whole texts are faster."""
        return self._num_tokens < _PROBATION or 6 * len(self._ids) < self._num_tokens

    def pieces(self, texts: Sequence[str], *, special: bool) -> tuple[list[str], list[int]] | None:
        """Returns the pieces of all texts, and how many each text has; None if these texts cannot be cut."""
        if any(_START in text for text in texts) or (special and self._around is None):
            return None
        pieces: list[str] = []
        counts: list[int] = []
        cut = _before_space.split
        for text in texts:
            before = len(pieces)
            if special:
                pieces.append(_BEFORE)
            for part in self._special.split(text) if self._special is not None else (text,):
                if "\n" in part:
                    *lines, last = self._lines.split(part)
                    for line in lines:
                        words = cut(line + "\n")
                        words[0] = _START + words[0]
                        pieces += words
                    part = last
                if part:
                    words = cut(part)
                    words[0] = _START + words[0]
                    pieces += words
            if special:
                pieces.append(_AFTER)
            counts.append(len(pieces) - before)
        return pieces, counts

    def unknown(self, pieces: Sequence[str]) -> list[str]:
        """Returns the pieces that are not in the table."""
        # Sorted, because the order of a set differs from process to process.
        return sorted(set(pieces).difference(self._index))

    def encode(self, pieces: Sequence[str]) -> list[Encoding]:
        """Returns the ids of pieces that are not in the table, and the characters that each token covers."""
        before = "a" if self._trims else ""
        texts = [piece[1:] if piece[:1] == _START else f"{before} {piece}" for piece in pieces]
        made = [(each.ids, each.offsets) for each in self._backend.encode_batch(texts, add_special_tokens=False)]
        if not before:
            return made
        return [
            (ids, spans) if piece[:1] == _START else (ids[1:], [(begin - 1, end - 1) for begin, end in spans[1:]])
            for piece, (ids, spans) in zip(pieces, made, strict=True)
        ]

    def add(self, pieces: Sequence[str], encodings: Sequence[Encoding]) -> None:
        """Takes pieces in; those that somebody else has added since they were unknown are skipped."""
        new = [(piece, made) for piece, made in zip(pieces, encodings, strict=True) if piece not in self._index]
        if not new:
            return
        counts = np.array([len(ids) for _, (ids, _) in new], np.int64)
        spans = np.array([span for _, (_, spans) in new for span in spans], np.int64).reshape(-1, 2)
        in_order = np.ones(len(spans), bool)
        in_order[1:] = (np.diff(spans, axis=0) >= 0).all(axis=1)
        in_order[(np.cumsum(counts) - counts)[counts > 0]] = True
        wrong = ~in_order | (spans[:, 1] == 0)
        odd = np.bincount(np.repeat(np.arange(len(new)), counts), wrong, minlength=len(new)) > 0
        if self._trims:
            odd |= np.array([piece[:2] == _START + " " for piece, _ in new])
        ids = list(chain.from_iterable(ids for _, (ids, _) in new))
        keys = [piece for piece, _ in new]
        characters = [len(piece) - 1 if piece[:1] == _START else len(piece) + 1 for piece in keys]
        self._append(keys, characters, counts, odd, ids, spans[:, 0], spans[:, 1])

    def _append(
        self, keys: list[str], characters: Any, counts: Any, odd: Any, ids: list[int], begin: Any, end: Any
    ) -> None:
        size = len(self._index)
        self._first.extend(len(self._ids) + np.cumsum(counts) - counts)
        self._count.extend(counts)
        self._characters.extend(characters)
        self._odd.extend(odd)
        self._ids.extend(ids)
        self._begin.extend(begin)
        self._end.extend(end)
        self._index.update((key, size + i) for i, key in enumerate(keys))

    def look_up(self, pieces: Sequence[str], counts: Sequence[int]) -> "Words":
        """Returns the tokens of the texts that `pieces` (all in the table) and `counts` describe."""
        entries = np.fromiter(map(self._index.__getitem__, pieces), np.int64, len(pieces))
        tokens = self._count.values[entries]
        after = np.cumsum(tokens)
        total = int(after[-1]) if len(after) else 0
        self._num_tokens += total
        characters = self._characters.values[entries]
        ends = np.cumsum(characters)
        rows = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
        index = np.arange(total) + np.repeat(self._first.values[entries] - (after - tokens), tokens)
        shift = np.repeat(ends - characters, tokens)
        return Words(
            self._ids.values[index].astype(np.int32),
            np.concatenate(([0], after))[rows],
            np.concatenate(([0], ends))[rows],
            self._begin.values[index] + shift,
            self._end.values[index] + shift,
            bool(self._odd.values[entries].any()),
        )


class Words:
    """Token ids (N,) of B texts, `offsets` (B + 1,), and where in all texts joined each token begins and ends.

    `odd`: some token's place in its text is not known.
    """

    def __init__(
        self, ids: np.ndarray, offsets: np.ndarray, texts: np.ndarray, begin: np.ndarray, end: np.ndarray, odd: bool
    ) -> None:
        self.ids, self.offsets, self.odd = ids, offsets, odd
        self._texts, self._begin, self._end = texts, begin, end

    def tokens_at(self, rows: np.ndarray, characters: np.ndarray) -> np.ndarray:
        """Returns the first token of each row that ends after a character, counted in its row."""
        found = np.searchsorted(self._end, self._texts[rows] + characters, "right")
        return np.minimum(found, self.offsets[rows + 1]) - self.offsets[rows]

    def bounds(self, row: int, token: int) -> tuple[int, int]:
        """Returns the characters of a token in its row's text."""
        at, start = self.offsets[row] + token, self._texts[row]
        return int(self._begin[at] - start), int(self._end[at] - start)


class _Numbers:
    """A growing array of integers; appending is cheap."""

    def __init__(self) -> None:
        self._array = np.zeros(1024, np.int64)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    @property
    def values(self) -> np.ndarray:
        return self._array[: self._size]

    def extend(self, values: Any) -> None:
        size = self._size + len(values)
        if size > len(self._array):
            self._array = np.concatenate((self.values, np.zeros(max(size, 2 * self._size) - self._size, np.int64)))
        self._array[self._size : size] = values
        self._size = size


def word_table(backend: Any) -> WordTable | None:
    """Returns an empty table for a Rust tokenizer, or None if the ids of a text may not be those of its pieces."""
    from tokenizers.models import BPE

    if not isinstance(backend.model, BPE) or backend.model.dropout or backend.encode_special_tokens:
        return None
    normalizer = json.loads(backend.normalizer.__getstate__()) if backend.normalizer is not None else {"type": "NFC"}
    if normalizer["type"] != "NFC" or backend.pre_tokenizer is None:
        return None
    lines = _cuts(json.loads(backend.pre_tokenizer.__getstate__()))
    if lines is None:
        return None
    if len(backend.encode("a", add_special_tokens=False).ids) != 1:
        return None
    added = backend.get_added_tokens_decoder().values()
    if any(token.single_word or token.lstrip or token.rstrip or re.search(r"\s", token.content) for token in added):
        return None
    special = [token.content for token in added if token.content and not token.normalized]
    return WordTable(backend, special, _around(backend), lines)


def _around(backend: Any) -> tuple[list[int], list[int]] | None:
    """Returns the ids that a tokenizer writes before and after every text, or None if it is not that simple."""
    found = []
    for text in ("a", "b c"):
        plain, whole = (backend.encode(text, add_special_tokens=special).ids for special in (False, True))
        extra = len(whole) - len(plain)
        found.append(
            [(whole[:i], whole[i + len(plain) :]) for i in range(extra + 1) if whole[i:][: len(plain)] == plain]
        )
    common = [each for each in found[0] if each in found[1]]
    return common[0] if len(common) == 1 else None


def _cuts(pre_tokenizer: dict[str, Any]) -> re.Pattern[str] | None:
    """Returns where lines may be cut, or None for a pre-tokenizer that is not known to cut before spaces."""
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    lines = None
    for number, step in enumerate(steps):
        if step["type"] == "ByteLevel" and not step["add_prefix_space"] and number == len(steps) - 1:
            lines = lines or (_lone_lines if step["use_regex"] else None)
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            parts = _alternatives(step["pattern"].get("Regex") or "?")
            if not set(parts) <= _KNOWN:
                return None
            whole_lines = parts[-3:] == [r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"] and lines is not _lone_lines
            lines = _lines if whole_lines else _lone_lines
        elif step["type"] != "Digits":
            return None
    return lines


def _alternatives(pattern: str) -> list[str]:
    """Returns what stands between the `|` of an expression that are in no bracket."""
    found, depth = [""], 0
    for character in pattern:
        depth += (character in "([") - (character in ")]")
        if character == "|" and not depth:
            found.append("")
        else:
            found[-1] += character
    return found
