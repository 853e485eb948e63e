"""Stopping on a signal without losing steps.

The first SIGTERM, SIGINT or SIGUSR1 only sets a flag; the loop asks for it after each step, saves, and leaves. The
second one leaves at once: nothing is lost that was saved, because a checkpoint is complete or absent.

Exit codes, for schedulers that requeue: 75 (`EX_TEMPFAIL`: saved, start me again) after the first signal,
128 + signal number after the second.
"""

import logging
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

logger = logging.getLogger(__name__)

PREEMPTED_EXIT_CODE = 75
_NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")


class Preempted(SystemExit):
    """Ends the program with `PREEMPTED_EXIT_CODE`. Raised by programs, after training saved and returned."""

    def __init__(self) -> None:
        super().__init__(PREEMPTED_EXIT_CODE)


class PreemptionGuard:
    """A context in which signals ask for a save instead of killing the process.

    Signal handlers belong to the main thread: entered elsewhere, the guard does nothing and says so. Handlers that
    were there before come back on exit.
    """

    def __init__(self, names: tuple[str, ...] = _NAMES) -> None:
        self._signals = [getattr(signal, name) for name in names if hasattr(signal, name)]
        self._before: dict[int, Any] = {}
        self.received: int | None = None

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
        if accelerator is None or accelerator.num_processes == 1:
            return here
        import torch

        flag = torch.tensor([int(here)], device=accelerator.device)
        return bool(accelerator.reduce(flag, reduction="sum").item())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os.write(2, b"Second signal: leaving now. The last complete checkpoint is intact.\n")
            os._exit(128 + number)
        self.received = number
        # Only `os.write`: logging from a handler can meet its own lock.
        os.write(2, b"Signal received: saving after this step, then stopping. Send it again to leave at once.\n")
