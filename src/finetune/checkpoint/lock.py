"""One writer per folder of checkpoints, also across processes; a lock that dies with its process."""

import contextlib
import os
import threading
import time
from pathlib import Path

from finetune.checkpoint import layout
from finetune.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows: only writers within one process exclude each other.
    fcntl = None

_locks: dict[str, "FolderLock"] = {}


def folder_lock(root: Path) -> "FolderLock":
    """Returns this process's lock of `root`; the same object for the same folder."""
    return _locks.setdefault(os.path.realpath(root), FolderLock(Path(os.path.realpath(root))))


class FolderLock:
    """A POSIX record lock on `.staging/lock`: released by the system when the process dies, not inherited by forks.

    May be released by another thread than the one that took it.
    """

    def __init__(self, root: Path) -> None:
        self._path = root / layout.STAGING / "lock"
        self._inner = threading.Lock()
        self._descriptor: int | None = None

    def acquire(self, timeout_seconds: float = 60.0) -> None:
        """Takes the lock, waiting for a writer that is about to finish.

        Raises:
            CheckpointError: another writer still has it after `timeout_seconds`.
            OSError: the folder cannot be written.
        """
        deadline = time.monotonic() + timeout_seconds
        if not self._inner.acquire(timeout=timeout_seconds):
            raise self._busy()
        try:
            while not self._take():
                if time.monotonic() >= deadline:
                    raise self._busy()
                time.sleep(0.05)
        except BaseException:
            self._inner.release()
            raise

    def release(self) -> None:
        """Gives the lock back and removes its file; harmless when it is not held."""
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        with contextlib.suppress(OSError):
            self._path.unlink()
            self._path.parent.rmdir()
        os.close(descriptor)
        self._inner.release()

    def _take(self) -> bool:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # its holder removed the folder just now
            return False
        try:
            if fcntl is not None:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before may have unlinked the file between our open and our lock.
            if os.fstat(descriptor).st_ino != os.stat(self._path).st_ino:
                raise FileNotFoundError
        except (BlockingIOError, PermissionError, FileNotFoundError):
            os.close(descriptor)
            return False
        except OSError:
            # A file system without locks: writers of several processes cannot be told apart there.
            pass
        self._descriptor = descriptor
        return True

    def _busy(self) -> CheckpointError:
        return CheckpointError(
            f"Another process is saving a checkpoint into `{self._path.parent.parent}`. Two runs need two "
            "`output_dir`; or wait until the other one has stopped."
        )
