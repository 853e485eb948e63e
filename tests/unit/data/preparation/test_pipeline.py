import os
import time
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from finetune.data.mixtures import mix_datasets, mixture_counts
from finetune.data.preparation.pipeline import prepare_split
from finetune.data.preparation.settings import DataSettings
from finetune.data.preview import audit_table
from finetune.data.sources import first_row
from finetune.errors import ArgumentError, DataFormatError

TEXTS = ["the cat sat on a mat", "sun", "stars over the hills", "a"]
pytestmark = pytest.mark.usefixtures("quiet")


def silent(line: str) -> None:
    pass


def prepared(dataset: Any, tokenizer: Any, **options: Any) -> list[dict[str, Any]]:
    return list(prepare_split(dataset, tokenizer, DataSettings(**options), say=silent).dataset)


def test_columns_and_types(on_disk: Any, chat_tokenizer: Any) -> None:
    made = prepare_split(on_disk, chat_tokenizer, DataSettings(), say=silent).dataset
    assert made.column_names == ["input_ids", "labels", "length"]
    assert made.features["input_ids"].feature.dtype == "int32"
    assert made["length"][:] == [len(row["input_ids"]) for row in made]
    kept = prepare_split(on_disk, chat_tokenizer, DataSettings(keep_columns="all"), say=silent).dataset
    assert kept["extra"][:] == [1, 2, 3, 4]
    assert kept["text"][:] == TEXTS
    assert kept["input_ids"][:] == made["input_ids"][:]
    assert "text" not in prepared(on_disk, chat_tokenizer, keep_columns=("extra",))[0]


def test_streams_give_the_same_rows(on_disk: Any, chat_tokenizer: Any) -> None:
    for options in ({}, {"max_length": 3}, {"keep_columns": "all"}, {"batch_size": 1}):
        expected = prepared(on_disk, chat_tokenizer, **options)
        assert prepared(on_disk.to_iterable_dataset(), chat_tokenizer, **options) == expected


def test_rows_with_nothing_to_learn_are_left_out_and_counted(chat_tokenizer: Any) -> None:
    rows = Dataset.from_dict({"prompt": ["the cat " * 9, "a"], "completion": [" sat", " mat"]})
    split = prepare_split(rows, chat_tokenizer, DataSettings(max_length=6), say=silent)
    assert len(split.dataset) == 1
    audit = split.audit
    assert (audit.num_rows, audit.num_dropped, audit.num_dropped_by_truncation) == (2, 1, 1)
    assert audit.first_dropped_rows == (0,)
    stream = prepare_split(rows.to_iterable_dataset(), chat_tokenizer, DataSettings(max_length=6), say=silent)
    assert list(stream.dataset) == list(split.dataset)
    assert stream.audit.sampled
    assert "a stream: only its first 2 rows are counted" in audit_table({"train": stream.audit})


def test_preparing_twice_changes_nothing(on_disk: Any, chat_tokenizer: Any) -> None:
    once = prepare_split(on_disk, chat_tokenizer, DataSettings(), say=silent)
    twice = prepare_split(once.dataset, chat_tokenizer, DataSettings(), say=silent)
    assert twice.dataset is once.dataset
    assert twice.cache == "already prepared"
    assert twice.audit.num_supervised == once.audit.num_supervised
    shorter = prepare_split(once.dataset, chat_tokenizer, DataSettings(max_length=3), say=silent)
    assert max(shorter.dataset["length"]) == 3


def test_packed_rows_are_left_alone(chat_tokenizer: Any) -> None:
    rows = Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[1, 2]], "seq_lengths": [[1, 1]]})
    assert prepare_split(rows, chat_tokenizer, DataSettings(max_length=1), say=silent).dataset is rows
    with pytest.raises(DataFormatError, match="no `labels`"):
        prepare_split(rows.remove_columns("labels"), chat_tokenizer, DataSettings(), say=silent)


def test_shuffled_and_formatted_data_sets(on_disk: Any, chat_tokenizer: Any) -> None:
    expected = prepared(on_disk, chat_tokenizer)
    shuffled = on_disk.select([2, 0])
    assert prepared(shuffled, chat_tokenizer) == [expected[2], expected[0]]
    assert prepared(on_disk.with_format("numpy"), chat_tokenizer) == expected
    with pytest.raises(DataFormatError, match="set_transform"):
        prepared(on_disk.with_transform(lambda row: row), chat_tokenizer)


def test_empty_data_sets_are_an_error(chat_tokenizer: Any) -> None:
    for empty in (Dataset.from_dict({"text": []}), Dataset.from_dict({"text": ["a"]}).to_iterable_dataset().take(0)):
        with pytest.raises(DataFormatError, match="The eval dataset is empty"):
            prepare_split(empty, chat_tokenizer, DataSettings(), name="eval", say=silent)
    with pytest.raises(DataFormatError, match="expected dictionaries"):
        first_row([1])


@pytest.mark.parametrize("num_proc", [None, 2])
def test_a_bad_row_is_named_by_its_place_in_the_data_set(num_proc: int | None, chat_tokenizer: Any) -> None:
    rows = Dataset.from_dict({"text": ["a"] * 7 + [None]})
    with pytest.raises(DataFormatError, match="Row 7 of the train dataset: `text` is None"):
        prepared(rows, chat_tokenizer, batch_size=2, num_proc=num_proc)


def test_worker_processes_give_the_same_rows(on_disk: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    expected = prepared(on_disk, chat_tokenizer)
    lines: list[str] = []
    settings = DataSettings(num_proc=2, cache_dir=str(tmp_path / "cache"))
    assert list(prepare_split(on_disk, chat_tokenizer, settings, say=lines.append).dataset) == expected
    assert list(prepare_split(on_disk, chat_tokenizer, settings, say=lines.append).dataset) == expected
    assert ["MISS" in lines[0], lines[1].endswith("HIT")] == [True, True], lines


# ---- Workers that hang or die ----


def _hang_in_workers(row: dict[str, Any]) -> str:
    if os.getpid() != MAIN:
        time.sleep(60)
    return row["text"]


def _die_in_workers(row: dict[str, Any]) -> str:
    if os.getpid() != MAIN:
        os._exit(9)
    return row["text"]


MAIN = os.getpid()


@pytest.mark.parametrize("function", [_hang_in_workers, _die_in_workers])
def test_a_worker_that_hangs_or_dies_is_reported_and_replaced(function: Any, chat_tokenizer: Any) -> None:
    lines: list[str] = []
    rows = Dataset.from_dict({"text": TEXTS})
    settings = DataSettings(num_proc=2, stall_seconds=2.0, formatting_func=function)
    began = time.monotonic()
    made = prepare_split(rows, chat_tokenizer, settings, say=lines.append).dataset
    assert time.monotonic() - began < 50
    assert list(made) == prepared(rows, chat_tokenizer)
    if function is _hang_in_workers:
        assert "No worker has made progress" in lines[0]
        assert "_hang_in_workers" in lines[0]
    else:
        assert "A worker process died" in lines[0]
    assert "again in this process" in lines[1]


# ---- Mixtures ----


def test_mixture_counts_sum_up() -> None:
    assert mixture_counts([1, 1, 1], 10) == [4, 3, 3]
    assert mixture_counts([0.9, 0.1], 5) == [5, 0]
    assert mixture_counts([3, 0], 4) == [4, 0]


def test_mixtures_show_every_row_before_any_twice() -> None:
    parts = {"a": Dataset.from_dict({"x": list(range(6))}), "b": Dataset.from_dict({"x": [10, 11]})}
    seen: list[int] = []
    for epoch in range(3):
        rows = mix_datasets(parts, {"a": 1, "b": 1}, num_rows=4, seed=3, epoch=epoch)["x"][:]
        assert sum(x >= 10 for x in rows) == 2
        assert rows == mix_datasets(parts, {"b": 1, "a": 1}, num_rows=4, seed=3, epoch=epoch)["x"][:]
        seen += rows
    assert sorted(x for x in seen if x < 10) == list(range(6))
    assert sorted(x for x in seen if x >= 10) == [10] * 3 + [11] * 3
    assert sorted(mix_datasets(list(parts.values()))["x"][:]) == [0, 1, 2, 3, 4, 5, 10, 11]


def test_mixtures_refuse_weights_that_do_not_fit() -> None:
    parts = {"a": Dataset.from_dict({"x": [1]}), "b": Dataset.from_dict({"x": []})}
    for weights in ({"a": 1}, [1], [1, -1], [0, 0]):
        with pytest.raises(ArgumentError, match="weights"):
            mix_datasets(parts, weights)
    with pytest.raises(ArgumentError, match="is empty"):
        mix_datasets(parts, [1, 1], num_rows=2)


def test_special_tokens_can_be_left_away(chat_tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    chat_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", chat_tokenizer.bos_token_id)]
    )
    plain = chat_tokenizer("the cat", add_special_tokens=False)["input_ids"]
    bos, eos = chat_tokenizer.bos_token_id, chat_tokenizer.eos_token_id
    data = Dataset.from_dict({"text": ["the cat"]})
    for special, append, expected in (
        (True, True, [bos, *plain, eos]),
        (False, True, [*plain, eos]),
        (True, False, [bos, *plain]),
        (False, False, plain),
    ):
        settings = DataSettings(add_special_tokens=special, append_eos=append)
        split = prepare_split(data, chat_tokenizer, settings, say=lambda line: None)
        assert split.dataset["input_ids"][:] == [expected]
        assert split.audit.num_stop_expected == append
        split.audit.check()


def test_of_packed_rows_those_without_a_label_in_the_loss_are_left_out(chat_tokenizer: Any) -> None:
    rows = {"input_ids": [[1, 2], [3, 4], [5, 6]], "labels": [[1, -100], [-100, 4], [5, 6]]}
    packed = Dataset.from_dict({**rows, "seq_lengths": [[2], [2], [1, 1]]})
    split = prepare_split(packed, chat_tokenizer, DataSettings(), say=lambda line: None)
    assert split.dataset["input_ids"] == [[3, 4]]
    assert (split.audit.num_rows, split.audit.num_dropped, split.audit.first_dropped_rows) == (3, 2, (0, 2))
