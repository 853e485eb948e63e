"""The dataset that `--dataset_name` names, from the Hub, a file or a folder, with one clear error per mistake."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import ArgumentError, DataFormatError, FinetuneError, nearest, one_line

if TYPE_CHECKING:
    from finetune.cli.script_arguments import DatasetConfig, DatasetMixtureConfig, ScriptArguments

# File suffix: the reader of the library datasets.
READERS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}


@dataclass(frozen=True)
class _Arguments:
    """How errors call the argument that names a dataset, the one that names its split, and how to give another."""

    data: str
    split: str
    another: str
    evaluates: bool = False

    @classmethod
    def of_split(cls, argument: str) -> _Arguments:
        evaluates = argument == "dataset_test_split"
        return cls("`dataset_name`", f"`{argument}`", f"Choose another with `--{argument}`.", evaluates)


_OF_MIXTURE = _Arguments(
    "`path` in `datasets`", "`split` in `datasets`", "Choose another with the `split` of this entry of `datasets`."
)


def load_datasets(
    script_args: ScriptArguments, mixture: DatasetMixtureConfig | None = None, *, evaluate: bool
) -> tuple[Any, Any]:
    """Returns the training dataset, and the evaluation dataset if `evaluate` (else None).

    They are those of `mixture` if it lists any, else the one that `script_args` names.
    A single file has one split, `train`; parts of it are named `train[:90%]` and `train[90%:]`.

    Raises:
        ArgumentError: no dataset, two kinds of them, or a split that it does not have.
        DataFormatError: it cannot be read, or a split has no rows.
    """
    check_one_source(script_args, mixture)
    if mixture is not None and mixture.datasets:
        return _load_mixture(mixture, evaluate=evaluate)
    train = _load_split(script_args, "dataset_train_split")
    return train, _load_split(script_args, "dataset_test_split") if evaluate else None


def check_one_source(script_args: ScriptArguments, mixture: DatasetMixtureConfig | None) -> None:
    """Raises `ArgumentError` unless exactly one of `dataset_name` and `datasets` names the data."""
    is_mixed = mixture is not None and bool(mixture.datasets)
    if is_mixed and script_args.dataset_name:
        raise ArgumentError("`dataset_name` and `datasets` both name the data. Keep one.")
    if not is_mixed and not script_args.dataset_name:
        raise ArgumentError("No dataset given. Give a Hub id, a file or a folder: `--dataset_name`.")


def get_dataset(mixture: DatasetMixtureConfig) -> Any:
    """Returns a `DatasetDict` with the mixture as `train`, and `test` with `test_split_size`; as TRL's function.

    Raises:
        ArgumentError: no dataset, shares for some sets only, or an option that streams do not have.
        DataFormatError: a set cannot be read, has no rows, or its columns do not go together with the others'.
    """
    from datasets import DatasetDict, IterableDatasetDict

    sets: list[Any] = list(mixture.datasets)
    if not sets:
        raise ArgumentError("`datasets` is empty. List at least one, with its `path`.")
    parts = _take_shares([_load_part(each, mixture.streaming) for each in sets], [each.fraction for each in sets])
    joined = _concatenate(parts, [each.path for each in sets])
    if mixture.test_split_size is None:
        return (IterableDatasetDict if mixture.streaming else DatasetDict)({"train": joined})
    if mixture.streaming:
        raise ArgumentError("`test_split_size` needs the number of rows. Drop `streaming`, or `test_split_size`.")
    size = mixture.test_split_size
    # A fixed seed: all processes, and a resumed run, must hold out the same rows.
    return joined.train_test_split(test_size=size if size < 1 else int(size), seed=42)


def _load_mixture(mixture: DatasetMixtureConfig, *, evaluate: bool) -> tuple[Any, Any]:
    if evaluate and mixture.test_split_size is None:
        raise ArgumentError(
            "`eval_strategy` asks for evaluation, and the mixture (`datasets`) holds nothing out. Set "
            "`test_split_size`, or `--eval_strategy no`."
        )
    splits = get_dataset(mixture)
    return splits["train"], splits["test"] if evaluate else None


def _load_part(part: DatasetConfig, streaming: bool) -> Any:
    from datasets import load_dataset

    options: dict[str, Any] = {"split": part.split, "streaming": streaming}
    try:
        if part.data_dir is None and part.data_files is None:
            rows = _read(part.path, part.name, part.split, _OF_MIXTURE, streaming)
        else:
            rows = load_dataset(
                part.path, name=part.name, data_dir=part.data_dir, data_files=part.data_files, **options
            )
    except FinetuneError:
        raise
    except Exception as error:
        raise _read_error(part.path, part.split, _OF_MIXTURE, error) from error
    if hasattr(rows, "__len__") and len(rows) == 0:
        raise _empty(part.path, part.split, _OF_MIXTURE)
    missing = sorted(set(part.columns or ()) - set(rows.column_names or part.columns or ()))
    if missing:
        raise ArgumentError(f"`columns` of {part.path!r} names {missing}; it has {sorted(rows.column_names)}.")
    return rows if part.columns is None else rows.select_columns(part.columns)


def _take_shares(parts: list[Any], fractions: list[float | None]) -> list[Any]:
    """Returns the first rows of each set, as many as its share of the largest mixture that repeats no row."""
    given = [fraction for fraction in fractions if fraction is not None]
    if not given:
        return parts
    if len(given) < len(fractions) or min(given) < 0 or sum(given) <= 0:
        raise ArgumentError(f"`fraction` is {fractions}. Give every dataset a share, at least 0, or none.")
    if not all(hasattr(part, "__len__") for part in parts):
        raise ArgumentError("`fraction` needs to know the number of rows. Drop `streaming`, or the fractions.")
    weights = [fraction / sum(given) for fraction in given]
    total = min(len(part) / weight for part, weight in zip(parts, weights, strict=True) if weight)
    return [part.select(range(round(weight * total))) for part, weight in zip(parts, weights, strict=True)]


def _concatenate(parts: list[Any], names: list[str]) -> Any:
    from datasets import concatenate_datasets

    try:
        return concatenate_datasets(parts)
    except (ValueError, TypeError) as error:
        pairs = zip(names, parts, strict=True)
        columns = "; ".join(f"{name}: {part.features or part.column_names}" for name, part in pairs)
        raise DataFormatError(
            f"The datasets of the mixture do not go together ({' '.join(str(error).split())}). Their columns: "
            f"{columns}. Choose with `columns`, and rename or convert what differs."
        ) from error


def _load_split(script_args: ScriptArguments, argument: str) -> Any:
    name, split = str(script_args.dataset_name), getattr(script_args, argument)
    arguments = _Arguments.of_split(argument)
    try:
        dataset = _read(name, script_args.dataset_config, split, arguments, script_args.dataset_streaming)
    except FinetuneError:
        raise
    except Exception as error:
        raise _read_error(name, split, arguments, error) from error
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise _empty(name, split, arguments)
    return dataset


def _empty(name: str, split: str, arguments: _Arguments) -> DataFormatError:
    return DataFormatError(f"The split {split!r} of {name!r} has no rows. {arguments.another}")


def _read(name: str, config: str | None, split: str, arguments: _Arguments, streaming: bool) -> Any:
    from datasets import load_dataset

    path = Path(name).expanduser()
    if path.is_file():
        reader = READERS.get(path.suffix.lower())
        if reader is None:
            raise DataFormatError(
                f"{arguments.data} is the file {name!r}; readable are {', '.join(READERS)}. Convert it to one of them."
            )
        options: dict[str, Any] = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
        _check_split(split, ["train"], name, arguments)
        return load_dataset(reader, data_files={"train": str(path)}, split=split, streaming=streaming, **options)
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _from_disk(path, split, arguments, streaming)
        if not any(each.suffix.lower() in READERS for each in path.rglob("*")):
            raise DataFormatError(
                f"{arguments.data} is the folder {name!r}, which holds no data file. Readable are {', '.join(READERS)} "
                "and folders written by `save_to_disk`."
            )
        return load_dataset(str(path), name=config, split=split, streaming=streaming)
    if name.startswith((os.sep, ".", "~")) or path.suffix.lower() in READERS or name.count("/") > 1:
        siblings = [str(each) for each in path.parent.glob("*")] if path.parent.is_dir() else []
        raise DataFormatError(f"{arguments.data} is {name!r}, which does not exist.{nearest(str(path), siblings)}")
    return load_dataset(name, name=config, split=split, streaming=streaming)


def _from_disk(path: Path, split: str, arguments: _Arguments, streaming: bool) -> Any:
    from datasets import DatasetDict, load_from_disk

    found = load_from_disk(str(path))
    if isinstance(found, DatasetDict):
        if split not in found:
            _check_split(split, [str(each) for each in found], str(path), arguments, parts=False)
        found = found[split]
    elif arguments.evaluates:
        raise ArgumentError(
            f"{str(path)!r} holds one dataset without splits, and `eval_strategy` asks for evaluation. "
            "Save a `DatasetDict` with a train and a test split, or set `--eval_strategy no`."
        )
    return found.to_iterable_dataset() if streaming else found


def _check_split(split: str, allowed: list[str], name: str, arguments: _Arguments, parts: bool = True) -> None:
    wanted = re.findall(r"([^\[\]+]+)(?:\[[^\]]*\])?", split) if parts else [split]
    for each in wanted:
        if each.strip() not in allowed:
            hint = f" A part of one is written {allowed[0] + '[90%:]'!r}." if parts else ""
            raise ArgumentError(
                f"{arguments.split} is {split!r}, but {name!r} has the splits {', '.join(map(repr, allowed))}."
                f"{nearest(each, allowed)}{hint}"
            )


def _read_error(name: str, split: str, arguments: _Arguments, error: Exception) -> FinetuneError:
    """Returns one error for the many ways in which the library datasets can fail."""
    cause = error.__cause__ or error
    said = one_line(cause)
    if "Unknown split" in said or ("split" in said.lower() and "not found" in said.lower()):
        return ArgumentError(f"{arguments.split} is {split!r}, which {name!r} does not have: {said}")
    if "corresponds to no data" in said or isinstance(cause, StopIteration):
        return _empty(name, split, arguments)
    local = Path(name).expanduser().exists()
    remedy = (
        "Check that every line or row has the same columns."
        if local
        else "There is no such file or folder, so it was looked up on the Hub. Check the spelling and the network."
    )
    return DataFormatError(f"The dataset {name!r} cannot be read: {type(cause).__name__}: {said.rstrip('.')}. {remedy}")
