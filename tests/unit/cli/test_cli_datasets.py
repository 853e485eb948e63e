"""Every way to name a dataset, and one clear error for every mistake."""

import json
from pathlib import Path
from typing import Any

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
    (tmp_path / "empty.jsonl").touch()
    assert "no rows" in failure(DataFormatError, str(tmp_path / "empty.jsonl"))
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"\n{"prom')
    assert "broken.jsonl" in (said := failure(DataFormatError, str(tmp_path / "broken.jsonl")))
    assert said.endswith(". Check that every line or row has the same columns.")
    (tmp_path / "nothing").mkdir()
    assert "no data file" in failure(DataFormatError, str(tmp_path / "nothing"))


def test_a_split_that_a_folder_lacks_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write_rows(folder / "train.jsonl")
    assert "dataset_train_split" in failure(ArgumentError, str(folder), dataset_train_split="trian")


def mixture(tmp_path: Path, *fractions: float | None, **options: Any) -> Any:
    from datasets import Dataset

    from finetune import DatasetMixtureConfig

    datasets = []
    for number, fraction in enumerate(fractions):
        path = tmp_path / f"part{number}.parquet"
        rows = [{"text": f"{number}:{i}", "extra": i} for i in range(10 * (number + 1))]
        Dataset.from_list(rows).to_parquet(str(path))
        datasets.append({"path": str(path), "columns": ["text"], "fraction": fraction})
    return DatasetMixtureConfig(datasets=datasets, **options)


@pytest.mark.parametrize("fractions", [(None, None), (0.5, 0.5), (1, 3), (0.2, 0.0), (3, 1)])
def test_a_mixture_has_the_rows_of_trls(tmp_path: Path, fractions: tuple[float | None, ...]) -> None:
    trl = pytest.importorskip("trl")
    from trl.scripts.utils import DatasetConfig, get_dataset

    from finetune import get_dataset as ours

    config = mixture(tmp_path, *fractions)
    theirs = [
        DatasetConfig(path="parquet", data_files=part.path, columns=part.columns, fraction=part.fraction)
        for part in config.datasets
    ]
    expected = get_dataset(trl.DatasetMixtureConfig(datasets=theirs))
    assert ours(config)["train"][:] == expected["train"][:]


def test_a_mixture_in_a_yaml_file_reaches_the_program(tmp_path: Path) -> None:
    from finetune import DatasetMixtureConfig, ScriptArguments, parse_arguments

    config = mixture(tmp_path, 1, 1)
    lines = [f"  - path: {part.path}\n    columns: [text]\n    fraction: {part.fraction}\n" for part in config.datasets]
    (tmp_path / "run.yaml").write_text("datasets:\n" + "".join(lines) + "test_split_size: 4\n")
    args = parse_arguments((ScriptArguments, DatasetMixtureConfig), ["--config", str(tmp_path / "run.yaml")])
    train, test = load_datasets(*args, evaluate=True)
    assert (len(train), len(test)) == (16, 4)
    assert load_datasets(*args, evaluate=True)[1][:] == test[:]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"datasets": [{"path": "x", "fractoin": 1}]}, "Did you mean `fraction`"),
        ({"datasets": [{"name": "x"}]}, "without `path`"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused_at_once(options: dict[str, Any], said: str) -> None:
    from finetune import DatasetMixtureConfig

    with pytest.raises(ArgumentError, match=said):
        DatasetMixtureConfig(**options)


def test_two_sources_of_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="Keep one"):
        load_datasets(ScriptArguments(dataset_name="y"), mixture(tmp_path, 1), evaluate=False)
    with pytest.raises(ArgumentError, match="--dataset_name"):
        load_datasets(ScriptArguments(), mixture(tmp_path), evaluate=False)
    with pytest.raises(ArgumentError, match="--dataset_name"):
        load_datasets(ScriptArguments(), evaluate=False)


def test_a_mistake_in_a_mixture_names_its_entry_and_no_flag(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    from finetune import DatasetMixtureConfig, get_dataset

    def said(**entry: str) -> str:
        with pytest.raises((ArgumentError, DataFormatError)) as raised:
            get_dataset(DatasetMixtureConfig(datasets=[entry]))
        assert "dataset_name" not in str(raised.value) and "--" not in str(raised.value)
        return str(raised.value)

    (tmp_path / "rows.docx").write_text("x")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "empty.csv").write_text("prompt,completion\n")
    rows = write_rows(tmp_path / "rows.jsonl")
    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "saved"))
    for name in ("rows.docx", "nothing", "row.jsonl"):
        assert said(path=str(tmp_path / name)).startswith("`path` in `datasets` is")
    assert "Choose another with the `split` of this entry" in said(path=str(tmp_path / "empty.csv"))
    for name in (rows, tmp_path / "saved"):
        assert "`split` in `datasets` is 'test'" in said(path=str(name), split="test")


def test_a_mixture_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    from datasets import Dataset

    from finetune import DatasetMixtureConfig, get_dataset

    with pytest.raises(ArgumentError, match="fraction"):
        get_dataset(mixture(tmp_path, 1, None))
    with pytest.raises(ArgumentError, match="streaming"):
        get_dataset(mixture(tmp_path, 1, 1, streaming=True))
    with pytest.raises(ArgumentError, match="test_split_size"):
        get_dataset(mixture(tmp_path, None, None, streaming=True, test_split_size=0.1))
    stream = get_dataset(mixture(tmp_path, None, None, streaming=True))["train"]
    assert sum(1 for _ in stream) == 30
    with pytest.raises(ArgumentError, match="test_split_size"):
        load_datasets(ScriptArguments(), mixture(tmp_path, 1, 1), evaluate=True)
    Dataset.from_list([{"text": [1, 2]}]).to_parquet(str(tmp_path / "other.parquet"))
    parts = [*mixture(tmp_path, None).datasets, {"path": str(tmp_path / "other.parquet")}]
    with pytest.raises(DataFormatError, match="go together"):
        get_dataset(DatasetMixtureConfig(datasets=parts))
    with pytest.raises(ArgumentError, match="names \\['nothing'\\]"):
        get_dataset(DatasetMixtureConfig(datasets=[{"path": str(tmp_path / "part0.parquet"), "columns": ["nothing"]}]))
