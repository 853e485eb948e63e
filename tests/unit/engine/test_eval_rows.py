"""Repeated rows of the last evaluation round: cut, collated anew, or masked."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, SequentialSampler

from finetune.data.loading.collate import DataCollatorForLanguageModeling
from finetune.engine.eval_rows import count_rows, require_rounds
from finetune.errors import ArgumentError

ROWS = [{"input_ids": [i, i + 1, i + 2]} for i in range(1, 6)]


def rank(index: int, *, last: bool = True, remainder: int = 5) -> Any:
    state = SimpleNamespace(end_of_dataloader=last, remainder=remainder if last else -1)
    return SimpleNamespace(num_processes=2, process_index=index, gradient_state=state)


def loader_of(index: int, collate: Any, sampler: Any = None) -> Any:
    """Returns a loader sharded as accelerate does it: 5 rows, 2 processes, batches of 2."""
    from accelerate.data_loader import BatchSamplerShard

    batches = torch.utils.data.BatchSampler(sampler or SequentialSampler(ROWS), 2, drop_last=False)
    return DataLoader(ROWS, batch_sampler=BatchSamplerShard(batches, 2, index), collate_fn=collate)  # pyright: ignore


def test_one_process_repeats_nothing() -> None:
    alone: Any = SimpleNamespace(num_processes=1)
    counted = count_rows({"x": torch.ones(3, 2)}, 0, alone, None)
    assert (counted.valid, counted.rows) == (3, 3)


@pytest.mark.parametrize(("index", "valid"), [(0, 1), (1, 0)])
def test_rows_are_cut_off(index: int, valid: int) -> None:
    loader = loader_of(index, DataCollatorForLanguageModeling(0))
    batches = list(loader)
    first = count_rows(batches[0], 0, rank(index, last=False), loader)
    assert (first.valid, first.rows, len(first.inputs["input_ids"])) == (2, 4, 2)
    counted = count_rows(batches[1], 1, rank(index, remainder=1), loader)
    assert (counted.valid, counted.rows) == (valid, 1)
    assert len(counted.inputs["input_ids"]) == 1, "a model cannot run on nothing"


def test_batches_without_rows_are_collated_anew() -> None:
    collator = DataCollatorForLanguageModeling(0, padding_free=True)
    loader = loader_of(0, collator)
    batch = list(loader)[1]
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1, 2, 3]]
    counted = count_rows(batch, 1, rank(0, remainder=1), loader)
    assert counted.inputs["input_ids"].tolist() == [[5, 6, 7]]
    assert counted.inputs["cu_seq_lens_q"].tolist() == [0, 3]


@pytest.mark.parametrize("padding_free", [True, False])
def test_a_process_without_a_row_of_its_own_counts_nothing(padding_free: bool) -> None:
    loader = loader_of(1, DataCollatorForLanguageModeling(0, padding_free=padding_free))
    counted = count_rows(list(loader)[1], 1, rank(1, remainder=1), loader)
    assert counted.valid == 0
    assert set(counted.inputs["labels"].flatten().tolist()) == {-100}


def test_the_class_of_a_repeated_row_is_kept() -> None:
    loader = loader_of(1, lambda rows: {"input_ids": torch.ones(len(rows), 3), "labels": torch.ones(len(rows)).long()})
    assert count_rows(list(loader)[1], 1, rank(1, remainder=1), loader).inputs["labels"].tolist() == [1]


class Odd(SequentialSampler):
    """An order nobody knows in advance."""


def test_an_unknown_order_masks_the_samples_that_are_repeated() -> None:
    loader = loader_of(0, DataCollatorForLanguageModeling(0, padding_free=True), Odd(ROWS))
    counted = count_rows(list(loader)[1], 1, rank(0, remainder=1), loader)
    assert counted.inputs["input_ids"].tolist() == [[5, 6, 7, 1, 2, 3]]
    assert counted.inputs["labels"].tolist() == [[-100, 6, 7, -100, -100, -100]]


def test_packed_rows_in_an_unknown_order_are_refused() -> None:
    loader = loader_of(0, DataCollatorForLanguageModeling(0, padding_free=True), Odd(ROWS))
    batch = {**list(loader)[1], "cu_seq_lens_q": torch.tensor([0, 1, 3, 6])}
    with pytest.raises(ArgumentError, match="`eval_packing=False`"):
        count_rows(batch, 1, rank(0, remainder=1), loader)


@pytest.mark.parametrize(("rows", "drop_last", "fits"), [(5, False, False), (8, False, True), (5, True, True)])
def test_a_loader_that_leaves_processes_without_a_batch(rows: int, drop_last: bool, fits: bool) -> None:
    from accelerate.data_loader import BatchSamplerShard

    data: Any = list(range(rows))
    batches = torch.utils.data.BatchSampler(SequentialSampler(data), 2, drop_last=drop_last)
    loader = DataLoader(data, batch_sampler=BatchSamplerShard(batches, 2, 0, even_batches=False))  # pyright: ignore
    if fits:
        require_rounds(loader, rank(0))
        return
    require_rounds(loader, SimpleNamespace(num_processes=1))
    with pytest.raises(ArgumentError, match=r"`even_batches=False`.*'even_batches': True"):
        require_rounds(loader, rank(0))
