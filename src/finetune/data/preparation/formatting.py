"""Calling `formatting_func`, which makes text, messages or another row of each row before anything else is done."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from finetune.data.chat.messages import is_message_list
from finetune.data.preparation.formats import Columns
from finetune.data.rows import type_name
from finetune.errors import DataFormatError, ticked

# What decides how rows are read, and which of their tokens are trained.
_DECIDING_KEYS = (
    "text", "messages", "conversations", "prompt", "completion", "input_ids", "labels", "completion_mask",
    "assistant_masks", "token_weights", "seq_lengths",
)  # fmt: skip


def apply_formatting(
    batch: Columns, rows: Sequence[int], function: Callable[[dict[str, Any]], Any], first: Collection[str] | None = None
) -> Columns:
    """Returns the columns that `formatting_func` makes of a batch: `text`, `messages`, or those of the rows it returns.

    The function gets one row as a dictionary and returns text, a list of messages, or a row. A key that only some rows
    have (`tools`) is None in the others. With `first`, the keys of the first row of all, `DataFormatError` names a row
    that has other keys of those that decide how rows are read.
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
    for row, columns in zip(rows, made, strict=True) if first is not None else ():
        _check_keys(columns, first or (), row)
    keys = dict.fromkeys(key for row in made for key in row)
    return {key: [row.get(key) for row in made] for key in keys}


def _check_keys(columns: Collection[str], first: Collection[str], row: int) -> None:
    found, expected = ([key for key in _DECIDING_KEYS if key in keys] for keys in (columns, first))
    if found != expected:
        raise DataFormatError(
            f"`formatting_func` makes {ticked(expected) or 'none'} of row 0, but {ticked(found) or 'none'} of row "
            f"{row}. These keys decide how rows are read ({ticked(_DECIDING_KEYS)}): return the same for every row."
        )


def formatted_row(
    row: Mapping[str, Any], function: Callable[[dict[str, Any]], Any] | None, text_field: str
) -> tuple[dict[str, Any], str]:
    """Returns what `formatting_func` makes of one row, and the column of its text. Rows with `input_ids` stay."""
    if function is None or "input_ids" in row:
        return dict(row), text_field
    made = apply_formatting({key: [value] for key, value in row.items()}, [0], function)
    return {key: values[0] for key, values in made.items()}, "text" if "text" in made else text_field
