"""Device sums between two logs, and honesty about non-finite losses."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune.distributed import ranks
from finetune.engine.meter import LossMeter, MetricBag
from finetune.errors import NonFiniteLossError

ALONE: Any = SimpleNamespace(num_processes=1)
CPU = torch.device("cpu")


def test_drain_returns_the_sum_and_starts_again() -> None:
    meter = LossMeter(CPU, "raise", start_step=3)
    running = meter.running
    meter.add(torch.tensor(1.5), 3)
    meter.add(torch.tensor(0.5), 3)
    assert meter.drain(ALONE, 4) == (2.0, 0)
    assert meter.drain(ALONE, 4) == (0.0, 0)
    assert (meter.total, meter.logged_at) == (2.0, 4)
    assert meter.running is running, "callers hold on to the tensor"


def test_raise_stops_at_the_first_nan_and_says_where() -> None:
    meter = LossMeter(CPU, "raise", 0)
    with pytest.raises(NonFiniteLossError, match="update 8"):
        meter.add(torch.tensor(float("nan")), 7)


def test_log_keeps_the_nan_and_counts_it() -> None:
    meter = LossMeter(CPU, "log", 0)
    meter.add(torch.tensor(1.0), 0)
    meter.add(torch.tensor(float("inf")), 0)
    loss, bad = meter.drain(ALONE, 1)
    assert loss == float("inf")
    assert bad == 1
    meter.add(torch.tensor(1.0), 1)
    assert meter.drain(ALONE, 2) == (1.0, 0), "the NaN must not stay in the running sum"


def test_skip_step_drops_only_the_bad_window() -> None:
    meter = LossMeter(CPU, "skip_step", 0)
    meter.add(torch.tensor(float("nan")), 0)
    assert meter.window_is_bad(torch.tensor(1.0))
    meter.add(torch.tensor(1.0), 1)
    assert not meter.window_is_bad(torch.tensor(1.0))
    assert meter.window_is_bad(torch.tensor(float("inf"))), "an infinite gradient norm counts too"


def test_a_device_is_not_waited_for_and_counts_as_the_host_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(_: torch.Tensor) -> None:
        raise AssertionError("a value was read from the device")

    meters = [LossMeter(CPU, "log", 0), LossMeter(CPU, "log", 0)]
    for meter, on_host in zip(meters, (True, False), strict=True):
        meter._on_host = on_host
        with monkeypatch.context() as patch:
            if not on_host:
                patch.setattr(torch.Tensor, "item", wait)
                patch.setattr(torch.Tensor, "__bool__", wait)
            for place, loss in enumerate((1.0, float("nan"), 2.0, float("inf"))):
                meter.add(torch.tensor(loss), step=place, place=place)
            for items in (0, 5, 0):
                meter.note_items(torch.tensor(items))
    found = [[int(each) for each in (meter._nonfinite, meter._first_bad, meter._unlabelled)] for meter in meters]
    assert found == [[2, 1, 2]] * 2


def test_state_survives() -> None:
    meter = LossMeter(CPU, "raise", 0)
    meter.add(torch.tensor(0.1), 0)
    other = LossMeter(CPU, "raise", 0)
    other.load_state_dict(meter.state_dict())
    assert torch.equal(other.running, meter.running)


def test_metric_bag_weighs_by_count() -> None:
    bag = MetricBag()
    bag.add("accuracy", torch.tensor(3.0), 4)
    bag.add("accuracy", torch.tensor(1.0), torch.tensor(12))
    bag.add("empty", torch.tensor(0.0), 0)
    assert bag.drain() == {"accuracy": 0.25}
    assert bag.drain() == {}


def test_sums_on_a_device_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = MetricBag()
    saved.add("accuracy", torch.tensor(3.0), 4)
    monkeypatch.setattr(ranks, "sum_dtype", lambda device: torch.float32)
    bag = MetricBag()
    bag.load_state_dict(saved.state_dict())
    bag.add("accuracy", torch.tensor(1.0), torch.tensor(12))
    assert bag.state_dict()["accuracy"].dtype == torch.float32
    assert bag.drain() == {"accuracy": 0.25}


def test_other_process_counts_take_over_what_was_not_logged_yet() -> None:
    meters = [LossMeter(CPU, "raise", 0), LossMeter(CPU, "raise", 0)]
    for meter, loss in zip(meters, (1.0, 3.0), strict=True):
        meter.add(torch.tensor(loss), 0)
    alone = LossMeter(CPU, "raise", 0)
    alone.load_state_dicts([meter.state_dict() for meter in meters])
    assert alone.running == 2.0

    bags = [MetricBag(), MetricBag()]
    bags[0].add("accuracy", torch.tensor(1.0), 2)
    bags[1].add("accuracy", torch.tensor(5.0), 6)
    joined = MetricBag()
    joined.load_state_dicts([bag.state_dict() for bag in bags])
    joined.add("accuracy", torch.tensor(0.0), 4)
    assert joined.drain() == {"accuracy": 0.5}


def test_several_processes_stop_together_and_before_a_checkpoint() -> None:
    """The first of two processes met a NaN at place 5: it goes on until both learn of it."""

    def gather(mine: torch.Tensor) -> torch.Tensor:
        return torch.cat([mine, torch.tensor([[1.0, 0.0, -1.0, 0.0]], dtype=torch.float64)])

    both: Any = SimpleNamespace(num_processes=2, gather=gather)
    meter = LossMeter(CPU, "raise", 0, lambda place, process: f"batch {place} of process {process}", processes=2)
    meter.require_finite(both, 1)
    meter.add(torch.tensor(float("nan")), 1, place=5)
    for check in (meter.require_finite, meter.drain):
        with pytest.raises(NonFiniteLossError, match="by update 2, first in batch 5 of process 0"):
            check(both, 2)


def test_windows_without_labels_are_counted_and_said(caplog: pytest.LogCaptureFixture) -> None:
    meter = LossMeter(CPU, "raise", 0)
    for items in (0, 5, 0):
        meter.note_items(torch.tensor(items))
        meter.add(torch.tensor(0.0), 0)
    assert meter.drain(ALONE, 3) == (0.0, 0)
    assert "2 of the updates after step 0, up to step 3, had no label in the loss" in caplog.text
    caplog.clear()
    meter.drain(ALONE, 6)
    assert not caplog.text


@pytest.mark.parametrize("policy", ["raise", "log"])
def test_a_nan_of_no_labels_does_not_blame_the_learning_rate(policy: Any) -> None:
    meter = LossMeter(CPU, policy, 0)
    meter.note_items(torch.tensor(0))
    if policy == "log":
        meter.add(torch.tensor(float("nan")), 0)
        meter.policy = "raise"
        with pytest.raises(NonFiniteLossError, match="1 of the updates had no label in the loss") as raised:
            meter.require_finite(ALONE, 1)
    else:
        with pytest.raises(NonFiniteLossError, match="1 of the updates had no label in the loss") as raised:
            meter.add(torch.tensor(float("nan")), 0)
    assert "learning_rate" not in str(raised.value)
