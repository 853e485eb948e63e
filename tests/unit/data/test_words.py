"""Token ids put together from words are those of the whole text, for the pre-tokenizers of several model families."""

import pickle
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from finetune.data import words
from finetune.data.encoder import Encoder
from finetune.data.words import word_table

CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXT = ["The cat's hat, the  mat.\n\nHe'll sit; 12 345 cafés ", "über  été — naïve 日本 語 mat's"] * 30


def byte_level(**options: Any) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, **options)


def split_by(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), behavior="isolated"), byte_level(use_regex=False)]
    )


def make(pre_tokenizer: Any, *, trim: bool = False, bos: bool = False, nfc: bool = False) -> Any:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    if nfc:
        backend.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<s>", "<|im|>"], show_progress=False
    )
    backend.train_from_iterator(TEXT, trainer)
    steps: list[Any] = [processors.ByteLevel(trim_offsets=trim)]
    if bos:
        steps.append(processors.TemplateProcessing(single="<s> $A <|im|>", special_tokens=[("<s>", 0), ("<|im|>", 1)]))
    backend.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


TOKENIZERS = {
    "gpt2": make(byte_level()),
    "digits": make(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()]), bos=True),
    "llama3": make(split_by(CL100K), trim=True, bos=True),
    "qwen": make(split_by(CL100K.replace("{1,3}", "")), nfc=True),
    "o200k": make(split_by(O200K)),
}

texts = st.lists(
    st.lists(
        st.sampled_from(
            [
                *(
                    "the",
                    "cat",
                    "'s",
                    " ",
                    " ",
                    "  ",
                    "\n",
                    "\n",
                    "\t",
                    "<s>",
                    "<|im|>",
                    ".",
                    "12",
                    "é",
                    "e",
                    "\u0301",
                    "日",
                ),
                *("\r", "/", "\x1c", "\u00a0", "\u180e", "\u200b", "\u2028", "İ", "ﬁ", "-", "Aa"),
            ]
        )
        | st.text(max_size=3),
        max_size=12,
    ).map("".join),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(texts=texts, special=st.booleans())
def test_ids_and_positions_are_those_of_the_whole_text(name: str, texts: list[str], special: bool) -> None:
    encoder = Encoder(TOKENIZERS[name])
    table = encoder._words
    assert table is not None
    by_rust = encoder.encode(texts, special=special, positions=True)
    made = encoder.encode_batch(texts, special=special, positions=True)
    assert [made.row(i) for i in range(len(texts))] == [each.ids for each in by_rust]
    for row, (text, whole) in enumerate(zip(texts, by_rust, strict=True)):
        for character in range(len(text)):
            token = whole.token_at(character)
            assert made.tokens_at([row], [character]).tolist() == [token]
            assert made.starts_before(row, token, character) == whole.starts_before(token, character)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_table_is_made_for_byte_level_bpe(name: str) -> None:
    encoder = Encoder(TOKENIZERS[name])
    made = encoder._encode_words(["the cat sat", "the cat"], False)
    assert made is not None and made.ids.dtype == np.int32
    again = pickle.loads(pickle.dumps(encoder))
    assert again.encode_batch(["the cat"], special=False).row(0) == made.ids[made.offsets[1] :].tolist()


def test_a_word_is_tokenized_once() -> None:
    table = word_table(TOKENIZERS["gpt2"].backend_tokenizer)
    assert table is not None
    cut = table.pieces(["<s>the cat, the hat", "a cat, the hat"], special=False)
    assert cut is not None
    pieces, counts = cut
    assert pieces == ["\0<s>", "\0the", "cat,", "the", "hat", "\0a", "cat,", "the", "hat"] and counts == [5, 4]
    unknown = table.unknown(pieces)
    assert sorted(unknown) == sorted({"\0<s>", "\0the", "cat,", "the", "hat", "\0a"})
    table.add(unknown, table.encode(unknown))
    assert table.unknown(pieces) == []


def test_texts_whose_words_do_not_come_again_go_to_the_tokenizer_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.data.words._PROBATION", 20_000)
    encoder = Encoder(TOKENIZERS["gpt2"])
    for start in range(0, 30_000, 1000):
        encoder.encode_batch([f"x{number}" for number in range(start, start + 1000)], special=False)
    assert encoder._words is None


def test_a_full_table_is_followed_by_an_empty_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.data.words._MOST_TOKENS", 5)
    encoder = Encoder(TOKENIZERS["llama3"])
    table = encoder._words
    for text in ("the cat sat on", "a mat", "the hat"):
        expected = encoder.encode([text], special=True)[0].ids
        assert encoder.encode_batch([text], special=True).row(0) == expected
    assert encoder._words is not None and encoder._words is not table


@pytest.mark.parametrize(
    "reason", ["prefix space", "unknown pattern", "merged", "added token", "dropout", "normalizer", "metaspace", "none"]
)
def test_no_table_where_words_may_depend_on_each_other(reason: str) -> None:
    patterns = {
        "prefix space": pre_tokenizers.ByteLevel(add_prefix_space=True),
        "unknown pattern": split_by(r"\w+ \w+|\s+"),
        "merged": pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(CL100K), behavior="merged_with_next"), byte_level(use_regex=False)]
        ),
        "metaspace": pre_tokenizers.Metaspace(),
        "none": byte_level(use_regex=False),
    }
    backend = make(patterns.get(reason, byte_level())).backend_tokenizer
    if reason == "added token":
        backend.add_tokens([AddedToken("the cat")])
    if reason == "dropout":
        backend.model.dropout = 0.5
    if reason == "normalizer":
        backend.normalizer = normalizers.Lowercase()
    assert word_table(backend) is None


def test_words_that_do_not_agree_with_the_whole_texts_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["the cat", "the hat"]
    expected = [each.ids for each in Encoder(TOKENIZERS["gpt2"]).encode(texts, special=False)]
    monkeypatch.setattr(words, "_before_space", re.compile("(?=a)"))
    encoder = Encoder(TOKENIZERS["gpt2"])
    made = encoder.encode_batch(texts, special=False)
    assert [made.row(0), made.row(1)] == expected
    assert encoder._words is None
    assert encoder.encode_batch(texts, special=False).row(0) == expected[0]
