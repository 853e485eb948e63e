import logging
from itertools import chain

import datasets
import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.columns import list_lengths
from finetune.data.preparation.packing import best_fit_decreasing, pack_dataset, packing_report, truncate_dataset
from finetune.errors import ArgumentError, DataFormatError

ROWS = {"input_ids": [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10], [11]], "labels": [[1, 1, 0, 0, 0], [1, 0], [1, 1, 0], [1]]}


def test_worked_examples_of_trl():
    dataset = Dataset.from_dict(ROWS)
    assert pack_dataset(dataset, 4, "bfd")[:] == {
        "input_ids": [[1, 2, 3, 4], [8, 9, 10, 11], [6, 7]],
        "labels": [[1, 1, 0, 0], [1, 1, 0, 1], [1, 0]],
        "seq_lengths": [[4], [3, 1], [2]],
    }
    assert pack_dataset(dataset, 4, "bfd_split")[:] == {
        "input_ids": [[1, 2, 3, 4], [8, 9, 10, 5], [6, 7, 11]],
        "labels": [[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 1]],
        "seq_lengths": [[4], [3, 1], [2, 1]],
    }
    assert pack_dataset(dataset, 3, "wrapped")[:]["input_ids"] == [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=0, max_size=80), st.integers(30, 45))
def test_best_fit_decreasing_places_every_row_once_and_overfills_no_bin(lengths, seq_length):
    lengths = np.array(lengths, dtype=np.int64)
    order, sizes = best_fit_decreasing(lengths, seq_length)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    assert sizes.sum() == len(lengths)
    fill = [lengths[part].sum() for part in np.split(order, np.cumsum(sizes)[:-1])] if len(sizes) else []
    assert all(0 < total <= seq_length for total in fill)
    # Two bins that would fit into one would mean that a row was not placed where it fits.
    smallest = sorted(fill)[:2]
    assert len(fill) < 2 or sum(smallest) > seq_length or min(lengths) > seq_length - max(smallest)


def test_format_columns_and_fingerprint_are_kept():
    dataset = Dataset.from_dict(ROWS).with_format("numpy", columns=["input_ids"])
    packed = pack_dataset(dataset, 4)
    assert packed.format["type"] == "numpy"
    assert packed.format["columns"] == ["input_ids", "seq_lengths"]
    assert pack_dataset(dataset, 4)._fingerprint == packed._fingerprint
    assert pack_dataset(dataset, 5)._fingerprint != packed._fingerprint


def test_length_column_is_made_anew():
    dataset = Dataset.from_dict({"length": [5, 2, 3, 1], **ROWS})
    assert pack_dataset(dataset, 4)["length"] == [4, 4, 2]
    assert pack_dataset(dataset, 4, "wrapped")["length"] == [4, 4, 3]
    assert truncate_dataset(dataset, 2)["length"] == [2, 2, 2, 1]


def test_empty_missing_and_no_rows():
    dataset = Dataset.from_dict({"input_ids": [[], [1, 2], None, [3]]})
    assert pack_dataset(dataset, 3)[:] == {"input_ids": [[1, 2, 3]], "seq_lengths": [[2, 1]]}
    nothing = Dataset.from_dict({"input_ids": [[], []]})
    assert len(pack_dataset(nothing, 3)) == 0


def test_shuffled_and_sliced_batches():
    """Batches after the first are Arrow slices, whose offsets do not start at 0."""
    dataset = Dataset.from_dict({"input_ids": [[i] * (i % 4 + 1) for i in range(50)]}).shuffle(seed=1)
    for strategy in ("bfd", "bfd_split", "wrapped"):
        packed = pack_dataset(dataset, 4, strategy, {"batch_size": 7})
        assert sorted(chain(*packed["input_ids"])) == sorted(chain(*dataset["input_ids"]))


def test_dataset_dict_and_stream():
    dataset = Dataset.from_dict(ROWS)
    both = pack_dataset(DatasetDict(train=dataset, test=dataset), 4)
    assert both["train"][:] == both["test"][:] == pack_dataset(dataset, 4)[:]
    stream = pack_dataset(dataset.to_iterable_dataset(), 4)
    assert [row["input_ids"] for row in stream] == pack_dataset(dataset, 4)["input_ids"]


def test_lost_tokens_are_counted_and_said(caplog):
    dataset = Dataset.from_dict(ROWS)
    with caplog.at_level(logging.INFO, logger="finetune"):
        packed = pack_dataset(dataset, 4)
        pack_dataset(dataset, 4, "bfd_split")
    lossy, lossless = caplog.records
    assert lossy.levelno == logging.WARNING and "1 tokens of 1 longer rows lost" in lossy.getMessage()
    assert lossless.levelno == logging.INFO
    report = packing_report(dataset, packed, 4)
    assert (report.num_rows_before, report.num_rows_after, report.lost_tokens) == (4, 3, 1)
    assert report.efficiency == 10 / 12


def test_list_lengths_follow_the_indices():
    dataset = Dataset.from_dict({"input_ids": [[1] * n for n in range(9)]})
    assert list_lengths(dataset.shuffle(seed=0), "input_ids").tolist() == [
        len(row) for row in dataset.shuffle(seed=0)["input_ids"]
    ]
    joined = datasets.concatenate_datasets([dataset.select(range(3)), dataset.select(range(5, 9))])
    assert list_lengths(joined, "input_ids").tolist() == [0, 1, 2, 5, 6, 7, 8]


def test_errors_say_what_to_change():
    dataset = Dataset.from_dict({"input_ids": [[1], [2, 3]], "id": ["a", "b"]})
    with pytest.raises(DataFormatError, match=r"\['id'\]"):
        pack_dataset(dataset, 4)
    with pytest.raises(DataFormatError, match=r"row 1 .* 2 items in `input_ids` and 1 in `labels`"):
        pack_dataset(Dataset.from_dict({"input_ids": [[1], [2, 3]], "labels": [[1], [2]]}), 4)
    with pytest.raises(ArgumentError, match="`bfd_split`"):
        pack_dataset(dataset, 4, "bfd_splitt")
    with pytest.raises(ArgumentError, match="seq_length=0"):
        pack_dataset(dataset, 0)
    with pytest.raises(ArgumentError, match="max_length=-1"):
        truncate_dataset(dataset, -1)


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_rows_that_shall_not_stay(strategy):
    dataset = Dataset.from_dict(ROWS)
    expected = [row for row in pack_dataset(dataset, 4, strategy) if len(row["labels"]) == 4]

    def is_full(packed):
        return np.array([len(labels) == 4 for labels in packed["labels"].to_pylist()])

    for rows in (dataset, dataset.to_iterable_dataset()):
        assert list(pack_dataset(rows, 4, strategy, keep=is_full)) == expected
