"""What a stream of rows is made of: whether it can be resumed, and which row it failed on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from finetune.data.preparation.mapped import StreamFunction
from finetune.data.rows import type_name
from finetune.errors import DataFormatError

_SEARCHED_ROWS = 2000  # behind the last good row: more than are read at once


def stream_nodes(stream: Any) -> Iterator[Any]:
    """Yields the steps that a `datasets.IterableDataset` is made of, the last one first; nothing for other streams."""
    todo = [getattr(stream, "_ex_iterable", None)]
    while todo:
        node = todo.pop()
        if node is not None:
            yield node
            todo += [getattr(node, "ex_iterable", None), *getattr(node, "ex_iterables", ())]


def why_not_resumable(stream: Any) -> str | None:
    """Returns why the state of `stream` does not suffice to resume it exactly, or None when it does."""
    if not (callable(getattr(stream, "state_dict", None)) and callable(getattr(stream, "load_state_dict", None))):
        return f"`{type(stream).__name__}` has no `state_dict` and `load_state_dict`"
    if has_shuffle_buffer(stream):
        return "the state of `datasets.IterableDataset` leaves out the rows waiting in its shuffle buffer"
    return None


def has_shuffle_buffer(stream: Any) -> bool:
    """Returns whether a `datasets.IterableDataset` shuffles through a buffer, whose rows its state leaves out."""
    return any(type(node).__name__.startswith("BufferShuffled") for node in stream_nodes(stream))


def explained_rows(stream: Any) -> Iterator[Any]:
    """Yields the rows of a stream; a row that the library datasets cannot read is an error that names it."""
    try:
        yield from stream
    except (UnicodeDecodeError, TypeError, AttributeError) as error:
        explained = stream_error(stream, error)
        if explained is None:
            raise
        raise explained from error


def stream_error(stream: Any, error: Exception) -> DataFormatError | None:
    """Returns the error that names the raw row on which a prepared stream failed, or None if no row is to blame.

    For failures inside the library datasets: text that is not UTF-8, and rows that are no dictionaries.
    """
    mapped = (getattr(node, "function", None) for node in stream_nodes(stream))
    function = next((each for each in mapped if isinstance(each, StreamFunction)), None)
    if function is None or function.source is None:
        return None
    name, row = function.processor.name, -1
    # Of a stream that is read in blocks, the row is one of the next block.
    try:
        for row, value in enumerate(islice(function.source, function.num_read + _SEARCHED_ROWS)):
            if not isinstance(value, Mapping):
                return DataFormatError(f"Row {row} of the {name} dataset is {type_name(value)}, expected a dictionary.")
    except UnicodeDecodeError:
        pass
    except Exception:
        return None
    if not isinstance(error, UnicodeDecodeError):
        return None
    try:
        row = _undecodable_row(function.source, row + 1)
        where = f"Row {row}"
    except Exception:
        where = f"A row from {row + 1} on"
    return DataFormatError(f"{where} of the {name} dataset holds text that is not UTF-8: {error}. Repair or remove it.")


def _undecodable_row(source: Any, row: int) -> int:
    """Returns the first row from `row` on whose Arrow values Python cannot read."""
    for table in source.with_format("arrow").skip(row).iter(batch_size=1):
        try:
            table.to_pylist()
        except UnicodeDecodeError:
            return row
        row += 1
    raise ValueError("no such row")
