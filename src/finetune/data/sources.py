"""Datasets as users give them: what they may be, their first row, and their rows as plain values."""

import os
from collections.abc import Mapping
from typing import Any

from finetune.data.rows import type_name
from finetune.errors import DataFormatError


def first_row(dataset: Any, name: str = "train") -> dict[str, Any]:
    """Returns the first row of a dataset or stream without consuming it. Raises `DataFormatError` if there is none."""
    if isinstance(dataset, Mapping):
        splits = ", ".join(map(repr, dataset))
        raise DataFormatError(f"The {name} dataset is a dictionary of {splits}. Pass the rows under one of these keys.")
    if isinstance(dataset, str | os.PathLike):
        raise DataFormatError(
            f"The {name} dataset is {os.fspath(dataset)!r}, a name. Load it first: `datasets.load_dataset(...)`."
        )
    try:
        row = next(iter(dataset), None)
    except UnicodeDecodeError as error:
        raise DataFormatError(f"Row 0 of the {name} dataset holds text that is not UTF-8: {error}.") from error
    if row is None:
        raise DataFormatError(f"The {name} dataset is empty. Give it at least one row.")
    if not isinstance(row, Mapping):
        raise DataFormatError(f"The rows of the {name} dataset are `{type(row).__name__}`, expected dictionaries.")
    return dict(row)


def plain_rows(dataset: Any, name: str) -> Any:
    """Returns a map-style dataset whose rows are Python values, whatever format it was set to."""
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        raise DataFormatError(
            f"The {name} dataset is a `{type(dataset).__name__}`, expected a `datasets.Dataset`, `IterableDataset` or "
            "a list of rows. Convert it (`Dataset.from_list(list(rows))`), or give rows with `input_ids` and `labels` "
            "and set `dataset_kwargs={'skip_prepare_dataset': True}`."
        )
    if dataset.format["type"] == "custom":
        raise DataFormatError(
            f"The {name} dataset uses `set_transform`, which would be run once and frozen into the tokens. Apply it "
            "with `map` first, or pass `dataset_kwargs={'skip_prepare_dataset': True}`."
        )
    return dataset if dataset.format["type"] is None else dataset.with_format(None)


def is_iterable_dataset(dataset: Any) -> bool:
    """Returns whether rows come as a stream that can be mapped, a `datasets.IterableDataset`.

    `position.is_stream` also holds for torch's, which give rows and nothing else.
    """
    from datasets import IterableDataset

    return isinstance(dataset, IterableDataset)


def as_dataset(rows: Any) -> Any:
    """Returns a `datasets.Dataset` with the columns of all rows for a list of dictionaries; anything else as it is."""
    if not isinstance(rows, list):
        return rows
    from datasets import Dataset

    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataFormatError(f"Row {number} of a list of rows is {type_name(row)}, expected a dictionary.")
    columns = dict.fromkeys(key for row in rows for key in row)  # `Dataset.from_list` would take those of the first
    return Dataset.from_dict({column: [row.get(column) for row in rows] for column in columns})
