"""Uploads to the Hub in the background: one after the other, retried, never in the way of the run.

Every call to the Hub happens in a daemon thread with a time limit, because `huggingface_hub` waits for a silent server
forever, and would wait once more when the interpreter exits.
"""

import contextlib
import logging
import shlex
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """How long to keep trying: pauses between attempts, and the seconds one attempt may take.

    An upload may take `upload_seconds`, plus its size at `bytes_per_second`; slower than that counts as stalled.
    """

    pauses: tuple[float, ...] = (2.0, 8.0, 30.0)
    call_seconds: float = 60.0
    upload_seconds: float = 600.0
    bytes_per_second: float = 1e6

    def limit(self, num_bytes: int) -> float:
        """Returns the seconds an upload of `num_bytes` may take."""
        return self.upload_seconds + num_bytes / self.bytes_per_second


DEFAULT_PATIENCE = Patience()


class RefusedError(RuntimeError):
    """The Hub said no in a way that asking again does not change (wrong token, no such repository)."""


class Repository:
    """A model repository, created when it is first needed. Holds the token, and never shows it."""

    def __init__(self, name: str, token: str | None, private: bool | None, patience: Patience | None = None) -> None:
        self.name = name
        self.private = private
        self.patience = patience or DEFAULT_PATIENCE
        self.repo_id: str | None = None
        self._token = token
        self._secrets = {token} if token else set()

    def use_token(self, token: str) -> None:
        """Uploads with `token` from now on."""
        self._token = token
        self._secrets.add(token)

    def ensure(self) -> str:
        """Returns `owner/name`, after creating the repository if it does not exist.

        Raises:
            RefusedError: the token or the name is not accepted.
            Exception: whatever went wrong on the way; worth another attempt.
        """
        if self.repo_id is None:
            created = self._guarded(
                lambda: self._api().create_repo(self.name, token=self._token, private=self.private, exist_ok=True),
                self.patience.call_seconds,
            )
            self.repo_id = str(created.repo_id)
        return self.repo_id

    def upload(self, upload: "Upload") -> Any:
        """Returns the `CommitInfo` of one attempt to upload a folder. Raises as `ensure`."""
        repo_id = self.ensure()
        size = sum(path.stat().st_size for path in upload.folder.rglob("*") if path.is_file())

        def commit() -> Any:
            return self._api().upload_folder(
                repo_id=repo_id,
                folder_path=upload.folder,
                path_in_repo=upload.path_in_repo,
                commit_message=upload.message,
                token=self._token,
                revision=upload.revision,
                # What the folder no longer has (a shard less, a process less) must not be found on the next resume.
                delete_patterns=["*"] if upload.replaces_folder else None,
            )

        with quiet_progress():
            return self._guarded(commit, self.patience.limit(size), upload.revision)

    def hide(self, text: str) -> str:
        """Returns `text` without the token."""
        for secret in self._secrets:
            text = text.replace(secret, "(token)")
        return text

    def reason(self, error: BaseException) -> str:
        """Returns the type and the first line of an error, without the token."""
        lines = str(error).strip().splitlines()
        return self.hide(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__)

    def contains_token(self, path: Path) -> bool:
        """Returns whether the file holds the token in plain text."""
        content = path.read_bytes() if self._secrets else b""
        return any(secret.encode() in content for secret in self._secrets)

    def _api(self) -> Any:
        from huggingface_hub import HfApi

        return HfApi(library_name="finetune")

    def _guarded(self, call: Callable[[], T], seconds: float, revision: str | None = None) -> T:
        from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RevisionNotFoundError

        try:
            return within(seconds, call)
        except RevisionNotFoundError:
            repo_id = self.repo_id
            if revision is None or repo_id is None:
                raise
            within(
                self.patience.call_seconds,
                lambda: self._api().create_branch(repo_id, branch=revision, token=self._token, exist_ok=True),
            )
            return within(seconds, call)
        except HfHubHTTPError as error:
            status = getattr(error.response, "status_code", 0)
            if 400 <= status < 500 and status not in (408, 409, 425, 429):
                raise RefusedError(self.reason(error)) from None
            raise
        except (LocalTokenNotFoundError, ValueError) as error:
            raise RefusedError(self.reason(error)) from None


@dataclass(frozen=True)
class Upload:
    """One folder on its way to the Hub.

    `source` is the folder that outlives it and `ignore` what to leave out of that, for the command that repeats it.
    """

    folder: Path
    source: Path
    message: str
    path_in_repo: str | None = None
    revision: str | None = None
    ignore: tuple[str, ...] = ()
    replaces_folder: bool = False
    done: Callable[[], None] = lambda: None

    def command(self, repo_id: str) -> str:
        """Returns the shell command that repeats this upload. It names no token: `hf auth login` keeps it."""
        words = ["hf", "upload", repo_id, str(self.source), self.path_in_repo or "."]
        if self.revision:
            words += ["--revision", self.revision]
        for pattern in self.ignore:
            words += ["--exclude", pattern]
        return " ".join(shlex.quote(word) for word in [*words, "--commit-message", self.message])


@dataclass
class PushQueue:
    """The uploads of one run: `submit` returns at once, one worker takes them in order.

    The name and `is_done`, `wait_until_done`, `jobs` are those of `PushInProgress` of transformers.
    """

    repository: Repository
    jobs: "list[Future[Any]]" = field(default_factory=list)
    _waiting: "deque[tuple[Upload, Future[Any]]]" = field(default_factory=deque)
    _failed: dict[str | None, Upload] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _working: bool = False

    def submit(self, upload: Upload) -> "Future[Any]":
        """Returns a future of the `CommitInfo`. A failure is logged with the command that repeats the upload."""
        future: Future[Any] = Future()
        self.jobs = [job for job in self.jobs if not job.done()] + [future]
        with self._lock:
            self._waiting.append((upload, future))
            if not self._working:
                self._working = True
                threading.Thread(target=self._work, name="hub-push", daemon=True).start()
        return future

    def is_done(self) -> bool:
        """Returns whether every upload has succeeded or failed."""
        return all(job.done() for job in self.jobs)

    def wait_until_done(self) -> None:
        """Returns when `is_done`, which is bounded as each attempt is. Ctrl-C ends the waiting, not the pushes."""
        while not self.is_done():
            wait(self.jobs, timeout=0.5)

    def cancel(self) -> None:
        """Drops the uploads that have not started."""
        for job in self.jobs:
            job.cancel()

    @property
    def failures(self) -> list[Upload]:
        """The uploads that failed and were not made good by a later one to the same place."""
        return list(self._failed.values())

    def report(self) -> None:
        """Logs one line per place on the Hub that is not up to date, with the command that brings it there."""
        for upload in self.failures:
            where = (upload.message, upload.source, self._command(upload))
            logger.error("Not on the Hub: %s. The files are in `%s`. To push them: %s", *where)

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._working = False
                    return
                upload, future = self._waiting.popleft()
            if future.set_running_or_notify_cancel():
                self._finish(upload, future)
            else:
                upload.done()

    def _finish(self, upload: Upload, future: "Future[Any]") -> None:
        # Clean up first: whoever waits for the future may look at the folder next.
        try:
            commit = self._attempt(upload)
        except Exception as error:
            self._failed[upload.path_in_repo] = upload
            reason = self.repository.reason(error)
            logger.error(
                "Push to the Hub failed, training goes on: %s. To repeat it: %s", reason, self._command(upload)
            )
            upload.done()
            future.set_exception(error)
        else:
            self._failed.pop(upload.path_in_repo, None)
            upload.done()
            future.set_result(commit)

    def _attempt(self, upload: Upload) -> Any:
        """Returns the `CommitInfo` of the first attempt that succeeds. Raises what the last one did."""
        pauses, stalls = deque(self.repository.patience.pauses), 0
        while True:
            try:
                return self.repository.upload(upload)
            except Exception as error:
                stalls += isinstance(error, TimeoutError)
                # A stalled attempt has already cost its full time; the second one settles it.
                if not pauses or stalls == 2 or isinstance(error, RefusedError | FileNotFoundError):
                    raise
                pause, reason = pauses.popleft(), self.repository.reason(error)
            logger.warning("Push to the Hub failed (%s); next attempt in %g s.", reason, pause)
            time.sleep(pause)

    def _command(self, upload: Upload) -> str:
        return upload.command(self.repository.repo_id or self.repository.name)


def within(seconds: float, call: Callable[[], T]) -> T:
    """Returns `call()`, or raises TimeoutError after `seconds` and leaves the call behind in a daemon thread."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=run, name="hub-call", daemon=True)
    thread.start()
    thread.join(seconds)
    if not future.done():
        raise TimeoutError(f"no answer within {seconds:g} s")
    return future.result()


@contextlib.contextmanager
def quiet_progress() -> Iterator[None]:
    """Hides the progress bars of `huggingface_hub`, which would break into the training's own."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    were_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            enable_progress_bars()
