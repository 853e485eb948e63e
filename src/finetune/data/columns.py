"""Columns of a dataset: which ones the model's `forward` takes, dropping the others, how long the lists in one are."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from torch import nn

from finetune.errors import DataFormatError
from finetune.wrappers import unwrap_peft

logger = logging.getLogger(__name__)

Collator = Callable[[list[Any]], Any]


def signature_columns(model: nn.Module, label_names: Iterable[str] = ()) -> list[str]:
    """Returns the argument names of `model.forward`, then `label`, `label_ids` and `label_names`.

    A PEFT model is looked through: its own `forward` takes `**kwargs` and would tell nothing. `label` and
    `label_ids` are kept because the default collator renames them to `labels`.
    Agrees with `transformers.Trainer._set_signature_columns_if_needed`, in a fixed order.
    """
    names = list(inspect.signature(unwrap_peft(model).forward).parameters)
    return list(dict.fromkeys([*names, "label", "label_ids", *label_names]))


def remove_unused_columns(
    dataset: Any, columns: Iterable[str], *, description: str | None = None, model_name: str = "the model"
) -> Any:
    """Returns a `datasets.Dataset` or `IterableDataset` with only `columns` left; O(1), no row is read.

    A stream that does not know its column names is returned as it is; wrap its collator instead
    (`collator_with_columns`). Raises `DataFormatError` when no column would be left, naming the ones found.
    """
    found = dataset.column_names
    if found is None:
        return dataset
    wanted = list(columns)
    ignored = [name for name in found if name not in wanted]
    if len(ignored) == len(found):
        raise DataFormatError(_nothing_left(found, wanted, description, model_name))
    if ignored:
        _say_ignored(ignored, description, model_name)
        dataset = dataset.remove_columns(ignored)
    return dataset


def collator_with_columns(
    collator: Collator, columns: Iterable[str], *, description: str | None = None, model_name: str = "the model"
) -> Collator:
    """Returns a collator that drops, from each mapping it is given, the keys not in `columns`.

    For datasets without column names (torch datasets, streams of dictionaries). Features that are no mappings
    pass through untouched. Picklable, so worker processes can receive it.
    """
    return ColumnFilter(collator, columns, description=description, model_name=model_name)


class ColumnFilter:
    """A collator around another one, see `collator_with_columns`."""

    def __init__(
        self, collator: Collator, columns: Iterable[str], *, description: str | None = None, model_name: str
    ) -> None:
        self.data_collator = collator
        self.signature_columns = list(columns)
        self.description = description
        self.model_name = model_name
        self._kept = frozenset(self.signature_columns)
        self._said = False

    def __call__(self, features: list[Any]) -> Any:
        return self.data_collator([self._filter(feature) for feature in features])

    def _filter(self, feature: Any) -> Any:
        if not isinstance(feature, Mapping):
            return feature
        if feature.keys() <= self._kept:
            return dict(feature)
        kept = {name: value for name, value in feature.items() if name in self._kept}
        if not kept:
            raise DataFormatError(
                _nothing_left(list(feature), self.signature_columns, self.description, self.model_name)
            )
        if not self._said:
            _say_ignored([str(name) for name in feature if name not in kept], self.description, self.model_name)
            self._said = True
        return kept


def _where(description: str | None) -> str:
    return f" of the {description.lower()} set" if description else ""


def _say_ignored(ignored: list[str], description: str | None, model_name: str) -> None:
    logger.info(
        "Columns%s that `%s.forward` does not take are dropped: %s.",
        _where(description),
        model_name,
        ", ".join(ignored),
    )


def _nothing_left(found: Iterable[str], wanted: Iterable[str], description: str | None, model_name: str) -> str:
    return (
        f"No column{_where(description)} is an argument of `{model_name}.forward`. "
        f"Found: {', '.join(map(str, found)) or 'none'}. The model takes: {', '.join(wanted)}. "
        "Tokenise or rename the columns, or keep all of them for your own collator with `remove_unused_columns=False`."
    )


def list_lengths(dataset: Any, column: str) -> np.ndarray:
    """Returns the length of each row's list in `column` of a `datasets.Dataset`, (rows,) int64, without reading it."""
    chunks = dataset.data.column(column).chunks
    # A missing list counts as empty; `diff` of offsets would be right too, but offsets of slices share a buffer.
    lengths = [np.asarray(chunk.value_lengths().fill_null(0), dtype=np.int64) for chunk in chunks]
    joined = np.concatenate(lengths) if lengths else np.zeros(0, dtype=np.int64)
    if dataset._indices is not None:
        joined = joined[np.asarray(dataset._indices.column(0).to_numpy())]
    return joined
