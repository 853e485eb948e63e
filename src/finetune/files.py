"""Files: written entirely or not at all, the names of checkpoint folders, and sizes for people."""

import contextlib
import os
import re
from pathlib import Path

CHECKPOINT_PREFIX = "checkpoint"
_CHECKPOINT = re.compile(rf"^{CHECKPOINT_PREFIX}-(\d+)$")


def write_atomically(path: str | os.PathLike[str], content: str | bytes, *, durably: bool = False) -> None:
    """Replaces the content of `path`, entirely or not at all; text is written as UTF-8.

    With `durably` it also waits until file and folder are on the disk, so that not even a power failure leaves a part.
    Raises `OSError` if it cannot be written; what was there before then stays.
    """
    path = Path(path)
    # The process number, because several processes may write the same file at once.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            if durably:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if durably:
        flush(path.parent)


def flush(path: Path) -> None:
    """Waits until the file or folder `path` is on the disk. Raises `OSError`."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoint_name(step: int) -> str:
    """Returns the folder name of the checkpoint of optimizer step `step`.

    >>> checkpoint_name(500)
    'checkpoint-500'
    """
    return f"{CHECKPOINT_PREFIX}-{step}"


def checkpoint_step(folder: str | os.PathLike[str]) -> int | None:
    """Returns the step in a checkpoint folder's name, None for any other name.

    >>> checkpoint_step("runs/a/checkpoint-500"), checkpoint_step("checkpoint-500.tmp")
    (500, None)
    """
    match = _CHECKPOINT.match(Path(folder).name)
    return int(match.group(1)) if match else None


def format_bytes(count: float) -> str:
    """Returns a size for people.

    >>> format_bytes(0), format_bytes(1536), format_bytes(135e6 * 4)
    ('0 B', '1.5 KiB', '515.0 MiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
