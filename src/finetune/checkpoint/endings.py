"""What is said, and saved, when an error ends a run."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

from finetune.checkpoint.store import CheckpointStore
from finetune.checkpoint.writer import CheckpointWriter
from finetune.distributed import ranks

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def report_last_on_error(run_dir: str, writer: CheckpointWriter | None = None) -> Iterator[None]:
    """Waits for the background write at the end of the block; on an error says from where training can go on.

    The error of the block is never hidden: one of the write is logged then.
    """
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):
            if writer is not None and writer.busy:
                logger.warning("Waiting for the checkpoint that is being written.")
            if writer is not None:
                writer.give_up()
            last, _ = CheckpointStore(run_dir).newest_valid() if ranks.is_world_process_zero() else (None, [])
            if last is not None:
                logger.error("Training stopped. Resume with `resume_from_checkpoint=%r`.", str(last))
        raise
    else:
        if writer is not None:
            writer.wait()
    finally:
        if writer is not None:
            writer.release()


def emergency_save(save: Callable[[], Any], error: BaseException, *, consistent: bool) -> None:
    """Calls `save()` after `error` stopped training, when the state is that of a whole step. Raises nothing.

    With several processes nothing is saved. The others may not have the error, or may have entered a collective that
    this process never reached. Saving has collectives of its own, so the error could become a hang.

    Args:
        save: returns why it failed, or None.
        consistent: no optimizer step is half done; otherwise nothing is saved.
    """
    if not consistent:
        logger.error("No emergency checkpoint: training stopped in the middle of an optimizer step.")
        return
    if ranks.world_size() > 1:
        logger.error(
            "No emergency checkpoint after %s: `save_on_exception` needs a single process, because the others of %d "
            "may still be training. Save more often (`save_steps`); a stop that is planned is saved on all processes "
            "with `enable_jit_checkpoint`.",
            type(error).__name__,
            ranks.world_size(),
        )
        return
    try:
        failure = save()
    except Exception as second:
        failure = second
    if failure is None:
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__  # Ctrl-C says nothing
        logger.error("Saved an emergency checkpoint after %s", what)
    else:
        logger.error("The emergency checkpoint after %s failed too: %s", type(error).__name__, failure)
