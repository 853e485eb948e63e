import random
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.data_loader import DataLoaderShard, prepare_data_loader
from accelerate.state import GradientState
from datasets import Dataset
from torch.utils.data import DataLoader, IterableDataset

from finetune.data.loading import loader as loaders
from finetune.data.loading import position
from finetune.data.loading.digest import rows_digest
from finetune.data.loading.rebalance import BatchRebalanceSampler
from finetune.data.loading.samplers import LengthGroupedSampler, SeededRandomSampler, SequentialSampler
from finetune.data.loading.streaming import StreamLoader
from finetune.errors import CheckpointError

ARGS = SimpleNamespace(
    dataloader_num_workers=0,
    gradient_accumulation_steps=1,
    dataloader_pin_memory=False,
    dataloader_persistent_workers=False,
    dataloader_multiprocessing_context=None,
    dataloader_prefetch_factor=None,
    dataloader_in_order=True,
    dataloader_drop_last=False,
    process_index=0,
)


def batch_digest(loader, num_batches, epoch, num_rows=32):
    """What a checkpoint keeps of the rows that follow."""
    indices = position.following_rows(loader, num_batches, epoch, num_rows)
    return None if indices is None else rows_digest(loader.dataset, indices)


class Accelerator:
    """One process of several, without the others: what `Accelerator.prepare` does with a loader."""

    def __init__(self, rank=0, world_size=1, even_batches=True, dispatch_batches=None, split_batches=False):
        self.process_index, self.num_processes = rank, world_size
        self.dispatch_batches, self.split_batches, self.even_batches = dispatch_batches, split_batches, even_batches
        self.device, self.device_placement, self.non_blocking = torch.device("cpu"), True, False
        self.gradient_state, self._dataloaders = GradientState(), []

    def prepare(self, loader):
        return prepare_data_loader(
            loader,
            torch.device("cpu"),
            num_processes=self.num_processes,
            process_index=self.process_index,
            split_batches=self.split_batches,
            put_on_device=True,
            dispatch_batches=self.dispatch_batches,
            even_batches=self.even_batches,
            use_seedable_sampler=True,
        )


class Rows(torch.utils.data.Dataset):
    def __init__(self, num_rows, offset=0):
        self.num_rows, self.offset, self.num_read = num_rows, offset, 0

    def __len__(self):
        return self.num_rows

    def __getitem__(self, i):
        self.num_read += 1
        return i + self.offset


def collate(rows):
    return {"x": torch.tensor(rows)}


def build(dataset, sampler="random", batch_size=3, rank=0, world_size=1, drop_last=False, **accelerator):
    num_rows = len(dataset)
    lengths = [1 + i * 7 % 13 for i in range(num_rows)]
    samplers = {
        "random": lambda: SeededRandomSampler(dataset, 42),
        "sequential": lambda: SequentialSampler(dataset),
        "grouped": lambda: LengthGroupedSampler(lengths, batch_size, 42),
        "rebalanced": lambda: BatchRebalanceSampler(
            lengths, batch_size * world_size * 2, world_size, 2, rank=rank, drop_last=False
        ),
    }
    return loaders.build_dataloader(
        dataset,
        args=SimpleNamespace(**{**vars(ARGS), "dataloader_drop_last": drop_last, "process_index": rank}),
        accelerator=Accelerator(rank, world_size, **accelerator),
        collate_fn=collate,
        batch_size=batch_size,
        sampler=samplers[sampler](),
        is_training=True,
    )


def rows(loader):
    return [batch["x"].tolist() for batch in loader]


def test_memory_is_pinned_only_where_an_accelerator_can_read_it(monkeypatch):
    monkeypatch.setattr(ARGS, "dataloader_pin_memory", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader = build(Rows(4))
        assert len(rows(loader)) == 2
    assert loader.pin_memory is torch.accelerator.is_available()


KINDS = ["random", "sequential", "grouped", "rebalanced"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_skipped_batches_are_the_rest_of_the_same_epoch(kind, world_size, drop_last):
    for rank in range(world_size):
        whole = build(Rows(40), kind, rank=rank, world_size=world_size, drop_last=drop_last)
        whole.set_epoch(2)
        for sampler in loaders_nested(whole):
            sampler.set_epoch(2)
        expected = rows(whole)
        for start in range(len(expected) + 1):
            dataset = Rows(40)
            loader = build(dataset, kind, rank=rank, world_size=world_size, drop_last=drop_last)
            skipped = position.skip_batches(loader, start)
            for target in (skipped, *loaders_nested(skipped)):
                target.set_epoch(2)
            assert rows(skipped) == expected[start:], (rank, start)
            assert dataset.num_read == sum(map(len, expected[start:]))
            assert len(skipped) == len(expected) - start


def loaders_nested(loader):
    """The samplers inside that take an epoch, as a training loop that wants to be sure would set it."""
    inner = loader.batch_sampler
    return [s for s in (inner, getattr(inner, "batch_sampler", None)) if hasattr(s, "set_epoch")]


def test_the_given_loader_serves_the_next_epochs():
    loader = build(Rows(10))
    skipped = position.skip_batches(loader, 2)
    assert type(skipped) is DataLoaderShard and skipped._drop_last == loader._drop_last
    assert len(rows(skipped)) == 2 and len(rows(loader)) == 4
    assert position.skip_batches(loader, 0) is loader


def test_split_batches_and_dispatch():
    for rank in range(2):
        whole = rows(build(Rows(11), batch_size=4, rank=rank, world_size=2, split_batches=True))
        loader = build(Rows(11), batch_size=4, rank=rank, world_size=2, split_batches=True)
        assert rows(position.skip_batches(loader, 1)) == whole[1:]
        assert position.rows_per_batch(loader) == 4
    whole = rows(build(Rows(11), dispatch_batches=True))
    assert rows(position.skip_batches(build(Rows(11), dispatch_batches=True), 2)) == whole[2:]


def test_samplers_and_loaders_of_ones_own_are_skipped_by_drawing_indices():
    class Odd(torch.utils.data.Sampler):
        def __iter__(self):
            return iter([5, 3, 1, 7, 9])

        def __len__(self):
            return 5

    for loader in (
        DataLoader(Rows(10), batch_size=2, sampler=Odd(), collate_fn=collate),
        DataLoader(Rows(10), batch_sampler=[[5, 3], [1, 7], [9]], collate_fn=collate),
    ):
        skipped = position.skip_batches(loader, 1)
        assert rows(skipped) == [[1, 7], [9]]
    assert batch_digest(loader, 1, 0) is None
    assert rows(position.skip_batches(DataLoader(Rows(5), batch_size=2, collate_fn=collate), 1)) == [[2, 3], [4]]


def test_skipping_in_a_stream_reads_the_batches_again():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(9))

    loader = loaders.build_dataloader(Stream(), args=ARGS, accelerator=Accelerator(), collate_fn=collate, batch_size=2)
    assert isinstance(loader, StreamLoader) and position.is_stream(loader.dataset)
    whole = rows(loader)
    assert rows(position.skip_batches(loader, 2)) == whole[2:]
    assert rows(loader) == whole, "the next epoch is whole again"
    dispatched = loaders.build_dataloader(
        Stream(), args=ARGS, accelerator=Accelerator(dispatch_batches=True), collate_fn=collate, batch_size=2
    )
    assert not isinstance(dispatched, StreamLoader)
    assert rows(position.skip_batches(dispatched, 2)) == whole[2:]
    with pytest.raises(CheckpointError, match="dispatch_batches"):
        position.load_loader_state(dispatched, position.loader_state(loader))


@pytest.mark.parametrize("kind", KINDS)
def test_digest_does_not_depend_on_the_number_of_processes(kind):
    """6 rows per process on one process are 2 rows on each of three."""
    alone = build(Rows(50), kind, batch_size=6)
    digests = {batch_digest(alone, 3, 1)}
    if kind == "rebalanced" or kind != "grouped":
        digests |= {batch_digest(build(Rows(50), kind, 2, r, 3), 3, 1) for r in range(3)}
    assert len(digests) == 1 and None not in digests


def test_digest_notices_other_data_order_place_and_epoch():
    reference = batch_digest(build(Rows(50)), 3, 1)
    others = [
        batch_digest(build(Rows(50, offset=1)), 3, 1),
        batch_digest(build(Rows(50), "sequential"), 3, 1),
        batch_digest(build(Rows(50)), 4, 1),
        batch_digest(build(Rows(50)), 3, 2),
        batch_digest(build(Rows(49)), 3, 1),
    ]
    assert reference not in others and len(set(others)) == len(others)
    assert batch_digest(build(Rows(50)), 3, 1) == reference


def test_digest_at_the_end_of_an_epoch_covers_the_next_one():
    loader = build(Rows(10), batch_size=5)
    assert batch_digest(loader, 2, 0) == batch_digest(loader, 0, 1, num_rows=10)


def test_digest_leaves_random_generators_and_the_epoch_alone():
    class Augmented(Rows):
        def __getitem__(self, i):
            return [random.random(), np.random.rand(), torch.rand(2), i]

    loader = build(Augmented(20))
    loader.set_epoch(3)
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    first = batch_digest(loader, 1, 0)
    assert random.getstate() == before[0] and np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    torch.rand(5), random.random(), np.random.rand()
    assert batch_digest(loader, 1, 0) == first
    assert loader.batch_sampler.sampler.epoch == 3


def test_digest_of_text_rows_and_formats():
    dataset = Dataset.from_dict({"input_ids": [[i, i + 1] for i in range(20)], "text": ["a"] * 20})
    reference = batch_digest(build(dataset), 2, 0)
    assert batch_digest(build(dataset.map(lambda row: {"text": "b"})), 2, 0) != reference
    assert batch_digest(build(Dataset.from_dict(dataset[:])), 2, 0) == reference


def test_state_names_what_changed():
    state = position.loader_state(build(Rows(50)))
    assert state == {"kind": "map", "num_rows": 50, "sampler": "SeededRandomSampler", "seed": 42}
    position.load_loader_state(build(Rows(50)), state)
    with pytest.raises(CheckpointError, match="`num_rows` was 50 and is 49"):
        position.load_loader_state(build(Rows(49)), state)
    with pytest.raises(CheckpointError, match="`sampler` was 'SeededRandomSampler' and is 'SequentialSampler'"):
        position.load_loader_state(build(Rows(50), "sequential"), state)
    position.load_loader_state(build(Rows(49)), state, verify=False)


def test_counts():
    loader = build(Rows(10), batch_size=3)
    assert loaders.num_examples(loader) == 10
    assert loaders.num_examples([1, 2, 3], batch_size=4) == 12
    stream = Dataset.from_dict({"x": [1]}).to_iterable_dataset()
    assert position.has_length(loader) and not position.has_length(stream)


def test_workers_differ_by_rank_and_stay_in_the_range_of_numpy(monkeypatch):
    monkeypatch.setattr(torch, "initial_seed", lambda: 2**32 - 1)
    draws = set()
    for rank in range(3):
        loaders.seed_worker(0, 2, rank)
        draws.add((random.random(), float(np.random.rand()), float(torch.rand(1))))
    assert len(draws) == 3
