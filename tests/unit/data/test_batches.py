"""Whole rows through the preparation: which of their tokens are trained."""

import json
from typing import Any

import pytest

from finetune.data.pipeline import as_dataset, prepare_split
from finetune.data.settings import DataSettings
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
        with pytest.raises(DataFormatError, match=r"ow 1 of the train data set: `completion` is"):
            trained([text, {**text, "completion": bad}], chat_tokenizer)
