"""The last round of an epoch is filled up with repeated rows, and they are not trained."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from finetune.data.loading.collate import DataCollatorForLanguageModeling
from finetune.engine.accumulation import without_repeated_rows

ROWS = [{"input_ids": [i, i + 1, i + 2]} for i in range(1, 6)]


def process(index: int, number: int = 2) -> Any:
    return SimpleNamespace(num_processes=number, process_index=index)


def loader_of(index: int, rows: int = 5, *, drop_last: bool = False, even: bool = True, free: bool = False) -> Any:
    """Returns a loader sharded as accelerate does it: 2 processes, batches of 2."""
    from accelerate.data_loader import BatchSamplerShard

    data = ROWS[:rows]
    shard = BatchSamplerShard(BatchSampler(SequentialSampler(data), 2, drop_last), 2, index, even_batches=even)
    collate = DataCollatorForLanguageModeling(0, padding_free=free)
    return DataLoader(data, batch_sampler=shard, collate_fn=collate)  # pyright: ignore[reportArgumentType]


def trained(index: int, loader: Any, first: int = 0, *, sums: bool = True) -> list[Any]:
    """Returns the supervised tokens of each micro-batch from `first` on."""
    batches = list(loader)[first:]
    kept = without_repeated_rows(batches, first, accelerator=process(index), loader=loader, sums=sums)
    assert len(kept) == len(batches)
    return [batch["labels"][batch["labels"] != -100].tolist() for batch in kept]


@pytest.mark.parametrize("free", [False, True])
def test_each_row_is_trained_once(free: bool) -> None:
    found = [trained(index, loader_of(index, free=free)) for index in (0, 1)]
    supervised = sorted(token for batches in found for batch in batches for token in batch)
    # The labels of a padding-free row begin with one that is masked: it has no token before it.
    expected = [token for row in ROWS for token in row["input_ids"][1 if free else 0 :]]
    assert supervised == sorted(expected)
    assert found[1][1] == [] and found[0][1]


def test_a_window_that_begins_in_the_middle_of_the_epoch() -> None:
    assert trained(0, loader_of(0), first=1) == [[5, 6, 7]]


def test_a_loss_that_could_be_0_by_0_keeps_its_repeated_rows() -> None:
    assert trained(1, loader_of(1), sums=False)[1] == [2, 3, 4, 3, 4, 5]
    assert trained(0, loader_of(0), sums=False)[1] == [5, 6, 7]


@pytest.mark.parametrize(
    "options", [{"rows": 4}, {"drop_last": True}, {"even": False, "rows": 4}], ids=["full", "dropped", "not filled"]
)
def test_nothing_repeated_nothing_changed(options: dict[str, Any]) -> None:
    for index in (0, 1):
        loader = loader_of(index, **options)
        batches = list(loader)
        assert without_repeated_rows(batches, 0, accelerator=process(index), loader=loader, sums=True) is batches


def test_one_process_and_windows_before_the_last_are_left_alone() -> None:
    loader = loader_of(1)
    batches = list(loader)
    assert without_repeated_rows(batches, 0, accelerator=process(0, 1), loader=loader, sums=True) is batches
    first = batches[:1]
    assert without_repeated_rows(first, 0, accelerator=process(1), loader=loader, sums=True) is first


def test_shifted_labels_are_masked_too() -> None:
    loader = loader_of(1)
    batches = [{**batch, "shift_labels": batch["labels"].roll(-1)} for batch in loader]
    kept = without_repeated_rows(batches, 0, accelerator=process(1), loader=loader, sums=True)
    assert set(kept[1]["shift_labels"].flatten().tolist()) == {-100}
    assert torch.equal(kept[0]["shift_labels"], batches[0]["shift_labels"])
