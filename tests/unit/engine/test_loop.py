"""The loop with a fake of a few methods: no model, no data, no accelerate."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune.control.callbacks import CallbackHandler, Events, TrainerCallback
from finetune.control.state import TrainerControl, TrainerState
from finetune.engine.loop import run_training
from finetune.engine.meter import LossMeter
from finetune.engine.plan import ResumePoint, StepPlan
from finetune.engine.run import TrainingRun


class FakeHooks:
    """Records what the loop asks for; batches are numbers, the loss of a batch is its number."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def get_batch_samples(self, iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        batches = list(itertools.islice(iterator, num_batches))
        self.calls.append(f"fetch {len(batches)}/{num_batches}")
        return batches, None

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        self.calls.append(f"step {inputs}")
        return torch.tensor(float(inputs))

    def _clip_grad_norm(self, model: Any) -> float:
        self.calls.append("clip")
        return 1.0

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return grad_norm

    def _get_learning_rate(self) -> float:
        return 0.1

    def floating_point_ops(self, inputs: Any) -> int:
        return 10

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append("report")


class FakeLoader(list[int]):
    epochs: list[int]

    def set_epoch(self, epoch: int) -> None:
        self.epochs = [*getattr(self, "epochs", []), epoch]


class FakeAccelerator:
    num_processes = 1
    state = None
    optimizer_step_was_skipped = False

    def __init__(self) -> None:
        self.syncs: list[bool] = []
        self.gradient_state = SimpleNamespace(
            sync_gradients=True, plugin_kwargs={}, _set_sync_gradients=self._set_sync_gradients
        )

    def _set_sync_gradients(self, value: bool) -> None:
        self.gradient_state.sync_gradients = value
        self.syncs.append(value)

    def no_sync(self, model: Any) -> Any:
        raise AssertionError("one process never delays a synchronisation")


class Counter:
    """An optimizer and a schedule that count their steps."""

    def __init__(self) -> None:
        self.steps = 0

    def step(self) -> None:
        self.steps += 1


class Stopper(TrainerCallback):
    def __init__(self, at: int, field: str) -> None:
        self.at, self.field = at, field

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        return {self.field: state.global_step == self.at}


def make(
    batches: int, accumulation: int, epochs: int = 1, done: int = 0, callback: Any = None, **changes: Any
) -> tuple[TrainingRun, FakeHooks, Events]:
    loader = FakeLoader(range(batches))
    plan = StepPlan.resolve(
        num_batches=batches,
        num_examples=batches,
        accumulation=accumulation,
        num_train_epochs=epochs,
        max_steps=-1,
        total_batch_size=accumulation,
    )
    args: Any = SimpleNamespace(device=torch.device("cpu"), max_grad_norm=1.0)
    settings: dict[str, Any] = {
        "args": args,
        "accelerator": FakeAccelerator(),
        "model": torch.nn.Linear(1, 1),
        "loader": loader,
        "plan": plan,
        "resume": plan.resume_at(done),
        "optimizer": Counter(),
        "lr_scheduler": Counter(),
        "meter": LossMeter(args.device, "raise", done),
        "skip_batches": lambda data, count: data[count:],
    }
    run = TrainingRun(**{**settings, **changes})
    state = TrainerState()
    state.global_step = done
    handler = CallbackHandler([callback] if callback else [], None, None, None, None)
    return run, FakeHooks(), Events(args, handler, state, TrainerControl())


def test_windows_steps_and_epochs() -> None:
    run, hooks, events = make(batches=5, accumulation=2, epochs=2)
    run_training(run, hooks, events)
    one_epoch = [
        *["fetch 2/2", "step 0", "step 1", "clip", "report"],
        *["fetch 2/2", "step 2", "step 3", "clip", "report"],
        *["fetch 1/1", "step 4", "clip", "report"],
        "report",
    ]
    assert hooks.calls == one_epoch * 2
    assert (events.state.global_step, events.state.epoch) == (6, 2.0)
    assert (run.optimizer.steps, run.lr_scheduler.steps) == (6, 6)
    assert run.loader.epochs == [0, 1]
    assert run.meter.running == 2 * (0 + 1 + 2 + 3 + 4)
    assert run.flos == 100.0


def test_gradients_are_synchronised_at_the_last_batch_of_a_window_only() -> None:
    run, hooks, events = make(batches=4, accumulation=2)
    run_training(run, hooks, events)
    assert run.accelerator.syncs == [False, True, False, True]


def test_a_resumed_epoch_starts_behind_what_was_seen() -> None:
    run, hooks, events = make(batches=5, accumulation=2, epochs=2, done=4)
    assert run.resume == ResumePoint(1, 1, 2)
    run_training(run, hooks, events)
    assert [call for call in hooks.calls if call.startswith("step")] == ["step 2", "step 3", "step 4"]
    assert (events.state.global_step, events.state.epoch) == (6, 2.0)


def test_random_state_is_restored_once_after_the_first_fetch() -> None:
    seen: list[int] = []
    run, hooks, events = make(batches=4, accumulation=1, done=2)
    run.restore_rng = lambda: seen.append(len(hooks.calls))
    run_training(run, hooks, events)
    assert seen == [1]


@pytest.mark.parametrize(("field", "steps"), [("should_training_stop", 2), ("should_epoch_stop", 5)])
def test_a_callback_stops_the_run_or_the_epoch(field: str, steps: int) -> None:
    run, hooks, events = make(batches=3, accumulation=1, epochs=2, callback=Stopper(2, field))
    run_training(run, hooks, events)
    assert events.state.global_step == steps


def test_a_bad_window_is_skipped_by_policy() -> None:
    run, hooks, events = make(batches=2, accumulation=1, meter=LossMeter(torch.device("cpu"), "skip_step", 0))
    hooks._get_grad_norm = lambda model, grad_norm=None: float("nan")  # type: ignore[method-assign]
    run_training(run, hooks, events)
    assert (run.optimizer.steps, run.lr_scheduler.steps, events.state.global_step) == (0, 0, 2)


class ScaledOptimizer:
    """What accelerate makes of an optimizer under fp16: the scaler decides whether it steps."""

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        self.optimizer, self.scaler = optimizer, scaler

    def step(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()


def test_skipped_windows_with_a_loss_scaler() -> None:
    """Window 1 overflows, which the scaler answers by itself; window 2 has a NaN loss; 0 and 3 are good."""
    model = torch.nn.Linear(1, 1, bias=False)
    before = model.weight.item()
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=4.0)
    accelerator: Any = FakeAccelerator()
    accelerator.scaler = scaler
    run, hooks, events = make(
        batches=4,
        accumulation=1,
        model=model,
        optimizer=ScaledOptimizer(optimizer, scaler),
        accelerator=accelerator,
        meter=LossMeter(torch.device("cpu"), "skip_step", 0),
    )

    def training_step(_: Any, inputs: int, num_items_in_batch: Any = None) -> torch.Tensor:
        model.weight.grad = scaler.scale(torch.full((1, 1), float("inf") if inputs == 1 else 1.0))
        return torch.tensor(float("nan") if inputs == 2 else 1.0)

    def clip(_: Any) -> torch.Tensor:
        scaler.unscale_(optimizer)
        assert model.weight.grad is not None
        return model.weight.grad.norm()

    hooks.training_step, hooks._clip_grad_norm = training_step, clip  # type: ignore[method-assign,assignment]
    run_training(run, hooks, events)
    assert events.state.global_step == 4
    assert model.weight.item() == pytest.approx(before - 0.2)
    assert scaler.get_scale() == 2.0, "lowered once, by the overflow"


def test_data_without_batches_stops_instead_of_spinning(caplog: pytest.LogCaptureFixture) -> None:
    run, hooks, events = make(batches=2, accumulation=1, epochs=5)
    run.loader.clear()
    run_training(run, hooks, events)
    assert events.state.global_step == 0
    assert "no batch" in caplog.text


class StopInside(TrainerCallback):
    """Stops the epoch between two micro-batches of the second update, once."""

    stopped = False

    def on_substep_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        wanted, self.stopped = state.global_step == 1 and not self.stopped, self.stopped or state.global_step == 1
        return {"should_epoch_stop": wanted}


def test_a_window_that_is_abandoned_leaves_no_gradients() -> None:
    meter = LossMeter(torch.device("cpu"), "skip_step", 0)
    run, hooks, events = make(batches=4, accumulation=2, epochs=2, callback=StopInside(), meter=meter)
    found: list[list[Any]] = []
    step = hooks.training_step

    def training_step(model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        found.append([parameter.grad for parameter in model.parameters()])
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        step(model, inputs)
        return torch.tensor(float("nan") if len(found) == 3 else 1.0)

    hooks.training_step = training_step  # type: ignore[method-assign]
    run_training(run, hooks, events)
    assert [call for call in hooks.calls if call.startswith("step")] == ["step 0", "step 1", "step 2"] + [
        f"step {number}" for number in range(4)
    ]
    assert found[3] == [None, None], "those of the abandoned micro-batch are gone"
    assert run.optimizer.steps == 3, "and its loss drops no other update"


def test_gradients_of_parameters_unfrozen_later_are_cleared() -> None:
    model = torch.nn.Linear(1, 1).requires_grad_(False)
    run, _, _ = make(batches=1, accumulation=1, model=model)
    model.requires_grad_(True)
    model(torch.ones(1, 1)).sum().backward()
    run.clear_gradients()
    assert [parameter.grad for parameter in model.parameters()] == [None, None]
