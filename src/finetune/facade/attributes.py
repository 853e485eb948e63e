"""`RunAttributes`: what can be read and set on a trainer and is kept elsewhere, so that it is true in one place."""

import warnings
from typing import Any, cast

from torch import Tensor

from finetune.arguments import TrainingArguments
from finetune.arguments.coerce import coerce_training_arguments
from finetune.control.callbacks import CallbackHandler, Events
from finetune.control.state import TrainerControl, TrainerState
from finetune.engine.run import TrainingRun


class RunAttributes:
    """Views of `Events`, which the callbacks see too, and of the run in progress. Use `Trainer`."""

    processing_class: Any
    _events: Events = cast(Events, None)
    _run: TrainingRun | None = None
    _train_batch_size: int

    @property
    def args(self) -> TrainingArguments:
        """The arguments. Others may be set between two runs, of any kind that the constructor takes.

        What the constructor made of the first ones stays: the accelerator, the device, the callbacks.
        """
        return self._events.args

    @args.setter
    def args(self, value: Any) -> None:
        self._use_arguments(value)

    def _use_arguments(self, value: Any) -> None:
        args = coerce_training_arguments(value, TrainingArguments)
        self._train_batch_size = args.train_batch_size
        if self._events is None:
            self._events = Events(args, cast(CallbackHandler, None), TrainerState(), TrainerControl())
        self._events.args = args

    @property
    def output_dir(self) -> str:
        """The folder of the run. Arguments leave it unset only before they are made."""
        assert self.args.output_dir is not None
        return self.args.output_dir

    @property
    def state(self) -> TrainerState:
        return self._events.state

    @state.setter
    def state(self, value: TrainerState) -> None:
        self._events.state = value

    @property
    def control(self) -> TrainerControl:
        return self._events.control

    @control.setter
    def control(self, value: TrainerControl) -> None:
        self._events.control = value

    @property
    def current_gradient_accumulation_steps(self) -> int:
        """Micro-batches of the window in progress: fewer than `gradient_accumulation_steps` at the end of an epoch."""
        return self._run.window_batches if self._run else self.args.gradient_accumulation_steps

    # Read and written by overrides of `_maybe_log_save_evaluate` that log by themselves.

    @property
    def _tr_loss(self) -> Tensor | None:
        return self._run.meter.running if self._run else None

    @property
    def _total_loss_scalar(self) -> float:
        return self._run.meter.total if self._run else 0.0

    @_total_loss_scalar.setter
    def _total_loss_scalar(self, value: float) -> None:
        if self._run:
            self._run.meter.total = value

    @property
    def _globalstep_last_logged(self) -> int:
        return self._run.meter.logged_at if self._run else 0

    @_globalstep_last_logged.setter
    def _globalstep_last_logged(self, value: int) -> None:
        if self._run:
            self._run.meter.logged_at = value

    @property
    def tokenizer(self) -> Any:
        """The old name of `processing_class`."""
        warnings.warn("`trainer.tokenizer` is now called `trainer.processing_class`.", FutureWarning, stacklevel=2)
        return self.processing_class

    @tokenizer.setter
    def tokenizer(self, value: Any) -> None:
        warnings.warn("`trainer.tokenizer` is now called `trainer.processing_class`.", FutureWarning, stacklevel=2)
        self.processing_class = value
