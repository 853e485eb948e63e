"""Which columns hold text and labels, and rows to tokens.

Nothing is guessed silently: what was found is printed, and what cannot be told apart is an error that names the
argument to set.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.data.preparation import cache
from finetune.data.rows import fail, type_name
from finetune.data.sources import first_row, is_iterable_dataset
from finetune.errors import DataFormatError, first_nearest, nearest, ticked
from finetune.sequence_classification.labels import LABELS, SINGLE, Task, encode_labels, feature_of

PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("query", "passage"),
    ("text1", "text2"),
    ("text_a", "text_b"),
)
SINGLES = ("text", "sentence", "content", "review", "document", "tweet", "comment")
_NO_TEXT = ("id", "idx", "guid", "index", "split")


@dataclass(frozen=True)
class Columns:
    """The column of the text or the two of a pair, and that of the labels; None where rows are unlabelled."""

    texts: tuple[str, ...]
    label: str | None


def find_columns(dataset: Any, text_columns: Sequence[str] | None, label_column: str | None, name: str) -> Columns:
    """Returns the columns to read, those named or those found. Raises `DataFormatError` naming the columns there are.

    A pair of known names wins over a single one, which wins over the only column of strings.
    """
    row = first_row(dataset, name)
    asked = {"text_columns": text_columns or (), "label_column": [label_column] if label_column else ()}
    for argument, wanted in asked.items():
        missing = [column for column in wanted if column not in row]
        if missing and not (argument == "label_column" and name != "train"):
            raise DataFormatError(
                f"`{argument}` names `{missing[0]}`, but the {name} dataset has the columns {ticked(row)}."
                f"{nearest(str(missing[0]), row)}"
            )
    label = label_column if label_column in row else None
    if label_column is None:
        label = next((column for column in LABELS if column in row), None) or _class_label_column(dataset)
    if text_columns:
        return Columns(tuple(text_columns), label)
    if "input_ids" in row:
        return Columns((), label)
    for pair in PAIRS:
        if all(isinstance(row.get(column), str) for column in pair):
            return Columns(pair, label)
    single = next((column for column in SINGLES if isinstance(row.get(column), str)), None)
    if single is not None:
        return Columns((single,), label)
    strings = [key for key, value in row.items() if isinstance(value, str) and key != label and key not in _NO_TEXT]
    if len(strings) == 1:
        return Columns((strings[0],), label)
    close = first_nearest((*SINGLES[:2], *PAIRS[0]), row)
    found = "several columns of text" if strings else "no column of text"
    raise DataFormatError(
        f"The {name} dataset has {found}; its columns are {ticked(row)}.{close} Name the text with `text_columns` "
        "(one column, or the two of a pair)."
    )


def _class_label_column(dataset: Any) -> str | None:
    features = getattr(dataset, "features", None) or {}
    found = [column for column, feature in features.items() if type(feature).__name__ == "ClassLabel"]
    return found[0] if len(found) == 1 else None


def prepare_rows(
    dataset: Any, tokenizer: Any, columns: Columns, task: Task, max_length: int | None, name: str, num_proc: int | None
) -> Any:
    """Returns the dataset with `input_ids`, what else the tokenizer gives, `length` and, if there are any, `labels`.

    Test sets of public benchmarks carry -1 (or nothing) in place of every label; these count as unlabelled.
    """
    label = columns.label
    if label is not None and name != "train" and not is_iterable_dataset(dataset):
        values = list(dataset.with_format(None)[label])
        unlabelled = (None, -1) if task.problem_type == SINGLE and -1 not in task.ids else (None,)
        label = None if all(not isinstance(value, list) and value in unlabelled for value in values) else label
    feature = feature_of(dataset, label)
    dataset = dataset.with_format(None)

    def convert(batch: Mapping[str, Sequence[Any]], rows: Sequence[int]) -> dict[str, Any]:
        made = {
            key: [_cut(values, max_length, tokenizer.truncation_side) for values in batch[key]]
            for key in ("input_ids", "attention_mask", "token_type_ids")
            if key in batch
        }
        if columns.texts:
            texts = [_texts(batch, column, rows, name) for column in columns.texts]
            made = dict(tokenizer(*texts, truncation=max_length is not None, max_length=max_length))
        made["length"] = [len(ids) for ids in made["input_ids"]]
        for row, length in zip(rows, made["length"], strict=True):
            if not length:
                raise DataFormatError(f"Row {row} of the {name} dataset has no tokens. Remove it.")
        if label is not None:
            made["labels"] = encode_labels(batch[label], task, label, name, feature)
        return made

    if is_iterable_dataset(dataset):
        return dataset.map(convert, batched=True, with_indices=True, remove_columns=list(first_row(dataset, name)))
    parts: dict[str, Any] = {"data": dataset._fingerprint, "tokenizer": cache.tokenizer_digest(tokenizer)}
    parts |= {"columns": [*columns.texts, label], "task": [task.problem_type, task.names], "max_length": max_length}
    parts |= {"side": tokenizer.truncation_side, "made": tokenizer.model_input_names, "version": cache.version()}
    key = cache.fingerprint({**parts, "ids": sorted(map(str, task.ids.items()))})
    path, _ = cache.cache_file(dataset, key, None)
    return dataset.map(
        convert,
        batched=True,
        with_indices=True,
        remove_columns=dataset.column_names,
        num_proc=num_proc,
        new_fingerprint=key,
        cache_file_name=path or cache.kept_nowhere(dataset),
        desc=f"Preparing {name} rows",
    )


def _cut(values: Any, max_length: int | None, side: str) -> Any:
    """Returns the values of a row of tokens that are kept; without `max_length`, or if there are few, all."""
    if max_length is None or len(values) <= max_length:
        return values
    return values[-max_length:] if side == "left" else values[:max_length]


def _texts(batch: Mapping[str, Sequence[Any]], column: str, rows: Sequence[int], name: str) -> list[str]:
    texts = list(batch[column])
    for row, text in zip(rows, texts, strict=True):
        if not isinstance(text, str):
            fail(row, name, f"`{column}` is {type_name(text)}, expected text", "Remove or repair the row.")
    return texts
