"""Every way to name a data set, and one clear error for every mistake."""

import json
from pathlib import Path

import pytest

from finetune.cli.datasets import load_datasets
from finetune.cli.script_arguments import ScriptArguments
from finetune.errors import ArgumentError, DataFormatError

ROWS = [{"prompt": f"{i} plus 1?", "completion": str(i + 1)} for i in range(10)]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write_rows(path: Path) -> Path:
    from datasets import Dataset

    dataset = Dataset.from_list(ROWS)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS))
    elif path.suffix in (".csv", ".tsv"):
        dataset.to_csv(str(path), sep="\t" if path.suffix == ".tsv" else ",", index=False)
    elif path.suffix == ".parquet":
        dataset.to_parquet(str(path))
    elif path.suffix == ".arrow":
        import pyarrow

        with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, dataset.data.schema) as stream:
            stream.write_table(dataset.data.table)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow"])
def test_a_file_is_read_with_its_columns(tmp_path: Path, suffix: str) -> None:
    path = write_rows(tmp_path / f"rows{suffix}")
    train, test = load_datasets(ScriptArguments(dataset_name=str(path)), evaluate=False)
    assert test is None
    assert train.column_names == ["prompt", "completion"]
    assert [str(value) for value in train["completion"]] == [row["completion"] for row in ROWS]


def test_parts_of_a_file_are_its_splits(tmp_path: Path) -> None:
    args = ScriptArguments(
        dataset_name=str(write_rows(tmp_path / "rows.jsonl")),
        dataset_train_split="train[:70%]",
        dataset_test_split="train[70%:]",
    )
    train, test = load_datasets(args, evaluate=True)
    assert (len(train), len(test)) == (7, 3)
    assert test[0] == ROWS[7]


def test_a_folder_of_files_has_their_names_as_splits(tmp_path: Path) -> None:
    for name in ("train", "test"):
        write_rows(tmp_path / f"{name}.jsonl")
    train, test = load_datasets(ScriptArguments(dataset_name=str(tmp_path)), evaluate=True)
    assert (len(train), len(test)) == (10, 10)


def test_a_saved_folder_is_read_with_and_without_splits(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:2])}).save_to_disk(
        str(tmp_path / "two")
    )
    train, _ = load_datasets(ScriptArguments(dataset_name=str(tmp_path / "one")), evaluate=False)
    assert list(train) == ROWS
    train, test = load_datasets(ScriptArguments(dataset_name=str(tmp_path / "two")), evaluate=True)
    assert (len(train), list(test)) == (10, ROWS[:2])
    with pytest.raises(ArgumentError, match="eval_strategy"):
        load_datasets(ScriptArguments(dataset_name=str(tmp_path / "one")), evaluate=True)


def test_a_streamed_file_gives_the_same_rows(tmp_path: Path) -> None:
    args = ScriptArguments(dataset_name=str(write_rows(tmp_path / "rows.jsonl")), dataset_streaming=True)
    train, _ = load_datasets(args, evaluate=False)
    assert not hasattr(train, "__len__")
    assert list(train) == ROWS


def failure(error: type[Exception], name: str | None, **options: str) -> str:
    with pytest.raises(error) as raised:
        load_datasets(ScriptArguments(dataset_name=name, **options), evaluate=False)
    return str(raised.value)


def test_each_mistake_names_the_argument_and_a_remedy(tmp_path: Path) -> None:
    rows = str(write_rows(tmp_path / "rows.jsonl"))
    assert "--dataset_name" in failure(ArgumentError, None)
    assert "Did you mean" in failure(DataFormatError, str(tmp_path / "row.jsonl"))
    assert "rows.jsonl" in failure(DataFormatError, str(tmp_path / "row.jsonl"))
    assert "'train'" in failure(ArgumentError, rows, dataset_train_split="validation")
    (tmp_path / "rows.docx").write_text("x")
    assert ".parquet" in failure(DataFormatError, str(tmp_path / "rows.docx"))
    (tmp_path / "empty.csv").write_text("prompt,completion\n")
    assert "no rows" in failure(DataFormatError, str(tmp_path / "empty.csv"))
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"\n{"prom')
    assert "broken.jsonl" in failure(DataFormatError, str(tmp_path / "broken.jsonl"))
    (tmp_path / "nothing").mkdir()
    assert "no data file" in failure(DataFormatError, str(tmp_path / "nothing"))


def test_a_split_that_a_folder_lacks_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write_rows(folder / "train.jsonl")
    assert "dataset_train_split" in failure(ArgumentError, str(folder), dataset_train_split="trian")
