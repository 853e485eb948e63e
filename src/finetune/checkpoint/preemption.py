"""Stopping on a signal without losing steps.

The first SIGTERM, SIGINT or SIGUSR1 only sets a flag; the loop asks for it after each step and each batch of an
evaluation, saves, and leaves. An evaluation that is cut short is owed, because early stopping, the best model and some
schedules depend on its result: the checkpoint says so and has the random state from before it, and the resumed run
begins with it. The second signal leaves at once: nothing is lost that was saved, because a checkpoint is complete or
absent.

Exit codes, for schedulers that requeue: 75 (`EX_TEMPFAIL`: saved, start me again) after the first signal,
128 + signal number after the second.
"""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

from finetune.checkpoint import rng
from finetune.control.callbacks import CallbackHandler, TrainerCallback

logger = logging.getLogger(__name__)

PREEMPTED_EXIT_CODE = 75
_NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")


class Preempted(SystemExit):
    """Ends the program with `PREEMPTED_EXIT_CODE`. Raised by programs, after training saved and returned."""

    def __init__(self) -> None:
        super().__init__(PREEMPTED_EXIT_CODE)


class EvaluationInterrupted(BaseException):
    """Ends an evaluation in which a signal came. No `Exception`: an override of `evaluate` must not take it for one."""


class PreemptionGuard:
    """A context in which signals ask for a save instead of killing the process.

    Signal handlers belong to the main thread: entered elsewhere, the guard does nothing and says so. Handlers that
    were there before come back on exit.

    Attributes:
        received: the number of the first signal this process got.
        agreed: whether all processes learned that one of them got a signal.
        interrupts: whether a signal ends the evaluation that is running.
    """

    def __init__(self, names: tuple[str, ...] = _NAMES) -> None:
        self._signals = [getattr(signal, name) for name in names if hasattr(signal, name)]
        self._before: dict[int, Any] = {}
        self.received: int | None = None
        self.agreed = self.interrupts = False

    def __enter__(self) -> "PreemptionGuard":
        if threading.current_thread() is not threading.main_thread():
            logger.warning("Training runs outside the main thread: signals will not save a checkpoint.")
            return self
        for number in self._signals:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before.clear()

    def requested(self, accelerator: Any = None) -> bool:
        """Returns whether training should save and stop: whether any process got a signal.

        With several processes a collective, so all must ask at the same step; with one it reads an attribute.
        """
        here = self.received is not None
        if accelerator is not None and accelerator.num_processes > 1:
            import torch

            from finetune.distributed import ranks

            flag = torch.tensor([int(here)], device=accelerator.device)
            here = bool(ranks.sum_over_processes(flag, accelerator).item())
        self.agreed = self.agreed or here
        return here

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Context manager: a signal ends the evaluation in the block, until one dataset of several has its result.

        Raises:
            EvaluationInterrupted: a signal came, now or before. The random state is that of the beginning.
        """
        before = rng.capture_rng()
        self.interrupts = True
        try:
            if self.agreed:
                raise EvaluationInterrupted
            yield
        except EvaluationInterrupted:
            rng.restore_rng(before)
            raise
        finally:
            self.interrupts = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os.write(2, b"Second signal: leaving now. The last complete checkpoint is intact.\n")
            os._exit(128 + number)
        self.received = number
        # Only `os.write`: logging from a handler can meet its own lock.
        os.write(2, b"Signal received: saving after this step, then stopping. Send it again to leave at once.\n")


class _StopOnSignal(TrainerCallback):
    """Saves and stops after the step in which a signal came; ends an evaluation that may be interrupted."""

    def __init__(self, guard: PreemptionGuard, accelerator: Any) -> None:
        self.guard, self.accelerator = guard, accelerator

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> dict[str, bool] | None:
        if self.guard.requested(self.accelerator):
            return {"should_save": True, "should_training_stop": True}
        return None

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.guard.interrupts and self.guard.requested(self.accelerator):
            raise EvaluationInterrupted

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Callbacks and logs have the result of this dataset; made again, it would count twice.
        self.guard.interrupts = False


@contextlib.contextmanager
def saving_on_signals(handler: CallbackHandler, accelerator: Any) -> Iterator[PreemptionGuard]:
    """Context manager: a first signal ends training after a checkpoint (`enable_jit_checkpoint`); see the module."""
    with PreemptionGuard() as guard:
        callback = _StopOnSignal(guard, accelerator)
        handler.add_callback(callback)
        try:
            yield guard
        finally:
            handler.remove_callback(callback)
