"""One `train()` call: everything that lives exactly as long as the run."""

import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from finetune.distributed import ranks
from finetune.distributed.accelerator import zero_stage
from finetune.engine.meter import LossMeter
from finetune.engine.plan import ResumePoint, StepPlan
from finetune.hooks import LoopHooks
from finetune.optim.schedules import needs_metric
from finetune.wrappers import clips_its_own_gradients

if TYPE_CHECKING:
    from accelerate import Accelerator

    from finetune.arguments import TrainingArguments

# More micro-batches than an epoch has; small enough that a place is exact in float64.
PLACES = 2**32


@dataclass
class TrainingRun:
    """What the loop works on. Made by `Trainer._inner_training_loop`, dropped when it returns.

    Attributes:
        model: the prepared (wrapped, sharded, compiled) model.
        loader: the prepared training loader.
        optimizer, lr_scheduler: as `accelerator.prepare` and `create_scheduler` returned them.
        skip_batches: `(loader, n) -> loader` that starts behind n batches.
        restore_rng: loads the checkpoint's random state; called once, after the first window was fetched, because
            creating the loader's iterator draws from the global generator; before that where a new epoch starts.
        before_step: called before every optimizer step; a checkpoint may still be copying the weights.
        token_counter: `(inputs) -> tokens`, None when tokens are not tracked.
        ends_epoch: whether a callback has asked to end this epoch.
        is_preempted: whether a signal ends this run, so that another one goes on.
        epoch, batches_done: position, in epochs and in micro-batches of this epoch.
        batches_updated: those of them behind the last finished update.
        epoch_is_over: whether the next batch belongs to the next epoch.
        stepping: whether an update is half done, so that the state is not one to save.
        owes_evaluation: whether the evaluation after the last update was cut short by a signal.
        window_batches: micro-batches of the current window (`current_gradient_accumulation_steps`).
        flos: floating point operations of this process since they were last stored.
        observers: who watches the first update: `micro_batch(model)`, `before_update` and `after_update`.
        random_rows: whether rows come out differently each time they are read, None before it is known; such rows are
            not compared when a run is resumed.
        memory, precision: its memory and its number formats, for the report; None when nobody asked.
    """

    args: "TrainingArguments"
    accelerator: "Accelerator"
    model: nn.Module
    loader: Any
    plan: StepPlan
    resume: ResumePoint
    optimizer: Any
    lr_scheduler: Any
    meter: LossMeter
    skip_batches: Callable[[Any, int], Iterable[Any]]
    restore_rng: Callable[[], None] | None = None
    before_step: Callable[[], None] = lambda: None
    ends_epoch: Callable[[], bool] = lambda: False
    is_preempted: Callable[[], bool] = lambda: False
    token_counter: Callable[[dict[str, Any]], Tensor | int | None] | None = None
    trial: Any = None
    ignore_keys_for_eval: list[str] | None = None
    start_time: float = field(default_factory=time.time)
    initial_step: int = 0
    initial_tokens: int = 0
    epoch: int = 0
    epoch_is_over: bool = False
    batches_done: int = 0
    batches_updated: int = 0
    stepping: bool = False
    owes_evaluation: bool = False
    window_batches: int = 1
    grad_norm: Any = None
    learning_rate: float | None = None
    flos: float = 0.0
    tokens: Any = 0
    observers: list[Any] = field(default_factory=list)
    random_rows: bool | None = None
    memory: Any = None
    precision: Any = None

    def __post_init__(self) -> None:
        self._engine_owns_gradients = zero_stage(self.accelerator) is not None
        self._sync_always = self._engine_owns_gradients or bool(
            self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        )
        self._no_sync = partial(self.accelerator.no_sync, model=self.model)
        self._single = self.accelerator.num_processes == 1
        # Layerwise GaLore keeps projections in place of gradients, and they too belong to one window only.
        self._optimizer_owns_gradients = clips_its_own_gradients(self.optimizer)
        # Frozen ones too: a callback may unfreeze them.
        self._parameters = list(self.model.parameters())
        self._metric_schedule = needs_metric(self.lr_scheduler)

    @property
    def place(self) -> int:
        """Epoch and micro-batch as one number: `epoch * PLACES + micro-batch`."""
        return self.epoch * PLACES + self.batches_done

    def set_epoch(self, epoch: int) -> None:
        """Tells the loader, its sampler and its batch sampler which epoch comes."""
        targets = [self.loader, getattr(self.loader, "batch_sampler", None)]
        targets.append(getattr(targets[1], "batch_sampler", None))
        for target in targets:
            set_epoch = getattr(target, "set_epoch", None)
            if callable(set_epoch):
                set_epoch(epoch)

    def restore_rng_once(self) -> None:
        restore, self.restore_rng = self.restore_rng, None
        if restore is not None:
            restore()

    def set_sync(self, last: bool) -> None:
        """Tells accelerate whether this backward pass ends a window: its optimizer wrapper steps only then."""
        state = self.accelerator.gradient_state
        if state.sync_gradients is not last:
            state._set_sync_gradients(last)

    def sync_context(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Returns the context of one micro-batch: gradients are exchanged at the last one of a window only."""
        if last or self._single or self._sync_always:
            return contextlib.nullcontext()
        return self._no_sync()

    def count_work(self, hooks: LoopHooks, inputs: dict[str, Any]) -> None:
        """Adds one micro-batch to the counters of operations and tokens; tokens stay on the device until a log."""
        self.flos += float(hooks.floating_point_ops(inputs))
        if self.token_counter is not None:
            counted = self.token_counter(inputs)
            if counted is not None:
                self.tokens = self.tokens + counted

    def drain_tokens(self) -> int:
        """Returns the tokens counted since the last call, over all processes. Reads the device."""
        count, self.tokens = self.tokens, 0
        if self.accelerator.num_processes > 1:
            local = torch.as_tensor(count, dtype=torch.int64, device=self.args.device)
            return int(ranks.sum_over_processes(local, self.accelerator))
        return int(count)

    def step_schedule(self) -> None:
        """Advances the schedule, unless the optimizer skipped the step (fp16 overflow) or it waits for a metric."""
        if not self.accelerator.optimizer_step_was_skipped and not self._metric_schedule:
            self.lr_scheduler.step()

    @property
    def scaler(self) -> Any:
        """The loss scaler of fp16, None without one."""
        scaler = getattr(self.accelerator, "scaler", None)
        return scaler if scaler is not None and scaler.is_enabled() else None

    def drop_update(self) -> None:
        """Stands for an optimizer step that is left out: a loss scaler must hear of it before the next one."""
        if self.scaler is not None:
            self.scaler.update()

    def observed(self) -> contextlib.AbstractContextManager[Any]:
        """Returns the context of one micro-batch for those who watch the run's first update."""
        if not self.observers:
            return contextlib.nullcontext()
        stack = contextlib.ExitStack()
        for observer in self.observers:
            stack.enter_context(observer.micro_batch(self.model))
        return stack

    def before_update(self) -> None:
        for observer in self.observers:
            observer.before_update(self.model, self.optimizer)

    def after_update(self) -> None:
        """Tells the observers that the first update is done; they are not told of any other."""
        observers, self.observers = self.observers, []
        for observer in observers:
            observer.after_update(self.model, self.optimizer)

    def clear_gradients(self) -> None:
        """Frees the gradients. DeepSpeed keeps its own and is asked instead."""
        if self._engine_owns_gradients:
            self.model.zero_grad()
            return
        if self._optimizer_owns_gradients:
            self.optimizer.zero_grad()
        for parameter in self._parameters:
            parameter.grad = None

    def abandon_window(self) -> None:
        """Forgets a window that ends without an update, because a callback stopped the epoch inside it."""
        self.clear_gradients()
        self.meter.forget_window()


class OwedEvaluation:
    """Whether a run owes an evaluation, as part of a checkpoint."""

    def __init__(self, run: TrainingRun) -> None:
        self.run = run

    def state_dict(self) -> dict[str, bool]:
        return {"owed": self.run.owes_evaluation}

    def load_state_dict(self, state_dict: dict[str, bool]) -> None:
        self.run.owes_evaluation = state_dict["owed"]
