import threading

import torch
from torch import nn

from finetune.reporting import memory
from finetune.reporting.memory import MemoryTracker, memory_use

STEP = 64 << 20


def test_kept_memory_and_passing_peak_are_told_apart():
    tracker = MemoryTracker(skip=False)
    tracker.start("train")
    kept = torch.ones(STEP // 4)
    passing = torch.ones(2 * STEP // 4)
    threading.Event().wait(0.05)
    del passing
    metrics = {"train_loss": 1.0}
    tracker.stop(metrics)
    assert metrics["train_mem_cpu_alloc_delta"] > 0.8 * STEP
    assert metrics["train_mem_cpu_peaked_delta"] > 1.5 * STEP
    assert kept.numel() and metrics["train_loss"] == 1.0


def test_names_are_those_of_transformers():
    from transformers.trainer_utils import TrainerMemoryTracker

    class Caller:
        tracker = TrainerMemoryTracker(False)

        def __init__(self):
            self.tracker.start()
            self.tracker.stop_and_update_metrics()

        def train(self, metrics):
            self.tracker.start()
            self.tracker.stop_and_update_metrics(metrics)

    theirs, mine = {}, {}
    Caller().train(theirs)
    tracker = MemoryTracker(skip=False)
    tracker.start("init")
    tracker.stop()
    tracker.start("train")
    tracker.stop(mine)
    assert set(mine) == set(theirs)


def test_a_nested_phase_belongs_to_the_outer_one():
    tracker, inner, outer = MemoryTracker(skip=False), {}, {}
    tracker.start("train")
    tracker.start("eval")
    tracker.stop(inner)
    tracker.stop(outer)
    assert inner == {} and "train_mem_cpu_alloc_delta" in outer


def test_a_run_that_ended_in_an_error_does_not_hide_the_next_one():
    tracker, metrics = MemoryTracker(skip=False), {}
    tracker.start("train")
    tracker.start("eval")
    tracker.start("train")
    tracker.stop(metrics)
    assert "train_mem_cpu_alloc_delta" in metrics
    assert not [thread for thread in threading.enumerate() if thread.name == "memory-peak"]


def test_skipping_costs_nothing():
    tracker, metrics = MemoryTracker(), {}
    tracker.start("train")
    tracker.stop(metrics)
    tracker.stop(metrics)
    assert metrics == {}


def test_use_counts_each_storage_once():
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False), nn.BatchNorm1d(4))
    model[1].weight = model[0].weight
    model[2].to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    before = memory_use(model, optimizer)
    assert (before.parameters, before.gradients, before.optimizer) == (400 + 16, 0, 0)
    assert before.dtypes == {"float32": 100, "bfloat16": 8}
    model[0](torch.ones(2, 10)).sum().backward()
    optimizer.step()
    after = memory_use(model, optimizer)
    # Two moments of the one matrix with a gradient, and its step counter.
    assert (after.gradients, after.optimizer) == (400, 804)
    assert after.buffers == 2 * 8 + 8
    assert after.total == 416 + 400 + 804 + 24


def test_views_of_one_storage_count_once():
    whole = torch.zeros(100)
    model = nn.ParameterList([nn.Parameter(whole[:40]), nn.Parameter(whole[40:])])
    assert memory_use(model).parameters == 400 and memory_use(model).dtypes == {"float32": 100}


def test_use_of_a_model_without_memory():
    with torch.device("meta"):
        model = nn.Linear(1000, 1000)
    assert memory_use(model).parameters == 0 and memory_use(model).dtypes == {"float32": 1_001_000}


def test_process_memory():
    assert memory.peak_rss_bytes() >= 0.9 * memory.rss_bytes() > 50 << 20
    if not torch.accelerator.is_available():
        assert memory.peak_device_bytes() is None
