"""Tokens are found from their lengths as the tokenizers library finds them, and only where lengths say everything."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from finetune.data.preparation.byte_positions import ByteLengths, BytePositions
from finetune.data.preparation.encoder import EncodedBatch, Encoder

TEXTS = ["the cat sat, don't it? é😀 日本語 ü\n\n the  cat\t12345", "a mat <|end|>\nthe cat<|end|>"] * 20


def byte_level(**options: Any) -> Any:
    """Returns a byte-level BPE tokenizer, in parts so that tests can change one."""
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **options})
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


PLAIN = byte_level()


def compare(tokenizer: Any, texts: list[str]) -> None:
    """Compares every question about every character of every text with the library's own positions."""
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    ids = np.array([token for each in encodings for token in each.ids], np.int64)
    offsets = np.cumsum([0, *(len(each.ids) for each in encodings)])
    lengths = ByteLengths.of(tokenizer)
    assert lengths is not None
    positions = BytePositions(texts, ids, offsets, lengths)
    assert positions.fit()
    for row, (text, encoding) in enumerate(zip(texts, encodings, strict=True)):
        for character in range(len(text)):
            expected = encoding.char_to_token(character)
            assert positions.tokens_at([row], [character])[0] == expected, (text, character)
            first, last = encoding.token_to_chars(expected)
            assert positions.starts_before(row, expected, character) == (first < character < last)
            assert positions.first_character(row, expected) == first
        assert positions.tokens_at([row], [len(text)])[0] == len(encoding.ids)


@given(st.lists(st.text(max_size=40), max_size=5))
def test_any_text(texts: list[str]) -> None:
    compare(PLAIN, texts)


@given(st.lists(st.sampled_from(["the cat ", " sat", "<|end|>", "\n", "é", "日", "😀", "12", ""]), max_size=12))
def test_special_tokens_and_characters_of_several_bytes(parts: list[str]) -> None:
    compare(PLAIN, ["".join(parts), "x"])


def wrapped(tokenizer: Any) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|end|>")


def by_offsets(tokenizer: Any, texts: list[str], *, special: bool) -> EncodedBatch:
    encoder = Encoder(tokenizer)
    encoder._byte_lengths = None
    return encoder.encode_batch(texts, special=special, positions=True)


def test_tokens_that_the_tokenizer_adds_stand_for_no_text() -> None:
    tokenizer = byte_level()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <|end|>", special_tokens=[("<s>", 0), ("<|end|>", 1)]
    )
    made, texts = wrapped(tokenizer), ["the cat", "", "<s>é<|end|>"]
    encoder = Encoder(made)
    found, expected = encoder.encode_batch(texts, special=True, positions=True), by_offsets(made, texts, special=True)
    assert isinstance(found.positions, BytePositions) and not isinstance(expected.positions, BytePositions)
    assert encoder.added_around() == (1, 1)
    assert found.row(1) == [0, 1] and found.row(2)[:2] == [0, 0]
    pairs = [(0, 0), (0, 3), (0, 6), (2, 0), (2, 3), (2, 4)]
    rows, characters = zip(*pairs, strict=True)
    assert (
        found.positions.tokens_at(rows, characters).tolist() == expected.positions.tokens_at(rows, characters).tolist()
    )
    assert [found.positions.first_character(2, token) for token in (0, 1, 2)] == [None, 0, 3]
    assert expected.positions.first_character(2, 0) is None


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda made: setattr(made, "normalizer", normalizers.NFC()), id="normalizer"),
        pytest.param(lambda made: setattr(made, "pre_tokenizer", pre_tokenizers.ByteLevel()), id="prefix space"),
        pytest.param(lambda made: setattr(made, "pre_tokenizer", pre_tokenizers.Whitespace()), id="drops white space"),
    ],
)
def test_other_tokenizers_keep_the_positions_of_the_library(change: Callable[[Any], None]) -> None:
    tokenizer = byte_level()
    change(tokenizer)
    assert ByteLengths.of(tokenizer) is None
    batch = Encoder(wrapped(tokenizer)).encode_batch(["the cat"], special=False, positions=True)
    assert not isinstance(batch.positions, BytePositions)


def test_word_pieces_are_not_taken_for_bytes() -> None:
    vocabulary = {"[UNK]": 0, "a": 1, "b": 2, "▁b": 3}
    for pre_tokenizer in (pre_tokenizers.Whitespace(), pre_tokenizers.Metaspace(prepend_scheme="never")):
        tokenizer: Any = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizer
        assert ByteLengths.of(tokenizer) is None


def test_a_token_that_swallows_white_space_brings_the_library_s_positions_back() -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("<gap>", lstrip=True, rstrip=True)])
    made, texts = wrapped(tokenizer), ["the cat  <gap>  sat", "the cat"]
    encoder = Encoder(made)
    assert isinstance(encoder.encode_batch(texts[1:], special=False, positions=True).positions, BytePositions)
    found, expected = encoder.encode_batch(texts, special=False, positions=True), by_offsets(made, texts, special=False)
    assert not isinstance(found.positions, BytePositions)
    characters = range(len(texts[0]))
    rows = [0] * len(texts[0])
    assert (
        found.positions.tokens_at(rows, characters).tolist() == expected.positions.tokens_at(rows, characters).tolist()
    )
