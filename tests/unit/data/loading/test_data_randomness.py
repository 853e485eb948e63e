"""The random states before fetches: numbered as the batches of a process, kept, and replayed."""

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, DataLoader

from finetune.data.loading import randomness
from finetune.data.loading.position import SkippedBatches, fetches_of, watch_fetches
from finetune.data.loading.randomness import FetchRandomness
from finetune.data.loading.samplers import SeededRandomSampler


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_states_are_taken_without_drawing_and_come_back() -> None:
    state = randomness.plain(randomness.capture())
    first = draws()
    randomness.restore(state)
    assert draws() == first


def test_fixed_draws_the_same_and_is_not_noticed() -> None:
    before = randomness.plain(randomness.capture())
    seen = []
    for _ in range(2):
        with randomness.fixed():
            seen.append(draws())
    expected = draws()
    randomness.restore(before)
    assert seen[0] == seen[1]
    assert draws() == expected


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("skipped", [0, 1])
def test_each_batch_has_the_state_it_was_fetched_in(processes: int, split: bool, skipped: int) -> None:
    rank = processes - 1
    batches: Any = BatchSampler(SeededRandomSampler(range(22), 0), 4, drop_last=False)
    if processes > 1:
        batches = BatchSamplerShard(batches, processes, rank, split_batches=split)
    fetched: list[tuple[list[int], tuple[float, float, float]]] = []

    def collate(rows: list[int]) -> None:
        fetched.append((rows, draws()))

    watched = SimpleNamespace(num_workers=0, batch_sampler=batches)
    watch_fetches(watched, num_kept=100)
    fetches = fetches_of(watched)
    assert fetches is not None
    source: Any = range(22)
    rest = SkippedBatches(batches, skipped) if skipped else batches
    loader = DataLoader(source, batch_sampler=rest, collate_fn=collate)
    for _ in loader:
        draws()  # training draws as well
    assert len(fetched) == len(batches) - skipped
    for number, (_, drawn) in enumerate(fetched, skipped):
        state = fetches.of(number)
        assert state is not None
        randomness.restore(state)
        assert draws() == drawn
    assert fetches.of(len(fetched) + skipped + 1) is None


def test_only_the_last_states_are_kept_and_an_epoch_starts_anew() -> None:
    fetches = FetchRandomness(num_kept=2)
    for number in range(4):
        fetches.before_fetch(number)
    assert [fetches.of(number) is not None for number in range(4)] == [False, False, True, True]
    fetches.start_epoch()
    assert fetches.of(3) is None


def test_replay_draws_one_batch_from_its_state_and_the_next_after_it() -> None:
    fetches, order = FetchRandomness(4), []
    state = randomness.plain(randomness.capture())
    first = draws()
    fetches.replay(7, state, then=lambda: order.append("then"))
    fetches.before_fetch(7)
    assert (draws(), order) == (first, [])
    fetches.before_fetch(8)
    fetches.before_fetch(9)
    assert order == ["then"]


def test_without_a_state_the_run_goes_on_before_the_first_fetch() -> None:
    fetches, order = FetchRandomness(4), []
    fetches.replay(7, None, then=lambda: order.append("then"))
    fetches.before_fetch(7)
    assert order == ["then"]


def test_workers_are_not_watched() -> None:
    loader = SimpleNamespace(num_workers=2, batch_sampler=BatchSampler(SeededRandomSampler(range(4), 0), 2, False))
    watch_fetches(loader, 3)
    assert fetches_of(loader) is None


@pytest.mark.parametrize("draw", ["nothing", "rand", "randn", "one of two normals", "another seed"])
def test_numpys_state_is_always_the_one_of_the_fetch(draw: str) -> None:
    before = np.random.get_state()
    try:
        np.random.seed(0)
        fetches, expected = FetchRandomness(10), []
        for number in range(6):
            expected.append(randomness.plain(randomness.capture())["numpy"])
            fetches.before_fetch(number)
            if draw == "rand":
                np.random.rand()
            elif draw == "randn" or (draw == "one of two normals" and number in (1, 3)):
                np.random.randn()
            elif draw == "another seed" and number == 2:
                np.random.seed(1)
        for number in range(6):
            found = fetches.of(number)
            assert found is not None
            assert found["numpy"] == expected[number]
    finally:
        np.random.set_state(before)
