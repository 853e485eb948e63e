"""Snapshots of a run's folder for the Hub: which files are pushed, as links where nothing rewrites them in place."""

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from finetune.checkpoint import layout
from finetune.hub.uploads import Repository, Upload

logger = logging.getLogger(__name__)

SNAPSHOT_PREFIX = "_push-"
# What shows rows of the training data stays here: they may be private where the model is not.
DATA_FILES = ("data_preview*.html", "data_audit*.json")
NOT_PUSHED = ("_*", f"{layout.CHECKPOINT_PREFIX}-*", ".*", layout.LATEST, layout.BEST, *DATA_FILES)
WEIGHTS = ("model*.safetensors*", "pytorch_model*.bin*", "adapter_model.*")

# What a checkpoint holds besides a loadable model: needed to resume, not to use it.
TRAINING_STATE = (
    layout.OPTIMIZER,
    "optimizer.bin",
    layout.SCHEDULER,
    layout.SCALER,
    layout.TRAINER_STATE,
    layout.MANIFEST,
    "rng_state*.pth",
    "finetune_state*.pt",
    "optimizer_layout.json",
    "optimizer_*",
    "global_step*",
    "pytorch_model_fsdp*",
    "latest",
    "zero_to_fp32.py",
)

_LINK_FROM_BYTES = 1 << 20
_SCAN_UP_TO_BYTES = 8 << 20


def model_upload(
    repository: Repository,
    output_dir: Path,
    message: str,
    revision: str | None,
    checkpoint: Path | None = None,
    link: bool = False,
) -> Upload:
    """Returns the upload of the output folder; with `checkpoint`, its model takes the place of the folder's own.

    Large files are hard links where nothing rewrites them in place: in a checkpoint, and if `link` says so here.
    """
    older_model = () if checkpoint is None else WEIGHTS
    with _new_snapshot(output_dir) as folder:
        for path in _files(output_dir, (*NOT_PUSHED, *older_model)):
            _place(repository, path, folder / path.relative_to(output_dir), link)
        if checkpoint is not None:
            for path in _files(checkpoint, TRAINING_STATE):
                _place(repository, path, folder / path.relative_to(checkpoint), link=True)
    return Upload(
        folder=folder,
        source=output_dir if checkpoint is None else checkpoint,
        message=message,
        revision=revision,
        ignore=NOT_PUSHED if checkpoint is None else TRAINING_STATE,
        done=lambda: shutil.rmtree(folder, ignore_errors=True),
    )


def checkpoint_upload(
    repository: Repository, output_dir: Path, checkpoint: Path, where: str, message: str, revision: str | None
) -> Upload:
    """Returns the upload of a whole checkpoint into the folder `where` of the repository."""
    with _new_snapshot(output_dir) as folder:
        for path in _files(checkpoint, ()):
            _place(repository, path, folder / path.relative_to(checkpoint), link=True)
    return Upload(
        folder=folder,
        source=checkpoint,
        message=f"{message}, checkpoint",
        path_in_repo=where,
        revision=revision,
        replaces_folder=where == "last-checkpoint",
        done=lambda: shutil.rmtree(folder, ignore_errors=True),
    )


@contextlib.contextmanager
def _new_snapshot(output_dir: Path) -> Iterator[Path]:
    """Yields a new folder to fill, which is removed when that fails."""
    output_dir.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=SNAPSHOT_PREFIX, dir=output_dir))
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _files(folder: Path, left_out: tuple[str, ...]) -> Iterator[Path]:
    """Yields the files below `folder`, without entries of `folder` itself that match a pattern of `left_out`."""
    for entry in sorted(folder.iterdir()):
        if any(fnmatch(entry.name, pattern) for pattern in left_out):
            continue
        if entry.is_file():
            yield entry
        elif entry.is_dir() and not entry.is_symlink():
            yield from sorted(path for path in entry.rglob("*") if path.is_file())


def _place(repository: Repository, source: Path, target: Path, link: bool) -> None:
    """Links or copies a file into a snapshot; a file that holds the Hub token in plain text stays out of it."""
    size = source.stat().st_size
    target.unlink(missing_ok=True)
    if size <= _SCAN_UP_TO_BYTES and repository.contains_token(source):
        logger.warning("`%s` contains the Hub token and is not pushed.", source)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if link and size >= _LINK_FROM_BYTES:
        try:
            os.link(source, target)
            return
        except OSError:
            logger.debug("No hard links in `%s`; copying.", target.parent)
    shutil.copy2(source, target)
