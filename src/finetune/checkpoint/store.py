"""A folder of checkpoints, each complete or absent: staged, certified, moved into place with one rename.

    run/.staging/checkpoint-20/   being written; nothing reads it
    run/checkpoint-20/            appears complete, by a rename, after its manifest is on the disk
    run/latest, run/best          text files with the name of a checkpoint

A crash at any moment leaves the earlier checkpoints as they were, and at most a staging folder, which the next start
removes, or moves into place when only the rename was missing.
"""

import contextlib
import dataclasses
import logging
import os
import shutil
from pathlib import Path

from finetune.checkpoint import files, layout
from finetune.checkpoint.lock import folder_lock
from finetune.checkpoint.manifest import describe, find_problem, read_manifest
from finetune.checkpoint.retention import Checkpoint, Retention
from finetune.errors import ArgumentError, CheckpointError
from finetune.files import flush, format_bytes, write_atomically

logger = logging.getLogger(__name__)

_REPLACED, _DELETED = "replaced-", "deleted-"


class CheckpointStore:
    """The checkpoints below `root`. Holds no state of its own: what is true is on the disk."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    # ---- Reading ----

    def checkpoints(self) -> list[Checkpoint]:
        """Returns what looks like a checkpoint, oldest first. Nothing is verified beyond the manifest.

        Ours are ordered by when they were committed: after resuming from an earlier step, the old checkpoints of
        higher steps are not the newest. transformers' have no such time; one with a higher step than our newest
        counts as newer than all of ours, any other as older.
        """
        found: list[Checkpoint] = []
        for path in self.root.iterdir() if self.root.is_dir() else ():
            step = layout.checkpoint_step(path)
            if step is None or not path.is_dir():
                continue
            try:
                manifest = read_manifest(path)
            except CheckpointError:
                continue
            if manifest is not None or (path / layout.TRAINER_STATE).is_file():
                found.append(Checkpoint(path, step, manifest))
        ours = [(c.manifest.committed_at, c.step) for c in found if c.manifest]
        newest = max(ours, default=(0.0, -1))[1]

        def order(checkpoint: Checkpoint) -> tuple[int, float, int]:
            if checkpoint.manifest is None:
                return (2 if checkpoint.step > newest else 0, 0.0, checkpoint.step)
            return (1, checkpoint.manifest.committed_at, checkpoint.step)

        return sorted(found, key=order)

    def newest_valid(self) -> tuple[Path | None, list[str]]:
        """Returns the newest checkpoint whose every file is as it was written, and what was skipped and why."""
        skipped = [f"`{p.name}`: {find_problem(p)}" for p in self._unrecognised()]
        for checkpoint in reversed(self.checkpoints()):
            problem = find_problem(checkpoint.path)
            if problem is None:
                return checkpoint.path, skipped
            skipped.append(f"`{checkpoint.path.name}`: {problem}")
        return None, skipped

    def _unrecognised(self) -> list[Path]:
        known = {checkpoint.path for checkpoint in self.checkpoints()}
        entries = sorted(self.root.iterdir()) if self.root.is_dir() else []
        return [p for p in entries if layout.checkpoint_step(p) is not None and p not in known]

    # ---- Writing ----

    def require_space(self, num_bytes: int) -> None:
        """Raises `CheckpointError` when fewer than `num_bytes` are free: before anything is written."""
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(files.nearest_existing(self.root)).free
            if num_bytes > free:
                raise CheckpointError(
                    f"The next checkpoint needs about {format_bytes(num_bytes)} in `{self.root}`, where "
                    f"{format_bytes(free)} are free. Nothing was written; earlier checkpoints are untouched. Free "
                    "space or choose another `output_dir`; `save_only_model` makes checkpoints smaller, and "
                    "`save_total_limit` keeps fewer of them."
                )

    def staging_path(self, step: int) -> Path:
        """Returns where the checkpoint of `step` is written: its last part is the final name."""
        return self.root / layout.STAGING / layout.checkpoint_name(step)

    def stage(self, step: int) -> Path:
        """Returns the new, empty staging folder of `step`, after clearing what a crashed run left.

        Takes the lock of this folder; `commit` or `discard` gives it back.
        """
        staging = self.staging_path(step)
        with files.writing(staging):
            folder_lock(self.root).acquire()
            try:
                self._recover_locked()
                staging.mkdir(parents=True)
                (staging / layout.STAGED).touch()
            except BaseException:
                folder_lock(self.root).release()
                raise
        return staging

    def commit(
        self,
        staging: Path,
        *,
        world_size: int = 1,
        parts: int | None = None,
        model_only: bool = False,
        metric: float | None = None,
        greater_is_better: bool = True,
    ) -> Checkpoint:
        """Certifies the files in `staging` and moves it into place. Returns the checkpoint.

        Args:
            parts: how many processes write into this folder; None means all.
            world_size, model_only, metric, greater_is_better: see `Manifest`.

        Raises:
            CheckpointError: a file is malformed or the disk refused; nothing but the staging folder has changed.
        """
        step = layout.checkpoint_step(staging)
        assert step is not None
        try:
            with files.writing(staging):
                _require_all(staging, world_size if parts is None else parts)
                manifest = describe(
                    staging, step=step, world_size=world_size, model_only=model_only, metric=metric,
                    greater_is_better=greater_is_better,
                )  # fmt: skip
                before = [c.manifest.committed_at for c in self.checkpoints() if c.manifest]
                later = max([manifest.committed_at, *(t + 1e-3 for t in before)])
                manifest = dataclasses.replace(manifest, committed_at=later)
                for folder in {p.parent for p in map(staging.joinpath, manifest.files)}:
                    flush(folder)
                write_atomically(staging / layout.MANIFEST, manifest.to_json(), durably=True)
                final = self._place(staging)
                self._point(layout.LATEST, final.name)
        except BaseException:
            self.discard(staging)
            raise
        folder_lock(self.root).release()
        return Checkpoint(final, step, manifest)

    def discard(self, staging: Path) -> None:
        """Removes a staging folder that will not be committed, and gives the lock back."""
        shutil.rmtree(staging, ignore_errors=True)
        folder_lock(self.root).release()

    def mark_best(self, name: str) -> None:
        """Writes the `best` pointer, when there is such a checkpoint."""
        if (self.root / name).is_dir():
            self._point(layout.BEST, name)

    def rotate(
        self, retention: Retention, best: str | os.PathLike[str] | None, *, only_best: bool = False
    ) -> list[str]:
        """Deletes the checkpoints that `retention` does not keep; `only_best`: also the newest. Returns their names.

        Called after a commit only. Folders that are not readable checkpoints are neither counted nor deleted. A
        checkpoint that cannot be deleted is a warning: nothing was lost.
        """
        intact = [c for c in self.checkpoints() if find_problem(c.path, deep=False) is None]
        deleted: list[str] = []
        for checkpoint in retention.to_delete(intact, Path(best).name if best else None, only_best=only_best):
            trash = self.root / layout.STAGING / f"{_DELETED}{checkpoint.path.name}"
            try:
                trash.parent.mkdir(exist_ok=True)
                shutil.rmtree(trash, ignore_errors=True)
                # Renamed first, so that a crash half-way through does not leave half a checkpoint under its name.
                checkpoint.path.rename(trash)
                shutil.rmtree(trash)
                deleted.append(checkpoint.path.name)
            except OSError as error:
                logger.warning("`%s` could not be deleted: %s", checkpoint.path, error)
        if only_best and deleted:
            self._point_to_newest()
        with contextlib.suppress(OSError):
            (self.root / layout.STAGING).rmdir()
        return deleted

    def recover(self) -> None:
        """Finishes or removes what a crashed run left. Does nothing while another process is saving here."""
        if not (self.root / layout.STAGING).is_dir():
            return
        with contextlib.suppress(OSError, CheckpointError):
            folder_lock(self.root).acquire(timeout_seconds=0)
            try:
                self._recover_locked()
            finally:
                folder_lock(self.root).release()

    def _recover_locked(self) -> None:
        area = self.root / layout.STAGING
        for path in sorted(area.iterdir()):
            certified = layout.checkpoint_step(path) is not None and (path / layout.MANIFEST).is_file()
            if certified and find_problem(path) is None:
                self._place(path)
                self._point_to_newest()
                logger.warning("Finished moving `%s` into place, which a crash had interrupted.", path.name)
        for path in sorted(area.glob(f"{_REPLACED}*")):
            original = self.root / path.name.removeprefix(_REPLACED)
            if not original.exists() and find_problem(path, deep=False) is None:
                path.rename(original)
        for path in area.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != "lock":
                path.unlink(missing_ok=True)

    def _place(self, staging: Path) -> Path:
        final = self.root / staging.name
        replaced = None
        if final.exists():
            self._adopt_strangers(final, staging)
            replaced = staging.with_name(f"{_REPLACED}{final.name}")
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        staging.rename(final)
        flush(self.root)
        if replaced is not None:
            shutil.rmtree(replaced, ignore_errors=True)
        return final

    def _adopt_strangers(self, final: Path, staging: Path) -> None:
        """Moves files that a callback put under the final name before the commit, unless it is a checkpoint itself."""
        if (final / layout.MANIFEST).exists() or (final / layout.TRAINER_STATE).exists():
            return
        for path in final.iterdir():
            if path.name not in layout.LOADED_FILES and not (staging / path.name).exists():
                path.rename(staging / path.name)

    def _point_to_newest(self) -> None:
        if checkpoints := self.checkpoints():
            self._point(layout.LATEST, checkpoints[-1].path.name)

    def _point(self, pointer: str, name: str) -> None:
        try:
            write_atomically(self.root / pointer, f"{name}\n", durably=True)
        except OSError as error:  # The checkpoint itself is complete; a pointer is a convenience.
            logger.warning("The pointer `%s` could not be written: %s", self.root / pointer, error)


def _require_all(staging: Path, expected: int) -> None:
    """Raises unless `staging` is still the folder that was made, with the part of every process in it."""
    (staging / layout.STAGED).unlink()
    parts = len(layout.stateful_files(staging))
    if 0 < parts < expected:
        raise CheckpointError(
            f"Only {parts} of {expected} processes wrote into `{staging}`: they do not share this folder. Use an "
            "`output_dir` that all of them see, or `save_on_each_node`."
        )


def require_writable(output_dir: str | os.PathLike[str]) -> None:
    """Raises `ArgumentError` naming `output_dir` unless files can be written there. Leaves no trace."""
    path = Path(output_dir)
    parent = files.nearest_existing(path.absolute())
    probe = parent / f".write-test-{os.getpid()}"
    try:
        if not parent.is_dir():
            raise NotADirectoryError(20, os.strerror(20), str(parent))
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise ArgumentError(
            f"`output_dir` is `{path}`, and `{parent}` cannot be written: {error.strerror}. Choose another "
            "`output_dir`, or fix the permissions of this one."
        ) from error
