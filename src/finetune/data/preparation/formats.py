"""Recognise what kind of rows a dataset has, and read a batch of them into clean Python values.

Every error names the row, the column and what was found there, so that a bad row among a million can be repaired.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from finetune.data.chat.messages import is_message_list, parse_json_column
from finetune.data.chat.roles import KNOWN_ROLES, ROLE_ALIASES, known_role
from finetune.data.rows import Conversations, fail, type_name
from finetune.errors import DataFormatError, nearest, ticked

Columns = Mapping[str, Sequence[Any]]

_CUSTOM_PAIRS = (("instruction", "output"), ("instruction", "response"), ("question", "answer"), ("query", "response"))


class Kind(str, Enum):
    """What one row of a dataset is."""

    TEXT = "text"
    PROMPT_COMPLETION = "prompt-completion"
    CHAT_PROMPT_COMPLETION = "prompt-completion as messages"
    CHAT = "messages"
    TOKENIZED = "tokenized"
    PACKED = "packed"


@dataclass(frozen=True)
class RowFormat:
    """The kind of the rows and the column that holds text or messages (the prompt's, for prompt-completion)."""

    kind: Kind
    column: str

    def describe(self, columns: Sequence[str]) -> str:
        """Returns the line printed at the start, for instance ``columns `a`, `text` read as text (`text`)``."""
        return f"columns {ticked(columns)} read as {self.kind.value} (`{self.column}`)"

    @property
    def is_chat(self) -> bool:
        """Whether rows hold messages."""
        return self.kind in (Kind.CHAT, Kind.CHAT_PROMPT_COMPLETION)

    @property
    def has_completion(self) -> bool:
        """Whether rows have a border between prompt and completion, which can mismatch."""
        return self.kind in (Kind.PROMPT_COMPLETION, Kind.CHAT_PROMPT_COMPLETION)

    @property
    def has_tokens(self) -> bool:
        """Whether rows come as token ids."""
        return self.kind in (Kind.TOKENIZED, Kind.PACKED)

    def can_mask_prompt(self, row: Mapping[str, Any]) -> bool:
        """Returns whether rows like `row` tell what is not the completion, for `completion_only_loss=True`."""
        return self.has_completion or (self.has_tokens and ("labels" in row or "completion_mask" in row))

    def can_mask_turns(self, row: Mapping[str, Any]) -> bool:
        """Returns whether rows like `row` tell what the assistant says, for `assistant_only_loss=True`."""
        return self.is_chat or (self.has_tokens and ("labels" in row or "assistant_masks" in row))

    def masks_prompt(self, row: Mapping[str, Any], wanted: bool | None) -> bool:
        """Returns whether prompts are not trained: as `wanted`, or if None where rows tell what the completion is."""
        if wanted is not None:
            return wanted
        return self.has_completion or (self.has_tokens and "completion_mask" in row)


def detect_format(row: Mapping[str, Any], dataset_text_field: str = "text", name: str = "train") -> RowFormat:
    """Returns the format of a dataset whose first row is `row`.

    Tokenized rows win over prompt-completion, which wins over messages, which win over text. Raises `DataFormatError`
    naming the columns found, the columns expected and the nearest match.

    >>> detect_format({"prompt": "2+2=", "completion": " 4"}).kind.value
    'prompt-completion'
    """
    columns = list(row)
    if "input_ids" in row:
        return RowFormat(Kind.PACKED if "seq_lengths" in row else Kind.TOKENIZED, "input_ids")
    if "prompt" in row and "completion" in row:
        pair = (row["prompt"], row["completion"])
        chat = [_holds_messages(value) for value in pair]
        # Of two texts, one may well be JSON about people and their roles.
        are_texts = all(isinstance(value, str) for value in pair)
        if chat[0] != chat[1] and not are_texts and None not in pair:
            raise DataFormatError(
                f"The {name} dataset mixes text and messages: `prompt` is {type_name(row['prompt'])} and "
                f"`completion` is {type_name(row['completion'])}. Give both as text or both as lists of messages."
            )
        is_chat = all(chat) if are_texts else chat[0]
        return RowFormat(Kind.CHAT_PROMPT_COMPLETION if is_chat else Kind.PROMPT_COMPLETION, "prompt")
    for column in ("messages", "conversations"):
        if column in row:
            return RowFormat(Kind.CHAT, column)
    if dataset_text_field in row:
        chat_like = _holds_messages(row[dataset_text_field])
        return RowFormat(Kind.CHAT if chat_like else Kind.TEXT, dataset_text_field)
    raise DataFormatError(_unknown_columns(columns, dataset_text_field, name))


def _unknown_columns(columns: list[str], text_field: str, name: str) -> str:
    message = (
        f"The {name} dataset has the columns {ticked(columns)}. Expected one of: `{text_field}` (the column named by "
        "`dataset_text_field`), `prompt` and `completion`, `messages`, `conversations`, or `input_ids`."
    )
    if "prompt" in columns or "completion" in columns:
        missing = "completion" if "prompt" in columns else "prompt"
        return f"{message} `{missing}` is missing: rename the column that holds it."
    for prompt, completion in _CUSTOM_PAIRS:
        if prompt in columns and completion in columns:
            return (
                f"{message} Rename `{prompt}` to `prompt` and `{completion}` to `completion`, or pass "
                "`formatting_func` to build one text from each row."
            )
    for wanted in (text_field, "messages", "conversations", "prompt", "completion", "input_ids"):
        close = nearest(wanted, columns)
        if close:
            fix = "Set `dataset_text_field` to it" if wanted == text_field else f"Rename it to `{wanted}`"
            return f"{message}{close} {fix}, or pass `formatting_func`."
    return f"{message} Set `dataset_text_field` to the column with the text, or pass `formatting_func`."


def read_texts(batch: Columns, column: str, rows: Sequence[int], name: str = "train") -> list[str]:
    """Returns the texts of a column. Raises `DataFormatError` with the row index for anything that is not `str`."""
    if column not in batch:
        raise DataFormatError(f"The {name} dataset has no column `{column}` from row {rows[0]} on.")
    texts = list(batch[column])
    for row, text in zip(rows, texts, strict=True):
        if type(text) is not str:
            fail(row, name, f"`{column}` is {type_name(text)}, expected text", "Remove or repair the row.")
    return texts


def read_conversations(
    batch: Columns, columns: str | tuple[str, ...], rows: Sequence[int], name: str = "train"
) -> Conversations:
    """Returns the clean conversations of a column: no empty values, `train`/`weight` taken out.

    The messages of several columns follow each other in one conversation per row. Accepts lists or JSON text,
    `role`/`content` or `from`/`value`; names under `from` become the usual ones (`human` is `user`). Raises
    `DataFormatError` with the row index.
    """
    columns = (columns,) if isinstance(columns, str) else columns
    for column in columns:
        if column not in batch:
            raise DataFormatError(f"The {name} dataset has no column `{column}` from row {rows[0]} on.")
    read = Conversations([], [], [], [])
    tools = batch.get("tools") or [None] * len(rows)
    kwargs = batch.get("chat_template_kwargs") or [None] * len(rows)
    values = zip(*(batch[column] for column in columns), strict=True)
    for row, row_values, row_tools, row_kwargs in zip(rows, values, tools, kwargs, strict=True):
        messages, train = _read_messages(dict(zip(columns, row_values, strict=True)), row, name)
        where = f"row {row} of the {name} dataset"
        read.messages.append(messages)
        read.train.append(train)
        read.tools.append(_read_tools(row_tools, where))
        row_kwargs = parse_json_column(row_kwargs, "chat_template_kwargs", where)
        read.template_kwargs.append(_drop_none(row_kwargs) if row_kwargs else None)
    return read


def _read_messages(values: Mapping[str, Any], row: int, name: str) -> tuple[list[dict[str, Any]], list[float] | None]:
    found: list[tuple[Any, bool]] = []  # each message, and whether it stood in JSON text
    for column, value in values.items():
        chat = parse_json_column(value, column, f"row {row} of the {name} dataset")
        if not isinstance(chat, (list, tuple)):
            fail(row, name, f"`{column}` is {type_name(chat)}, expected a list of messages", "Repair the row.")
        found += [(message, isinstance(value, str)) for message in chat]
    where = ticked(list(values))
    if not found:
        fail(row, name, f"{where} is an empty list, expected at least one message", "Remove the row.")
    messages: list[dict[str, Any]] = []
    train: list[float] = []
    flagged = False
    for turn, (message, is_json) in enumerate(found):
        if not isinstance(message, Mapping):
            fail(row, name, f"message {turn} of {where} is {type_name(message)}, expected a dictionary", "")
        clean, trained = _read_message(message, turn, row, name, is_json)
        messages.append(clean)
        if clean["role"] == "assistant":
            train.append(1.0 if trained is None else trained)
            flagged = flagged or trained is not None
        elif trained and message.get("train"):
            fail(row, name, f"message {turn} has `train: true` and the role `{clean['role']}`", _TRAIN_HELP)
    return messages, train if flagged else None


_TRAIN_HELP = "Only assistant messages can be trained; set `train` to false or leave it out."


def _read_message(
    message: Mapping[str, Any], turn: int, row: int, name: str, is_json: bool
) -> tuple[dict[str, Any], float | None]:
    clean = {key: value for key, value in message.items() if value is not None}
    trained = _read_train_flag(clean, turn, row, name)
    is_sharegpt = "role" not in clean
    role = clean.pop("from", None) if is_sharegpt else clean.pop("role")
    if "content" not in clean and "value" in clean:
        clean["content"] = clean.pop("value")
    if not isinstance(role, str):
        found = f"has the keys {ticked(list(message))} and no role" if role is None else f"has the role {role!r}"
        fail(row, name, f"message {turn} {found}", f"`role` must be text, such as {ticked(KNOWN_ROLES)}.")
    role = known_role(role, alias=is_sharegpt)
    content = clean.get("content")
    if content is None and not clean.get("tool_calls"):
        fail(row, name, f"message {turn} (`{role}`) has no `content`", "Give it text, or `tool_calls`.")
    if content is not None and not isinstance(content, str) and not _is_block_list(content):
        fail(row, name, f"`content` of message {turn} (`{role}`) is {type_name(content)}", "Expected text.")
    # Arrow gives every dictionary the keys of its neighbours. What JSON text has as null was written by someone.
    for key in () if is_json else ("content", "tool_calls"):
        if key in clean:
            clean[key] = _drop_none(clean[key])
    return {"role": role, **clean}, trained


def _read_train_flag(message: dict[str, Any], turn: int, row: int, name: str) -> float | None:
    train, weight = message.pop("train", None), message.pop("weight", None)
    if weight is not None and not (isinstance(weight, (int, float)) and 0 <= weight < math.inf):
        allowed = "Allowed: numbers from 0 (not trained) on; 1 is the weight of other turns."
        fail(row, name, f"message {turn} has `weight` {weight!r}", allowed)
    if train is not None and train not in (True, False):
        fail(row, name, f"message {turn} has `train` {train!r}", "Allowed: true and false.")
    if train is None and weight is None:
        return None
    return 0.0 if train is not None and not train else float(1 if weight is None else weight)


def _read_tools(value: Any, where: str) -> list[Any] | None:
    if isinstance(value, str):
        value = parse_json_column(value, "tools", where)
    elif value is not None:
        value = _drop_none(value)
    if not value:
        return None
    if not isinstance(value, list):
        raise DataFormatError(f"{where}: `tools` is {type_name(value)}, expected a list of tool schemas.")
    return value


def _drop_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _drop_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_drop_none(item) for item in value]
    return value


def _holds_messages(value: Any) -> bool:
    if isinstance(value, str):
        return value.lstrip().startswith("[") and '"role"' in value and _is_message_text(value)
    return is_message_list(value) or is_message_list(value, ("from", "value")) or value == []


def _is_message_text(text: str) -> bool:
    """Returns whether text is a conversation in JSON, and not JSON in which something has a role."""
    try:
        items = json.loads(text)
    except ValueError:
        return False
    if not is_message_list(items) or not all(isinstance(item, dict) and "role" in item for item in items):
        return False
    speaks = all("content" in item or "tool_calls" in item for item in items)
    return speaks and any(item["role"] in (*KNOWN_ROLES, *ROLE_ALIASES) for item in items)


def _is_block_list(content: Any) -> bool:
    return isinstance(content, (list, tuple)) and all(isinstance(block, Mapping) for block in content)
