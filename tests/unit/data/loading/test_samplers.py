from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from datasets import Dataset
from torch.utils.data import BatchSampler

from finetune.data.loading.loader import eval_sampler, train_sampler
from finetune.data.loading.rebalance import BatchRebalanceSampler
from finetune.data.loading.samplers import (
    LengthGroupedSampler,
    SeededRandomSampler,
    SequentialSampler,
    permutation,
    rank_batches,
    row_lengths,
)
from finetune.errors import ArgumentError, DataFormatError

LENGTHS = np.random.default_rng(0).integers(1, 50, 101)


def make(name):
    if name == "random":
        return SeededRandomSampler(range(101), seed=42)
    if name == "sequential":
        return SequentialSampler(range(101))
    if name == "grouped":
        return LengthGroupedSampler(LENGTHS, 4, seed=42)
    return BatchRebalanceSampler(LENGTHS, 8, 2, 2, rank=1, drop_last=False)


NAMES = ["random", "sequential", "grouped", "rebalanced"]


@pytest.mark.parametrize("name", NAMES)
def test_order_is_a_function_of_seed_and_epoch_only(name):
    first, second = make(name), make(name)
    torch.manual_seed(1)
    list(first)
    list(first)
    first.set_epoch(3)
    state = torch.get_rng_state()
    ahead = list(first)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second.set_epoch(3)
    assert list(second) == ahead == list(first)
    first.set_epoch(2)
    assert (list(first) == ahead) == (name == "sequential")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("start", [0, 1, 7, 50, 1000])
def test_skip_starts_in_the_middle_and_leaves_the_sampler_alone(name, start):
    sampler = make(name)
    sampler.set_epoch(1)
    whole = list(sampler)
    skipped = sampler.skip(start)
    assert list(skipped) == whole[start:] and len(skipped) == len(whole[start:])
    assert list(skipped.skip(2)) == whole[start + 2 :]
    assert list(sampler) == whole and len(sampler) == len(whole)


@pytest.mark.parametrize("name", NAMES[:3])
def test_every_row_once(name):
    assert sorted(make(name)) == list(range(101))


def test_random_order_is_that_of_accelerate():
    torch.manual_seed(42)
    theirs = SeedableRandomSampler(range(101))
    ours = make("random")
    for epoch in (0, 1, 5):
        theirs.set_epoch(epoch)
        ours.set_epoch(epoch)
        assert list(theirs) == list(ours)


def test_grouping_is_that_of_transformers_and_the_longest_row_comes_first():
    reference = pytest.importorskip("transformers.trainer_pt_utils").get_length_grouped_indices
    for seed in range(20):
        num_rows, batch_size = 1 + seed * 17, 1 + seed % 5
        lengths = np.random.default_rng(seed).integers(1, 30, num_rows)
        ours = list(LengthGroupedSampler(lengths, batch_size, seed=seed))
        assert ours == reference(lengths.tolist(), batch_size, generator=torch.Generator().manual_seed(seed))
        assert lengths[ours[0]] == lengths.max()
    assert list(LengthGroupedSampler([], 4)) == []


def test_rebalanced_micro_batches_are_those_of_transformers():
    reference = pytest.importorskip("transformers.trainer_pt_utils").BatchRebalanceSampler
    rng = np.random.default_rng(1)
    for case in range(40):
        lengths = rng.integers(1, 60, rng.integers(1, 200)).tolist()
        if case % 4 == 3:  # a few rows cost more than many: whole slots are settled early
            lengths = (rng.lognormal(2, 2, 150).astype(int) + 1).tolist()
        ranks, accumulation = int(rng.integers(1, 4)), int(rng.integers(1, 4))
        size = ranks * accumulation * int(rng.integers(1, 6))
        for rank in range(ranks):
            kwargs = {"rank": rank, "drop_last": bool(case % 2), "shuffle": bool(case % 3)}
            theirs = reference(lengths, size, ranks, accumulation, **kwargs)
            ours = BatchRebalanceSampler(lengths, size, ranks, accumulation, **kwargs)
            theirs.set_epoch(case)
            ours.set_epoch(case)
            assert list(ours) == list(theirs) and len(ours) == len(theirs)


def test_rebalancing_balances():
    lengths = np.random.default_rng(0).lognormal(4, 1, 640).astype(int) + 1
    cost = lambda rows: len(rows) * max(lengths[rows])  # noqa: E731
    balanced = [list(BatchRebalanceSampler(lengths, 64, 4, 1, rank=r)) for r in range(4)]
    equal = permutation(640, 42).reshape(10, 4, 16)
    spread = [max(c) / min(c) for c in ([cost(balanced[r][s]) for r in range(4)] for s in range(10))]
    plain = [max(c) / min(c) for c in ([cost(equal[s, r]) for r in range(4)] for s in range(10))]
    assert np.mean(spread) < 0.7 * np.mean(plain)
    step = list(chain(*(balanced[r][0] for r in range(4))))
    assert sorted(step) == sorted(permutation(640, 42)[:64].tolist())
    with pytest.raises(ArgumentError, match="batch_rebalance"):
        BatchRebalanceSampler(lengths, 3, 2, 2)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_rank_batches_equal_accelerate(split, even, drop_last):
    for num_rows in range(24):
        order = permutation(num_rows, num_rows)
        for batch_size in range(1, 7):
            for ranks in (1, 2, 3):
                if split and batch_size % ranks:
                    continue
                for rank in range(ranks):
                    reference = BatchSampler(order.tolist(), batch_size, drop_last)
                    if ranks > 1:
                        reference = BatchSamplerShard(reference, ranks, rank, split, even)
                    expected = list(reference)
                    for start in (0, 1, 3):
                        batches = rank_batches(
                            order,
                            batch_size,
                            drop_last=drop_last,
                            num_processes=ranks,
                            process_index=rank,
                            split_batches=split,
                            even_batches=even,
                            start=start,
                        )
                        assert list(batches) == expected[start:]


def test_lengths_come_from_the_column_the_offsets_or_the_rows():
    dataset = Dataset.from_dict({"input_ids": [[1], [1, 2], [1, 2, 3]], "length": [10, 20, 30]})
    assert row_lengths(dataset).tolist() == [10, 20, 30]
    assert row_lengths(dataset.select([2, 0])).tolist() == [30, 10]
    assert row_lengths(dataset, "missing").tolist() == [1, 2, 3]
    assert row_lengths([{"input_ids": [1, 1]}, {"input_ids": [1]}]).tolist() == [2, 1]
    with pytest.raises(DataFormatError, match="the dataset has: text"):
        row_lengths(Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(DataFormatError, match="mappings with `input_ids`"):
        row_lengths([(1, 2)])


def arguments(**kwargs):
    defaults = {
        "train_sampling_strategy": "random",
        "seed": 42,
        "data_seed": None,
        "length_column_name": "length",
        "train_batch_size": 2,
        "eval_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "world_size": 1,
        "process_index": 0,
        "dataloader_drop_last": False,
    }
    return SimpleNamespace(**(defaults | kwargs))


def test_strategies(caplog):
    dataset = Dataset.from_dict({"input_ids": [[1]] * 9})
    kinds = {"random": SeededRandomSampler, "sequential": SequentialSampler, "group_by_length": LengthGroupedSampler}
    for strategy, kind in (kinds | {"batch_rebalance": BatchRebalanceSampler}).items():
        assert type(train_sampler(dataset, arguments(train_sampling_strategy=strategy))) is kind
    assert train_sampler(dataset, arguments(data_seed=7)).seed == 7
    assert type(eval_sampler(dataset, arguments())) is SequentialSampler
    assert isinstance(eval_sampler(dataset, arguments()), torch.utils.data.SequentialSampler)
    stream = dataset.to_iterable_dataset()
    assert train_sampler(stream, arguments(train_sampling_strategy="group_by_length")) is None
    assert eval_sampler(None, arguments()) is None


def test_the_order_by_length_does_not_depend_on_how_many_processes_share_a_step() -> None:
    """As for every other order; transformers groups by the rows of one process."""
    dataset = Dataset.from_dict({"input_ids": [[1] * (1 + i * 7 % 11) for i in range(1000)]})
    grouped = {"train_sampling_strategy": "group_by_length"}
    alone = list(train_sampler(dataset, arguments(gradient_accumulation_steps=4, **grouped)))
    shared = list(train_sampler(dataset, arguments(gradient_accumulation_steps=2, world_size=2, **grouped)))
    smaller = list(train_sampler(dataset, arguments(gradient_accumulation_steps=2, **grouped)))
    assert shared == alone != smaller
