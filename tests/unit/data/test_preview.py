import re
from typing import Any

import pytest
from datasets import Dataset

from finetune.data.preparation.settings import DataSettings
from finetune.data.preview import preview
from finetune.errors import DataFormatError

ROWS = {"prompt": ["the cat", "the"], "completion": [" sat on a mat", " cat"]}


def test_states_of_the_tokens(chat_tokenizer: Any) -> None:
    made = preview(Dataset.from_dict(ROWS), chat_tokenizer, DataSettings(max_length=4))
    first, second = made.rows
    assert [(p.text, p.state, p.num_tokens) for p in first.pieces] == [
        ("the cat", "not trained", 2),
        (" sat on", "trained", 2),
        (" a mat<|im_end|>", "truncated", 3),
    ]
    assert [p.completion_starts for p in first.pieces] == [False, True, False]
    assert first.describe() == "row 0: 7 tokens, 2 trained, 3 truncated"
    assert [(p.text, p.state) for p in second.pieces] == [("the", "not trained"), (" cat<|im_end|>", "trained")]
    assert made.mask_method == "completion"


def test_the_first_token_of_a_row_is_no_target(chat_tokenizer: Any) -> None:
    """As the audit counts: nothing stands before it that could predict it."""
    row = preview(Dataset.from_dict({"text": ["the cat"]}), chat_tokenizer, DataSettings()).rows[0]
    assert [(p.text, p.state) for p in row.pieces] == [("the", "not trained"), (" cat<|im_end|>", "trained")]
    assert row.describe() == "row 0: 3 tokens, 2 trained, 0 truncated"


def test_keep_end_and_rows_left_out(chat_tokenizer: Any) -> None:
    rows = Dataset.from_dict(ROWS)
    end = preview(rows, chat_tokenizer, DataSettings(max_length=3, truncation_mode="keep_end"), num_rows=1)
    assert [(p.text, p.state) for p in end.rows[0].pieces] == [
        ("the cat", "truncated"),
        (" sat on", "truncated"),
        (" a", "not trained"),
        (" mat<|im_end|>", "trained"),
    ]
    cut = preview(rows, chat_tokenizer, DataSettings(max_length=2), num_rows=1)
    assert cut.rows[0].dropped
    assert "left out" in cut.rows[0].describe()


def test_the_terminal_shows_the_whole_text(chat_tokenizer: Any) -> None:
    made = preview(Dataset.from_dict(ROWS), chat_tokenizer, DataSettings(max_length=4))
    colored = made.to_terminal()
    assert "\033[32m sat on\033[0m" in colored
    assert "\033[9;31m a mat<|im_end|>\033[0m" in colored
    assert "green: trained" in colored and "grey: context" in colored and "red: truncated" in colored
    assert "the cat┃ sat on a mat<|im_end|>" in re.sub(r"\033\[[0-9;]*m", "", colored)
    plain = made.to_terminal(color=False)
    assert "\033" not in plain
    assert plain.splitlines()[1] == "«trained», ~~truncated~~, the rest is context, ┃ completion starts"
    assert "the cat┃« sat on»~~ a mat<|im_end|>~~" in plain


def test_control_characters_and_markup_in_the_data_are_harmless(chat_tokenizer: Any) -> None:
    rows = Dataset.from_dict({"text": ["a\033[2Jb <script>x</script>\nnext"]})
    made = preview(rows, chat_tokenizer, DataSettings(), num_rows=5)
    assert "\033[2J" not in made.to_terminal()
    assert r"a«\x1b[2Jb" in made.to_terminal(color=False)
    page = made.to_html()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert 'class="trained"' in page


def test_streams_and_prepared_rows(chat_tokenizer: Any) -> None:
    rows = Dataset.from_dict(ROWS)
    expected = preview(rows, chat_tokenizer, DataSettings())
    assert preview(rows.to_iterable_dataset(), chat_tokenizer, DataSettings()) == expected
    tokenized = Dataset.from_dict({"input_ids": [[5, 6]], "labels": [[-100, 6]]})
    assert [p.state for p in preview(tokenized, chat_tokenizer, DataSettings()).rows[0].pieces] == [
        "not trained",
        "trained",
    ]


def test_an_empty_data_set_is_an_error(chat_tokenizer: Any) -> None:
    with pytest.raises(DataFormatError, match="empty"):
        preview(Dataset.from_dict({"text": []}), chat_tokenizer, DataSettings())
