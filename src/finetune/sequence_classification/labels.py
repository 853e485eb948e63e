"""What the labels mean: classes, several classes per row, or numbers; their ids, and how much each class counts."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from finetune.data.rows import IGNORE_INDEX
from finetune.data.sources import first_row, is_iterable_dataset
from finetune.errors import ArgumentError, DataFormatError, first_nearest, nearest, ticked

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
LABELS = ("label", "labels", "target", "class", "category")


@dataclass(frozen=True)
class Task:
    """What the labels mean.

    `names` are the classes by id (the outputs, for regression), `ids` maps every spelling of a class to its id,
    `counts` are the training rows of each class and `num_rows` all training rows; unknown (None, 0) for a stream.
    """

    problem_type: str
    names: tuple[str, ...]
    ids: Mapping[Any, int] = field(default_factory=dict)
    counts: tuple[int, ...] | None = None
    num_rows: int = 0

    def describe(self) -> str:
        """Returns the line printed at the start, for instance ``2 classes: no 75%, yes 25%``."""
        if self.problem_type == REGRESSION:
            return "regression" if len(self.names) == 1 else f"regression of {len(self.names)} numbers"
        kind = "classes" if self.problem_type == SINGLE else "labels, several per row"
        shares = [""] * len(self.names)
        if self.counts is not None and self.num_rows:
            shares = [f" {count / self.num_rows:.0%}" for count in self.counts]
        shown = [f"{name}{share}" for name, share in zip(self.names, shares, strict=True)]
        more = [f"and {len(shown) - 10} more"] if len(shown) > 12 else []
        return f"{len(shown)} {kind}: {', '.join([*(shown[:10] if more else shown), *more])}"


def read_task(
    dataset: Any,
    column: str | None,
    *,
    problem_type: str | None = None,
    class_names: Sequence[str] | None = None,
    model_labels: Mapping[int, str] | None = None,
) -> Task:
    """Returns what the labels of the training data mean.

    `model_labels` are the classes the model already tells apart (`id2label`); they are kept where the data has the
    same ones. Raises `DataFormatError` for labels that are missing, mixed, or of one class only.
    """
    row = first_row(dataset)
    if column is None:
        raise DataFormatError(
            f"The training data has no labels; its columns are {ticked(row)}. Expected one of {ticked(LABELS)}."
            f"{first_nearest(LABELS, row)} Name it with `label_column`."
        )
    feature = feature_of(dataset, column)
    names = list(getattr(feature, "names", None) or class_names or [])
    stream = is_iterable_dataset(dataset)
    values = [row[column]] if stream else list(dataset.with_format(None)[column])
    _refuse_missing(values, column)
    kind = problem_type or _kind_of(values)
    if kind == REGRESSION:
        outputs = len(values[0]) if isinstance(values[0], (list, tuple)) else 1
        return Task(REGRESSION, tuple(f"LABEL_{i}" for i in range(outputs)), num_rows=0 if stream else len(values))
    if kind == MULTI and not names and _is_multi_hot(values):
        width = len(values[0])
        of_model = model_labels if model_labels and len(model_labels) == width else None
        names = list(of_model.values()) if of_model else [str(index) for index in range(width)]
        totals = tuple(int(count) for count in np.asarray(values, dtype=float).sum(0)) if not stream else None
        return Task(MULTI, tuple(names), {}, totals, 0 if stream else len(values))
    if stream and not names:
        raise DataFormatError(
            f"The classes in `{column}` cannot be counted in a stream. Name all of them with `class_names`, or make "
            "the column a `datasets.ClassLabel`."
        )
    flat = [item for value in values for item in value] if kind == MULTI else values
    ids = _class_ids(flat, names, model_labels)
    ordered = {index: name for name, index in ids.items() if isinstance(name, str)}
    task = Task(kind, tuple(ordered[index] for index in range(len(ordered))), ids)
    if stream:
        return task
    hits = np.bincount(_lookup(flat, task, column, "train", feature), minlength=len(ordered))
    if kind == SINGLE and np.count_nonzero(hits) < 2:
        raise DataFormatError(
            f"All rows of the training data have the same label in `{column}` ({flat[0]!r}): there is nothing to learn."
        )
    return Task(kind, task.names, ids, tuple(map(int, hits)), len(values))


def feature_of(dataset: Any, column: str | None) -> Any:
    """Returns the feature of `datasets` in a column, that of its items for a column of lists; None if unknown."""
    feature = (getattr(dataset, "features", None) or {}).get(column)
    return getattr(feature, "feature", feature)


def _refuse_missing(values: Sequence[Any], column: str) -> None:
    for row, value in enumerate(values):
        if value is None or (isinstance(value, float) and np.isnan(value)):
            raise DataFormatError(f"Row {row} of the training data has no label in `{column}`. Remove or repair it.")


def _kind_of(values: Sequence[Any]) -> str:
    kinds = {type(value) for value in values}
    if kinds <= {list, tuple}:
        items = {type(item) for value in values for item in value}
        return REGRESSION if float in items and not _is_multi_hot(values) else MULTI
    if kinds <= {float} or kinds == {float, int}:
        return REGRESSION
    if len(kinds) == 1 and kinds <= {int, str, bool}:
        return SINGLE
    raise DataFormatError(f"The labels are of mixed types: {', '.join(sorted(kind.__name__ for kind in kinds))}.")


def _is_multi_hot(values: Sequence[Any]) -> bool:
    """Returns whether labels are lists of one length that hold only 0 and 1."""
    return len({len(value) for value in values}) == 1 and all(item in (0, 1) for value in values for item in value)


def _class_ids(values: Iterable[Any], names: list[str], model_labels: Mapping[int, str] | None) -> dict[Any, int]:
    """Returns the id of every class, under its name and under the value that stands for it in the data."""
    known = {str(name): int(index) for index, name in (model_labels or {}).items()}
    if names:
        if set(names) == set(known):
            return {**known, **{index: known[name] for index, name in enumerate(names)}}
        return {**{name: index for index, name in enumerate(names)}, **{index: index for index in range(len(names))}}
    found = sorted(set(values))
    if found and all(isinstance(value, int) for value in found):
        if known and found[0] >= 0 and found[-1] < len(known):
            return {**known, **{index: index for index in range(len(known))}}
    elif set(map(str, found)) == set(known):
        return known
    return {key: index for index, value in enumerate(found) for key in (str(value), value)}


def _lookup(values: Sequence[Any], task: Task, column: str, name: str, feature: Any = None) -> list[int]:
    """Returns the ids of classes. Raises `DataFormatError` for one that the training data does not have."""
    names = getattr(feature, "names", None)
    out = []
    for row, value in enumerate(values):
        key = names[value] if names and isinstance(value, int) and 0 <= value < len(names) else value
        index = task.ids.get(key, task.ids.get(str(key)))
        if index is None:
            raise DataFormatError(
                f"Label {row} in `{column}` of the {name} dataset is {value!r}, which is none of the "
                f"{len(task.names)} classes: {', '.join(task.names[:20])}.{nearest(str(key), task.names)} "
                "Name all classes with `class_names`."
            )
        out.append(index)
    return out


def encode_labels(values: Sequence[Any], task: Task, column: str, name: str, feature: Any = None) -> list[Any]:
    """Returns labels as the loss wants them: ids, lists of 0.0 and 1.0, or floats.

    With the classes a, b, c: "b" is 1, and ["a", "c"] is [1.0, 0.0, 1.0].
    """
    inner = getattr(feature, "feature", feature)
    if task.problem_type == SINGLE:
        return _lookup(values, task, column, name, inner)
    try:
        if task.problem_type == REGRESSION:
            numbers = np.asarray(values, dtype=np.float64)
            if not np.isfinite(numbers).all() or (numbers == IGNORE_INDEX).any():
                raise ValueError(f"NaN, infinity and {IGNORE_INDEX} (the mark of `no label`) cannot be learned")
            return numbers.tolist()
        if not task.ids:
            return np.asarray(values, dtype=np.float64).reshape(len(values), len(task.names)).tolist()
    except (TypeError, ValueError) as error:
        raise DataFormatError(f"`{column}` of the {name} dataset cannot be read as numbers: {error}.") from error
    rows = np.zeros((len(values), len(task.names)))
    for row, value in enumerate(values):
        rows[row, _lookup(value, task, column, name, inner)] = 1.0
    return rows.tolist()


def balanced_weights(task: Task, weights: Sequence[float] | str) -> list[float]:
    """Returns the weight of each class, or for several labels per row how much more a positive counts than a negative.

    "balanced" gives every class the same total: rows / (classes x rows of the class), and for several labels per row
    rows without / rows with the label. Numbers for single labels are scaled so that the mean weight of a training row
    is 1: the loss then stays comparable and the same for every batch size. Counts 75, 25: balanced is 0.667, 2.
    """
    if task.problem_type == REGRESSION:
        raise ArgumentError("`class_weights` weighs classes, but the labels are numbers (regression). Drop it.")
    if task.counts is None:
        raise ArgumentError("`class_weights` needs the number of rows of each class, unknown for a stream. Drop it.")
    counts = np.asarray(task.counts, dtype=np.float64)
    if isinstance(weights, str):
        if (counts == 0).any():
            empty = [name for name, count in zip(task.names, task.counts, strict=True) if not count]
            raise ArgumentError(
                f"`class_weights='balanced'`, but no training row has the class {', '.join(empty[:5])}."
            )
        if task.problem_type == MULTI:
            return ((task.num_rows - counts) / counts).tolist()
        return (counts.sum() / (len(counts) * counts)).tolist()
    if len(weights) != len(counts):
        raise ArgumentError(
            f"`class_weights` has {len(weights)} numbers for {len(counts)} classes: {', '.join(task.names)}."
        )
    given = np.asarray(weights, dtype=np.float64)
    if task.problem_type == MULTI:
        return given.tolist()
    if not (given * counts).sum():
        raise ArgumentError("`class_weights` gives every training row the weight 0. Give one class more.")
    return (given * counts.sum() / (given * counts).sum()).tolist()
