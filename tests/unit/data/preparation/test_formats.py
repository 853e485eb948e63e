import json
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from finetune.data.chat import roles
from finetune.data.preparation.formats import Kind, detect_format, read_conversations, read_texts
from finetune.data.preparation.formatting import apply_formatting
from finetune.data.preparation.pipeline import prepare_split
from finetune.data.preparation.settings import DataSettings
from finetune.errors import ArgumentError, DataFormatError, FinetuneError

USER = {"role": "user", "content": "a"}
ASSISTANT = {"role": "assistant", "content": "b"}
CHAT_PAIR = (Kind.CHAT_PROMPT_COMPLETION, "prompt")


@pytest.mark.parametrize(
    ("row", "kind", "column"),
    [
        ({"text": "a"}, Kind.TEXT, "text"),
        ({"text": "a", "prompt": "b"}, Kind.TEXT, "text"),
        ({"prompt": "a", "completion": "b", "text": "c"}, Kind.PROMPT_COMPLETION, "prompt"),
        ({"prompt": [USER], "completion": [ASSISTANT]}, Kind.CHAT_PROMPT_COMPLETION, "prompt"),
        ({"messages": [USER], "text": "c"}, Kind.CHAT, "messages"),
        ({"conversations": [{"from": "human", "value": "a"}]}, Kind.CHAT, "conversations"),
        ({"text": [USER]}, Kind.CHAT, "text"),
        ({"text": '[{"role": "user", "content": "a"}]'}, Kind.CHAT, "text"),
        ({"text": '[{"role": "assistant", "tool_calls": []}, {"role": "tool", "content": ""}]'}, Kind.CHAT, "text"),
        ({"text": '[{"name": "Ann", "role": "CEO"}]'}, Kind.TEXT, "text"),
        ({"text": '[{"role": "CEO", "content": "Ann"}]'}, Kind.TEXT, "text"),
        ({"text": '[{"role": "user", "content": "a"}, 3]'}, Kind.TEXT, "text"),
        ({"text": '[{"role": "user", "content": "a"'}, Kind.TEXT, "text"),
        ({"prompt": "Who?", "completion": '[{"name": "Ann", "role": "CEO"}]'}, Kind.PROMPT_COMPLETION, "prompt"),
        ({"prompt": "Who?", "completion": '[{"role": "user", "content": "a"}]'}, Kind.PROMPT_COMPLETION, "prompt"),
        ({"prompt": '[{"role": "user", "content": "a"}]', "completion": "b"}, Kind.PROMPT_COMPLETION, "prompt"),
        ({"prompt": [USER], "completion": '[{"role": "assistant", "content": "a"}]'}, *CHAT_PAIR),
        ({"input_ids": [1], "text": "c"}, Kind.TOKENIZED, "input_ids"),
        ({"input_ids": [1], "seq_lengths": [1]}, Kind.PACKED, "input_ids"),
    ],
)
def test_recognises(row: dict[str, Any], kind: Kind, column: str) -> None:
    found = detect_format(row)
    assert (found.kind, found.column) == (kind, column)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"txt": "a"}, ["`txt`", "Did you mean `txt`?", "dataset_text_field"]),
        ({"mesages": [USER]}, ["Did you mean `mesages`?", "Rename it to `messages`"]),
        ({"instruction": "a", "output": "b"}, ["Rename `instruction` to `prompt` and `output` to `completion`"]),
        ({"prompt": "a", "answer": "b"}, ["`completion` is missing"]),
        ({"completion": "a"}, ["`prompt` is missing"]),
        ({"x": 1}, ["`x`", "formatting_func"]),
        ({"prompt": "a", "completion": [ASSISTANT]}, ["mixes text and messages"]),
    ],
)
def test_unknown_columns_name_what_was_found_and_what_to_do(row: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(DataFormatError) as error:
        detect_format(row)
    assert all(part in str(error.value) for part in said), str(error.value)


@pytest.mark.parametrize("bad", [None, 3, b"bytes", ["a"], {"a": 1}])
def test_a_text_that_is_none_is_an_error_with_its_row(bad: Any) -> None:
    with pytest.raises(DataFormatError, match=r"Row 12 of the eval dataset: `text` is"):
        read_texts({"text": ["a", bad]}, "text", [11, 12], "eval")


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (None, "expected a list of messages"),
        ("no json", "not valid JSON"),
        ([], "an empty list"),
        (["hello"], "message 0 of `messages` is `str`"),
        ([{"content": "a"}], "no role"),
        ([{"role": 3, "content": "a"}], "has the role 3"),
        ([{"role": "user", "content": None}], "has no `content`"),
        ([{"role": "user", "content": b"a"}], "`content` of message 0 (`user`) is `bytes`"),
        ([{"role": "user", "content": [["nested"]]}], "is `list`"),
        ([{"role": "user", "content": 7}], "is `int`"),
        ([USER, {**ASSISTANT, "weight": -0.5}], "`weight` -0.5"),
        ([USER, {**ASSISTANT, "weight": float("nan")}], "`weight` nan"),
        ([USER, {**ASSISTANT, "weight": "half"}], "`weight` 'half'"),
        ([USER, {**ASSISTANT, "train": "yes"}], "`train` 'yes'"),
        ([{**USER, "train": True}, ASSISTANT], "Only assistant messages can be trained"),
    ],
)
def test_bad_conversations_are_errors_with_their_row(bad: Any, said: str) -> None:
    with pytest.raises(DataFormatError) as error:
        read_conversations({"messages": [[USER, ASSISTANT], bad]}, "messages", [4, 5])
    assert "ow 5 of the train dataset" in str(error.value)
    assert said in str(error.value)


def test_the_template_judges_other_roles(caplog: Any, chat_tokenizer: Any) -> None:
    from datasets import Dataset

    roles._warn_of.cache_clear()
    chats = [[USER, {"role": "document", "content": "x"}, {"role": "assistent", "content": "y"}, ASSISTANT]] * 2
    read = read_conversations({"messages": chats}, "messages", [0, 1])
    assert [message["role"] for message in read.messages[1]] == ["user", "document", "assistent", "assistant"]
    said = [record.getMessage() for record in caplog.records]
    assert [line.partition("`")[2].partition("`")[0] for line in said] == ["document", "assistent"]
    assert said[1].endswith("Did you mean `assistant`?")
    made = prepare_split(Dataset.from_dict({"messages": chats}), chat_tokenizer, DataSettings(), say=lambda line: None)
    assert "<|im_start|>document\nx" in chat_tokenizer.decode(made.dataset[0]["input_ids"])


def test_roles_written_for_a_template_keep_their_names(caplog: Any) -> None:
    roles._warn_of.cache_clear()
    names = ("human", "observation", "gpt")
    written = [{"role": role, "content": "a"} for role in names]
    shared = [{"from": role, "value": "a"} for role in names]
    read = read_conversations({"messages": [written, shared]}, "messages", [0, 1]).messages
    assert [message["role"] for message in read[0]] == list(names)
    assert [message["role"] for message in read[1]] == ["user", "tool", "assistant"]
    assert [record.getMessage().rpartition(". ")[2] for record in caplog.records] == [
        f"If it means `{meant}`, rename it." for meant in ("user", "tool", "assistant")
    ]


def test_a_template_that_refuses_a_role_names_the_roles(chat_tokenizer: Any) -> None:
    from datasets import Dataset

    picky = "{% for m in messages if m.role == 'thought' %}{{ raise_exception('no thoughts') }}{% endfor %}"
    rows = Dataset.from_dict({"messages": [[USER, {"role": "thought", "content": "x"}, ASSISTANT]]})
    with pytest.raises(DataFormatError, match=r"Row 0 .*'user', 'thought', 'assistant'.*no thoughts"):
        prepare_split(rows, chat_tokenizer, DataSettings(chat_template=picky), say=lambda line: None)


def test_conversations_are_cleaned() -> None:
    read = read_conversations(
        {
            "messages": [
                [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0}],
                [{"role": "user", "content": "a", "tool_calls": None}, {**ASSISTANT, "train": None}],
                '[{"role": "user", "content": "a"}]',
            ],
            "tools": [None, [{"name": "f", "parameters": {"x": None, "y": 1}}], '[{"default": null}]'],
            "chat_template_kwargs": [None, {"thinking": None, "depth": 2}, None],
        },
        "messages",
        [0, 1, 2],
    )
    assert read.messages == [[USER, ASSISTANT], [USER, ASSISTANT], [USER]]
    assert read.train == [[False], None, None]
    assert read.tools == [None, [{"name": "f", "parameters": {"y": 1}}], [{"default": None}]]
    assert read.template_kwargs == [None, {"depth": 2}, None]


def test_keys_that_arrow_adds_are_dropped_and_nulls_of_json_stay() -> None:
    blocks = [{"type": "text", "text": "a", "image": None}, {"type": "image", "text": None, "image": "x.png"}]
    calls = [{"function": {"name": "f", "arguments": {"unit": None, "x": 1}}}]
    chat = [{"role": "user", "content": blocks}, {"role": "assistant", "tool_calls": calls}]
    user, assistant = read_conversations({"messages": [chat]}, "messages", [0]).messages[0]
    assert user["content"] == [{"type": "text", "text": "a"}, {"type": "image", "image": "x.png"}]
    assert assistant["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert read_conversations({"messages": [json.dumps(chat)]}, "messages", [0]).messages[0] == chat


def test_formatting_func_may_return_text_messages_or_a_row() -> None:
    batch = {"q": ["a", "c"], "a": ["b", "d"]}
    assert apply_formatting(batch, [0, 1], lambda row: row["q"] + row["a"]) == {"text": ["ab", "cd"]}
    assert apply_formatting(batch, [0, 1], lambda row: [USER])["messages"] == [[USER], [USER]]
    made = apply_formatting(batch, [0, 1], lambda row: {"prompt": row["q"], "completion": row["a"]})
    assert made == {"prompt": ["a", "c"], "completion": ["b", "d"]}
    optional = apply_formatting(batch, [0, 1], lambda row: {"text": "x", **({"tools": "y"} if row["q"] == "c" else {})})
    assert optional == {"text": ["x", "x"], "tools": [None, "y"]}
    with pytest.raises(DataFormatError, match="makes `text` of row 0, but `prompt`, `completion` of row 5"):
        apply_formatting(batch, [4, 5], lambda row: "a" if row["q"] == "a" else made, ["text"])
    with pytest.raises(DataFormatError, match=r"`formatting_func` returned `list` for row 7"):
        apply_formatting({"q": ["a"]}, [7], lambda row: ["a"])


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
messages = st.lists(
    values
    | st.fixed_dictionaries(
        {},
        optional={
            "role": values | st.sampled_from(["user", "assistant"]),
            "content": values | st.text(max_size=5),
            "weight": values | st.sampled_from([0.0, 0.5, 1]),
            "train": values,
        },
    ),
    max_size=3,
)
rows = st.fixed_dictionaries(
    {},
    optional={
        "text": values,
        "prompt": values | messages,
        "completion": values | messages,
        "messages": values | messages,
        "conversations": values | messages,
        "input_ids": values | st.lists(st.integers(-3, 500), max_size=4),
        "labels": values | st.lists(st.integers(-101, 500), max_size=4),
        "completion_mask": values,
        "token_weights": values | st.lists(st.floats(-1, 2), max_size=4),
        "tools": values,
        "chat_template_kwargs": values,
    },
)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(made=st.lists(rows, max_size=3), stream=st.booleans())
def test_no_data_set_ends_in_a_bare_traceback(
    made: list[dict[str, Any]], stream: bool, chat_tokenizer_cached: Any
) -> None:
    """The same through Arrow, which gives messages the keys of their neighbours, and None where they had none."""
    from datasets import Dataset

    from finetune.data.preparation.pipeline import prepare_split

    try:
        data: Any = Dataset.from_list(made)
        data = data.to_iterable_dataset() if stream else data
    except Exception:  # what Arrow cannot hold never becomes a dataset
        assume(False)
        return
    try:
        split = prepare_split(data, chat_tokenizer_cached, DataSettings(max_length=8), say=lambda line: None)
        list(split.dataset)
        split.audit.check()
    except FinetuneError as error:
        assert str(error)
    except UnicodeDecodeError:
        assert stream  # `datasets` reads on before our function is called; only the first rows are read under a guard


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(first=rows, second=rows, assistant_only=st.booleans())
def test_no_row_ends_in_a_bare_traceback(
    first: dict[str, Any], second: dict[str, Any], assistant_only: bool, chat_tokenizer_cached: Any
) -> None:
    from finetune.data.preparation.batches import BatchProcessor

    try:
        options = DataSettings(max_length=8, assistant_only_loss=assistant_only)
        processor = BatchProcessor(chat_tokenizer_cached, options, first)
        batch = {key: [first.get(key), second.get(key)] for key in first}
        processor.process(batch, [0, 1])
    except FinetuneError as error:
        assert str(error)


def test_settings_refuse_what_they_cannot_do() -> None:
    for wrong in ({"max_length": 0}, {"truncation_mode": "middle"}, {"batch_size": 0}):
        with pytest.raises(ArgumentError, match=next(iter(wrong))):
            DataSettings(**wrong)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("row", "options", "said"),
    [
        ({"text": "a"}, {"assistant_only_loss": True}, "`assistant_only_loss=True` needs conversations"),
        ({"prompt": "a", "completion": "b"}, {"assistant_only_loss": True}, "needs conversations"),
        ({"text": "a"}, {"completion_only_loss": True}, "`completion_only_loss=True` needs `prompt` and `completion`"),
        ({"messages": [USER, ASSISTANT]}, {"completion_only_loss": True}, "`completion_only_loss=True` needs"),
        ({"input_ids": [1]}, {"completion_only_loss": True}, "`completion_only_loss=True` needs"),
    ],
)
def test_losses_that_the_rows_cannot_have_are_refused(
    row: dict[str, Any], options: dict[str, Any], said: str, chat_tokenizer: Any
) -> None:
    from datasets import Dataset

    with pytest.raises(DataFormatError) as error:
        prepare_split(Dataset.from_list([row]), chat_tokenizer, DataSettings(**options), say=lambda line: None)
    assert said in str(error.value)


def test_bytes_that_are_no_text_are_named_by_their_row(chat_tokenizer: Any) -> None:
    import pyarrow as pa
    from datasets import Dataset

    from finetune.data.preparation.pipeline import prepare_split

    column = pa.Array.from_buffers(pa.string(), 2, pa.array([b"the cat", b"\x80"]).buffers())
    data = Dataset(pa.table({"text": column}))
    with pytest.raises(DataFormatError, match="Row 1 of the train dataset holds text that is not UTF-8"):
        prepare_split(data, chat_tokenizer, DataSettings(), say=lambda line: None)
    with pytest.raises(DataFormatError, match="Row 0"):
        prepare_split(data.select([1]), chat_tokenizer, DataSettings(), say=lambda line: None)
