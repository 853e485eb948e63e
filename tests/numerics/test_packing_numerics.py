"""Packing against TRL's, and against the law that tokens neither appear nor vanish nor change places in a sample."""

from itertools import chain

import datasets
import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.preparation.packing import _pack_bfd, _pack_wrapped, pack_dataset, truncate_dataset


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


LENGTHS = st.lists(st.integers(0, 25), min_size=1, max_size=60)


def numbered(lengths):
    """Rows whose tokens are all different; labels are the negated tokens."""
    tokens = iter(range(1, sum(lengths) + 1))
    rows = [[next(tokens) for _ in range(n)] for n in lengths]
    types = datasets.Features({"input_ids": datasets.List(datasets.Value("int64"))})
    types["labels"] = datasets.List(datasets.Value("int32"))
    return Dataset.from_dict({"input_ids": rows, "labels": [[-t for t in row] for row in rows]}, features=types)


def samples_of(packed):
    for ids, sizes in zip(packed["input_ids"], packed["seq_lengths"], strict=True):
        assert sum(sizes) == len(ids)
        start = 0
        for size in sizes:
            assert size > 0
            yield ids[start : start + size]
            start += size


@settings(max_examples=80, deadline=None)
@given(LENGTHS, st.integers(1, 30))
def test_every_token_exactly_once(lengths, seq_length):
    dataset = numbered(lengths)
    table = dataset.data.table
    originals = [row for row in dataset["input_ids"] if row]

    split = _pack_bfd(table, seq_length, split=True).to_pydict()
    samples = list(samples_of(split))
    assert sorted(chain(*samples)) == list(range(1, sum(lengths) + 1))
    pieces = [row[i : i + seq_length] for row in originals for i in range(0, len(row), seq_length)]
    assert sorted(samples) == sorted(pieces)

    cut = _pack_bfd(table, seq_length, split=False).to_pydict()
    assert sorted(samples_of(cut)) == sorted(row[:seq_length] for row in originals)

    wrapped = _pack_wrapped(table, seq_length).to_pydict()
    assert list(chain(*wrapped["input_ids"])) == list(range(1, sum(lengths) + 1))
    assert all(len(row) == seq_length for row in wrapped["input_ids"][:-1])

    for packed in (split, cut, wrapped):
        assert all(len(row) <= seq_length for row in packed["input_ids"])
        assert [[-t for t in row] for row in packed["input_ids"]] == packed["labels"]


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
@pytest.mark.parametrize("case", range(6))
def test_same_rows_in_the_same_order_as_trl(strategy, case):
    trl = pytest.importorskip("trl.data_utils")
    generator = np.random.default_rng(case)
    dataset = numbered(generator.integers(0, 40, 150).tolist())
    if case % 2:
        dataset = dataset.shuffle(seed=case)
    seq_length = int(generator.integers(3, 50))
    for batch_size in (1000, 40):
        ours = pack_dataset(dataset, seq_length, strategy, {"batch_size": batch_size})
        theirs = trl.pack_dataset(dataset, seq_length, strategy, {"batch_size": batch_size})
        assert ours[:] == theirs[:]
        assert ours.features == theirs.features


def test_truncation_as_in_trl():
    reference = pytest.importorskip("trl.experimental.utils").truncate_dataset
    dataset = numbered([0, 3, 9, 1]).add_column("id", list("abcd"))
    assert truncate_dataset(dataset, 2)[:] == reference(dataset, 2)[:]
