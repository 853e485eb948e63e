"""Calling `formatting_func`, which makes text, messages or another row of each row before anything else is done."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from finetune.data.chat import is_message_list
from finetune.data.formats import Columns
from finetune.data.rows import type_name
from finetune.errors import DataFormatError


def apply_formatting(batch: Columns, rows: Sequence[int], function: Callable[[dict[str, Any]], Any]) -> Columns:
    """Returns the columns that `formatting_func` makes of a batch: `text`, `messages`, or those of the rows it returns.

    The function gets one row as a dictionary and returns text, a list of messages, or a row.
    """
    made: list[dict[str, Any]] = []
    for position, row in enumerate(rows):
        result = function({key: values[position] for key, values in batch.items()})
        if isinstance(result, Mapping):
            made.append(dict(result))
        elif is_message_list(result) or is_message_list(result, ("from", "value")):
            made.append({"messages": result})
        elif isinstance(result, str):
            made.append({"text": result})
        else:
            raise DataFormatError(
                f"`formatting_func` returned {type_name(result)} for row {row}. It is called with one row and must "
                "return text, a list of messages, or a dictionary."
            )
    return {key: [row.get(key) for row in made] for key in (made[0] if made else {})}


def formatted_row(
    row: Mapping[str, Any], function: Callable[[dict[str, Any]], Any] | None, text_field: str
) -> tuple[dict[str, Any], str]:
    """Returns what `formatting_func` makes of one row, and the column of its text. Rows with `input_ids` stay."""
    if function is None or "input_ids" in row:
        return dict(row), text_field
    made = apply_formatting({key: [value] for key, value in row.items()}, [0], function)
    return {key: values[0] for key, values in made.items()}, "text" if "text" in made else text_field
