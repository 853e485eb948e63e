"""Run `Dataset.map` in worker processes without ever waiting for one that hangs.

Each worker notes every batch it begins and has Python write its stack to a file if that batch takes too long. When
nobody has begun a batch for `stall_seconds`, the stacks are shown, the workers are ended, and the rows are mapped
once more in this process.
"""

import faulthandler
import importlib
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class WatchedFunction:
    """A mapped function that reports progress from inside its worker; picklable."""

    def __init__(self, function: Callable[..., Any], folder: str, stall_seconds: float) -> None:
        self._function = function
        self._folder = folder
        self._stall_seconds = stall_seconds

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        Path(self._folder, f"{os.getpid()}.begun").touch()
        with open(os.path.join(self._folder, f"{os.getpid()}.stack"), "w", encoding="utf-8") as stack:
            faulthandler.dump_traceback_later(max(self._stall_seconds * 0.9, 0.01), file=stack)
            try:
                return self._function(*args, **kwargs)
            finally:
                faulthandler.cancel_dump_traceback_later()


def map_with_workers(
    run: Callable[[Callable[..., Any], int | None], Any],
    function: Callable[..., Any],
    num_proc: int,
    stall_seconds: float,
    say: Callable[[str], None],
) -> Any:
    """Returns `run(function, num_proc)`, or `run(function, None)` after a worker hung or died.

    `run` calls `Dataset.map`. A worker that hangs or dies is reported through `say`; any other error is passed on.
    """
    multiprocess: Any = importlib.import_module("multiprocess")  # the fork of multiprocessing that `datasets` uses
    known = {child.pid for child in multiprocess.active_children()}
    with tempfile.TemporaryDirectory(prefix="finetune-workers-") as folder:
        watched = WatchedFunction(function, folder, stall_seconds) if stall_seconds > 0 else function
        finished, stalled = threading.Event(), threading.Event()

        def watch() -> None:
            while not finished.wait(min(1.0, stall_seconds / 4)):
                if time.time() - _last_sign(folder) > stall_seconds:
                    stalled.set()
                    say(_stall_report(folder, stall_seconds))
                    for child in multiprocess.active_children():
                        if child.pid not in known and "PoolWorker" in child.name:
                            child.kill()
                    return

        thread = threading.Thread(target=watch, daemon=True)
        if stall_seconds > 0:
            thread.start()
        try:
            return run(watched, num_proc)
        except RuntimeError as error:
            if not stalled.is_set() and "abruptly died" not in str(error):
                raise
            if not stalled.is_set():
                say("A worker process died (often for lack of memory).")
        finally:
            finished.set()
            if thread.is_alive():
                thread.join()
    say("Preparing the rows again in this process (`dataset_num_proc=1` avoids the wait).")
    return run(function, None)


def _last_sign(folder: str) -> float:
    return max((path.stat().st_mtime for path in (Path(folder), *Path(folder).glob("*.begun"))), default=0.0)


def _stall_report(folder: str, stall_seconds: float) -> str:
    stacks = [
        f"worker {path.stem}:\n{text}"
        for path in Path(folder).glob("*.stack")
        if (text := path.read_text(encoding="utf-8", errors="replace").strip())
    ]
    shown = "\n".join(stacks) or "No worker has begun a batch."
    return f"No worker has made progress for {stall_seconds:g} s. Where they are:\n{shown}"
