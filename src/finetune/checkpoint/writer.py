"""Writing now or in the background, and agreeing about failures across processes."""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.checkpoint import copies
from finetune.errors import CheckpointError

logger = logging.getLogger(__name__)

_DONE = "done"


@dataclass
class SaveReport:
    """What a save cost. `stall_seconds`: training stood still. `write_seconds`: until it was on the disk, 0.0 while
    that still runs in the background. `num_bytes`: of the whole checkpoint, 0 until then."""

    path: Path
    step: int
    stall_seconds: float = 0.0
    write_seconds: float = 0.0
    num_bytes: int = 0
    in_background: bool = False
    error: str | None = None


class CheckpointWriter:
    """Runs the writing jobs of one checkpoint after another: at once, or in a thread from copies of the state.

    Inside `collecting()`, `run` keeps the jobs and `snapshot` copies what they will write; `launch` starts them.
    Outside, and always without `asynchronous`, jobs run at once and nothing is copied. One save at a time: the next
    one waits. A background failure is logged when it happens and raised by the next `wait`, unless `tolerant`
    (`on_save_failure` is `continue`).

    What changes in the optimizer's step only (`steady`, addresses of storages) is copied by the thread too, and
    `settle` must be called before the next step.

    `stalls` has the seconds that training stood still for each save so far.
    """

    def __init__(self, asynchronous: bool = False, tolerant: bool = False) -> None:
        self.asynchronous, self.tolerant = asynchronous, tolerant
        self.stalls: list[float] = []
        self.last: SaveReport | None = None
        self._jobs: list[Callable[[], None]] | None = None
        self._memo: dict[Any, Any] = {}
        self._pool = copies.CopyPool()
        self._thread: threading.Thread | None = None
        self._copied = threading.Event()
        self._copied.set()
        self._error: BaseException | None = None
        self._undo: Callable[[], None] | None = None

    def start_run(self, *, tolerant: bool) -> None:
        """Forgets the saves of the run before."""
        self.tolerant, self.last = tolerant, None
        self.stalls.clear()

    @contextlib.contextmanager
    def collecting(self, steady: frozenset[int] = frozenset()) -> Iterator[None]:
        """Keeps the jobs of the block for `launch`; forgets them when it fails."""
        self._jobs = [] if self.asynchronous else None
        if not self.busy:
            self._pool.renew()
        self._pool.steady = steady
        try:
            yield
        except BaseException:
            self._jobs = None
            raise
        finally:
            self._memo = {}
            self._pool.trim()

    def run(self, job: Callable[[], None]) -> None:
        """Runs `job`, or keeps it for the background."""
        if self._jobs is None:
            job()
        else:
            self._jobs.append(job)

    def snapshot(self, value: Any) -> Any:
        """Returns what a job may use later: copies of the tensors on the CPU; `value` itself when jobs run at once."""
        return value if self._jobs is None else copies.snapshot(value, self._memo, self._pool)

    def launch(self, finish: Callable[[BaseException | None], None], undo: Callable[[], None] | None = None) -> None:
        """Runs the kept jobs, then `finish(error)`: in a thread, or here when there is nothing in the background.

        `undo`: called by `wait` when the background write failed, on this process or another one.
        """
        jobs, self._jobs = self._jobs, None
        report = self.last
        if jobs is None:
            finish(None)
            return

        self._undo = undo
        self._copied.clear()
        pool = self._pool

        def work() -> None:
            error: BaseException | None = None
            try:
                try:
                    pool.complete()
                finally:
                    self._copied.set()
                for job in jobs:
                    job()
            except BaseException as caught:
                error = caught
            jobs.clear()
            try:
                finish(error)
            except BaseException as caught:
                self._error = caught
                if report is not None:
                    report.error = str(caught)
                logger.error("The checkpoint being written in the background failed: %s", caught)

        # Not a daemon: a program that ends waits for its last checkpoint.
        self._thread = threading.Thread(target=work, name="checkpoint-writer")
        self._thread.start()

    @property
    def collects(self) -> bool:
        """Whether jobs are being kept for the background right now."""
        return self._jobs is not None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written in the background."""
        return self._thread is not None and self._thread.is_alive()

    def settle(self) -> None:
        """Waits until the copies of the checkpoint being written are complete. Call it before weights change."""
        if not self._copied.is_set():
            started = time.perf_counter()
            self._copied.wait()
            if self.stalls:
                self.stalls[-1] += time.perf_counter() - started

    @property
    def held_bytes(self) -> int:
        """Memory of the last copies, which the next save will use again."""
        return self._pool.num_bytes

    def release(self) -> None:
        """Frees the memory of the last copies: no further save is near."""
        self._pool = copies.CopyPool()

    @contextlib.contextmanager
    def finishing(self) -> Iterator[None]:
        """Waits at the end of the block until nothing is being written, and frees the copies.

        An error of the block is never hidden: one of the write was logged when it happened.
        """
        try:
            yield
        except BaseException:
            self.give_up()
            raise
        else:
            self.wait()
        finally:
            self.release()

    def give_up(self) -> None:
        """Waits until nothing is being written, and forgets whether that failed. Asks no other process."""
        if self._thread is not None:
            self._thread.join()
        self._thread = self._error = None

    def wait(self) -> float:
        """Returns the seconds waited until nothing is being written.

        Raises:
            CheckpointError: writing failed, in this process or another one, and this writer is not tolerant.
        """
        started = time.perf_counter()
        if self._thread is not None:
            self._thread.join()
        had_thread, self._thread = self._thread is not None, None
        error, self._error = self._error, None
        if had_thread:
            self._learn(error)
        return time.perf_counter() - started

    def _learn(self, error: BaseException | None) -> None:
        """Makes what follows from a failed background write the same on all processes."""
        try:
            raise_together(error)
        except Exception as failure:
            if self.last is not None:
                self.last.error = str(failure)
            if self._undo is not None:
                self._undo()
            if not self.tolerant:
                raise
            if error is None:
                logger.error("Training goes on without this checkpoint. %s", failure)


def raise_together(error: BaseException | None) -> None:
    """Raises `error`; when it is None but another process has one, raises that as `CheckpointError`. A barrier.

    Without it a process that failed to write would leave the others waiting in the next collective.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        messages: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(messages, None if error is None else f"{type(error).__name__}: {error}")
        failed = [(rank, text) for rank, text in enumerate(messages) if text]
        if failed and error is None:
            raise CheckpointError(f"Process {failed[0][0]} could not do its part of the checkpoint. {failed[0][1]}")
    if error is not None:
        raise error


@contextlib.contextmanager
def agreeing() -> Iterator[None]:
    """Raises at the end of the block, on all processes, what any of them raised in it. A barrier."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    raise_together(error)


def num_writers(args: Any) -> int:
    """Returns how many processes write into one folder: all, or those of this node with `save_on_each_node`."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or args.world_size) if args.save_on_each_node else args.world_size


def meet(
    store: Any, name: str, args: Any, error: BaseException | None, timeout_seconds: float = 1800.0
) -> BaseException | None:
    """Waits in the background for the other processes that write into this folder. Returns the first failure.

    Through the store in which the processes found each other: a collective from a thread would mix with those of
    training, and a file could not be written to a full disk.

    Args:
        store: of the process group.
        name: of this save, the same on all processes and never used before.
    """
    if not args.should_save:
        store.set(f"{name}/{args.process_index}", _DONE if error is None else f"{type(error).__name__}: {error}")
        return error
    others = range(args.process_index + 1, args.process_index + num_writers(args))
    keys = [f"{name}/{rank}" for rank in others]
    deadline = time.monotonic() + timeout_seconds
    while keys and not store.check(keys):
        if time.monotonic() > deadline:
            written = 1 + sum(store.check([key]) for key in keys)
            return error or CheckpointError(
                f"Only {written} of {len(keys) + 1} processes wrote their part of the checkpoint within "
                f"{timeout_seconds:.0f} s; the others hang or have ended. See their messages."
            )
        time.sleep(0.02)
    for rank, key in zip(others, keys, strict=True):
        text = store.get(key).decode()
        store.delete_key(key)
        if text != _DONE and error is None:
            error = CheckpointError(f"Process {rank} failed. {text}")
    return error
