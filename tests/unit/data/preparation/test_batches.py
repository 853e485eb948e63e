"""Whole rows through the preparation: which of their tokens are trained."""

import json
from typing import Any

import pytest
from datasets import IterableDataset

from finetune.data.preparation.pipeline import prepare_split
from finetune.data.preparation.settings import DataSettings
from finetune.data.sources import as_dataset
from finetune.errors import DataFormatError

USER = {"role": "user", "content": "what is your name"}
ANSWER = {"role": "assistant", "content": "the cat"}


def trained(rows: Any, tokenizer: Any, **options: Any) -> list[tuple[str, str]]:
    """Returns the text of each prepared row, and the trained part of it."""
    made = prepare_split(as_dataset(rows), tokenizer, DataSettings(**options), say=lambda line: None).dataset
    decode = tokenizer.decode
    return [(decode(r["input_ids"]), decode([label for label in r["labels"] if label != -100])) for r in made]


def test_prompt_and_completion_may_be_json_text_or_tuples(chat_tokenizer: Any) -> None:
    expected = trained([{"prompt": [USER], "completion": [ANSWER]}], chat_tokenizer)
    assert expected[0][0].startswith("<|im_start|>user\nwhat is your name<|im_end|>")
    assert expected[0][1].strip() == "the cat<|im_end|>"
    text = {"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER])}
    assert trained([text], chat_tokenizer) == expected
    for pair in ({"prompt": (USER,), "completion": (ANSWER,)}, {"prompt": text["prompt"], "completion": [ANSWER]}):
        assert trained([{"x": 1}], chat_tokenizer, formatting_func=lambda row, pair=pair: pair) == expected
    for bad in (None, "no json", '"text"'):
        with pytest.raises(DataFormatError, match=r"ow 1 of the train dataset: `completion` is"):
            trained([text, {**text, "completion": bad}], chat_tokenizer)


def _streamed(rows: list[dict[str, Any]]) -> Any:
    return IterableDataset.from_generator(lambda: iter(rows))


@pytest.mark.parametrize("flag", [{"train": False}, {"weight": 0}], ids=str)
def test_flags_that_the_first_row_lacks_are_never_ignored(flag: dict[str, Any], chat_tokenizer: Any) -> None:
    pairs = [{"prompt": [USER], "completion": [answer]} for answer in (ANSWER, {**ANSWER, **flag})]
    chats = [{"messages": row["prompt"] + row["completion"]} for row in pairs]
    for rows in (pairs, chats):
        with pytest.raises(DataFormatError, match="Row 1 of the train dataset sets `train`/`weight`"):
            trained(_streamed(rows), chat_tokenizer)
        expected = trained(rows, chat_tokenizer, assistant_only_loss=True)
        assert [part for _, part in expected] == ["the cat<|im_end|>"], "the row without a trained answer is left out"
        assert trained(_streamed(rows), chat_tokenizer, assistant_only_loss=True) == expected


def test_the_end_of_an_answer_that_is_not_trained_is_not_expected(chat_tokenizer: Any) -> None:
    turns = [USER, ANSWER, USER, {**ANSWER, "train": False}]
    for row in ({"messages": turns}, {"prompt": turns[:1], "completion": turns[1:]}):
        audit = prepare_split(as_dataset([row]), chat_tokenizer, DataSettings(), say=lambda line: None).audit
        assert audit.num_stop_expected == 0


def test_columns_that_only_later_rows_have_are_not_lost(chat_tokenizer: Any) -> None:
    chat_tokenizer.chat_template = "{{ tools }}" + chat_tokenizer.chat_template
    rows = [{"messages": [USER, ANSWER]}, {"messages": [USER, ANSWER], "tools": [{"name": "add"}]}]
    texts = [text for text, _ in trained(rows, chat_tokenizer)]
    assert texts[1].startswith("[{'name': 'add'}]")
    made = trained([{"n": 0}, {"n": 1}], chat_tokenizer, formatting_func=lambda row: rows[row["n"]])
    assert [text for text, _ in made] == texts
    with pytest.raises(DataFormatError, match="Row 1 of a list of rows is `str`"):
        as_dataset([{"text": "a"}, "b"])


@pytest.mark.parametrize("kind", ["torch", "numpy"])
@pytest.mark.parametrize(
    "row", [{"text": "a"}, {"messages": [USER, ANSWER]}, {"input_ids": [5, 6], "labels": [-100, 6]}], ids=str
)
def test_streams_with_a_format_are_read_as_plain_ones(row: dict[str, Any], kind: str, chat_tokenizer: Any) -> None:
    stream = as_dataset([row] * 2).to_iterable_dataset()
    assert trained(stream.with_format(kind), chat_tokenizer) == trained(stream, chat_tokenizer)


@pytest.mark.parametrize("late", [{"input_ids": [5, 6], "labels": [5, 6]}, {"text": "a"}, "a", [USER]], ids=str)
def test_formatted_rows_are_all_of_one_kind(late: Any, chat_tokenizer: Any) -> None:
    for first in ({"input_ids": [5, 6]}, {"prompt": "a", "completion": "b"}):
        with pytest.raises(DataFormatError, match=r"`formatting_func` makes `.*` of row 0, but `.*` of row 1"):
            trained([{"n": 0}, {"n": 1}], chat_tokenizer, formatting_func=lambda row, all=(first, late): all[row["n"]])
