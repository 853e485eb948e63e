"""Saving a run, and the names under which the facade finds everything about checkpoints.

One save, in order: wait for the save before; check the space; stage; let the facade's own methods write into the
staging folder, so that overrides in subclasses are what runs; commit with one rename; point; rotate.
"""

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from finetune.checkpoint import files, layout, rng
from finetune.checkpoint.background import bytes_needed, changes_in_step, saves_in_background
from finetune.checkpoint.endings import emergency_save, report_last_on_error
from finetune.checkpoint.metrics import (
    MissingMetricError,
    current_metric,
    determine_best_metric,
    metric_key,
    read_metric,
)
from finetune.checkpoint.optimizer import (
    load_optimizer_and_scheduler,
    load_scaler,
    save_optimizer_and_scheduler,
    save_scaler,
)
from finetune.checkpoint.resume import load_best_model, load_model, load_state, resolve_resume
from finetune.checkpoint.retention import Retention
from finetune.checkpoint.stateful import Stateful, load_stateful, save_stateful
from finetune.checkpoint.store import CheckpointStore, require_writable
from finetune.checkpoint.weights import save_model, write_model
from finetune.checkpoint.writer import CheckpointWriter, SaveReport, agreeing, meet, num_writers
from finetune.control.callbacks import Events
from finetune.control.state import TrainerState
from finetune.distributed import ranks
from finetune.errors import CheckpointError
from finetune.files import format_bytes
from finetune.hooks import SaveHooks

__all__ = [
    "CheckpointStore",
    "CheckpointWriter",
    "MissingMetricError",
    "SaveReport",
    "Stateful",
    "agreeing",
    "bytes_needed",
    "changes_in_step",
    "current_metric",
    "determine_best_metric",
    "emergency_save",
    "load_best_model",
    "load_model",
    "load_optimizer_and_scheduler",
    "load_rng_state",
    "load_scaler",
    "load_state",
    "load_stateful",
    "metric_key",
    "read_metric",
    "report_last_on_error",
    "require_writable",
    "resolve_resume",
    "rotate",
    "save_checkpoint",
    "save_model",
    "save_optimizer_and_scheduler",
    "save_rng_state",
    "save_scaler",
    "saves_in_background",
    "write_model",
]

logger = logging.getLogger(__name__)

_saves = itertools.count()  # every process takes part in every save, so the numbers agree


def save_checkpoint(
    hooks: SaveHooks,
    *,
    run_dir: str,
    args: Any,
    events: Events,
    model: nn.Module,
    optimizer: Any,
    writer: CheckpointWriter,
    stateful: Mapping[str, Stateful] | None = None,
    steady: frozenset[int] = frozenset(),
) -> SaveReport:
    """Saves `checkpoint-{global_step}` below `run_dir`, complete or not at all. Called on all processes.

    Args:
        hooks: the trainer, whose `save_model`, `_save_optimizer_and_scheduler`, `_save_scaler` and `_save_rng_state`
            write into the staging folder.
        optimizer: for the space needed.
        stateful: what else belongs to this run, by name.
        steady: what a save in the background may copy later; see `changes_in_step`.

    Returns:
        The report of this save; `writer.last` is the same object, completed when a background write ends. Its `error`
        is set when saving failed and `args.on_save_failure` is `continue`.

    Raises:
        CheckpointError: the space, a write or the save before failed, on this or another process. Earlier checkpoints
            are untouched and the staging folder is gone.
    """
    try:
        return _save(hooks, run_dir, args, events, model, optimizer, writer, stateful or {}, steady)
    except CheckpointError as error:
        if args.on_save_failure != "continue":
            raise
        logger.error("Training goes on without this checkpoint (`on_save_failure` is `continue`). %s", error)
        step = events.state.global_step
        writer.last = SaveReport(Path(run_dir) / layout.checkpoint_name(step), step, error=str(error))
        return writer.last


def _save(
    hooks: SaveHooks,
    run_dir: str,
    args: Any,
    events: Events,
    model: nn.Module,
    optimizer: Any,
    writer: CheckpointWriter,
    stateful: Mapping[str, Stateful],
    steady: frozenset[int],
) -> SaveReport:
    started = time.perf_counter()
    writer.wait()
    state, store = events.state, CheckpointStore(run_dir)
    staging = store.staging_path(state.global_step)
    best_before = state.best_model_checkpoint
    discarding = partial(_discarding, store, staging, args, state, best_before)
    with contextlib.ExitStack() as stack:
        with agreeing():
            if args.should_save:
                store.require_space(bytes_needed(model, optimizer, weights_only=args.save_only_model))
                store.stage(state.global_step)
            # Before the others are heard of: where another node failed, this one must give its folder and lock back.
            stack.enter_context(discarding())
        stack.enter_context(writer.collecting(steady))
        with agreeing(), files.writing(staging):
            _write_all(hooks, staging, run_dir, args, events, stateful)
        report = SaveReport(Path(run_dir) / staging.name, state.global_step, in_background=writer.collects)
        finish = _committer(store, staging, report, args, state, started, discarding)
        writer.last = report
        with agreeing():
            writer.launch(finish, undo=partial(setattr, state, "best_model_checkpoint", best_before))
    report.stall_seconds = time.perf_counter() - started
    writer.stalls.append(report.stall_seconds)
    return report


def _write_all(
    hooks: SaveHooks, staging: Path, run_dir: str, args: Any, events: Events, stateful: Mapping[str, Stateful]
) -> None:
    """Writes everything into `staging`, or hands it to the writer. Late-bound: overrides in subclasses run."""
    folder = str(staging)
    # The others may wait in a collective of the next part, which a process that failed would never reach.
    with agreeing(), files.writing(staging):
        staging.mkdir(parents=True, exist_ok=True)  # on a node that does not share the folder
    with agreeing(), files.writing(staging):
        hooks.save_model(folder, _internal_call=True)
    _note_best(events.state, run_dir)
    if not args.save_only_model:
        hooks._save_optimizer_and_scheduler(folder)
        hooks._save_scaler(folder)
        hooks._save_rng_state(folder)
    save_stateful(staging, stateful, rank=args.process_index, world_size=args.world_size)
    if args.should_save:
        events.save(staging / layout.TRAINER_STATE)


def _committer(
    store: CheckpointStore,
    staging: Path,
    report: SaveReport,
    args: Any,
    state: TrainerState,
    started: float,
    discarding: Callable[[], contextlib.AbstractContextManager[None]],
) -> Callable[[BaseException | None], None]:
    """Returns what ends the save, here or in the background: certify, rename, point, rotate. Reads the state now."""
    metric = current_metric(state, args.metric_for_best_model)
    best, keep = state.best_model_checkpoint, retention(args)
    meets = report.in_background and args.world_size > 1
    processes = ranks.store() if meets else None
    name = f"finetune/save/{next(_saves)}/{staging.name}" if meets else ""

    def finish(error: BaseException | None) -> None:
        with discarding(), files.writing(staging):
            if meets:
                error = meet(processes, name, args, error)
            if error is not None:
                raise error
            if not args.should_save:
                return
            checkpoint = store.commit(
                staging,
                world_size=args.world_size,
                parts=num_writers(args),
                model_only=args.save_only_model,
                metric=metric,
                greater_is_better=args.greater_is_better is not False,
            )
        if best:
            store.mark_best(Path(best).name)
        deleted = store.rotate(keep, best)
        report.num_bytes = checkpoint.manifest.num_bytes if checkpoint.manifest else 0
        report.write_seconds = time.perf_counter() - started
        logger.info(
            "Saved `%s` (%s) in %.2f s%s.", report.path, format_bytes(report.num_bytes), report.write_seconds,
            f"; deleted {', '.join(deleted)}" if deleted else "",
        )  # fmt: skip

    return finish


@contextlib.contextmanager
def _discarding(
    store: CheckpointStore, staging: Path, args: Any, state: TrainerState, best_before: str | None
) -> Iterator[None]:
    """Removes the staging folder when the block fails, also when the user interrupts it; it is not the best then."""
    try:
        yield
    except BaseException:
        state.best_model_checkpoint = best_before
        if args.should_save:
            store.discard(staging)
        raise


def _note_best(state: TrainerState, run_dir: str) -> None:
    """Sets `state.best_model_checkpoint` when the best step has a checkpoint, or is the one being written."""
    if state.best_global_step:
        best = Path(run_dir) / layout.checkpoint_name(state.best_global_step)
        if state.best_global_step == state.global_step or best.is_dir():
            state.best_model_checkpoint = str(best)


def retention(args: Any) -> Retention:
    """Returns which checkpoints `args` keeps."""
    return Retention(
        args.save_total_limit,
        getattr(args, "keep_last", None),
        getattr(args, "keep_best", None),
        getattr(args, "greater_is_better", None),
    )


def rotate(args: Any, run_dir: str, best: str | None, *, is_preempted: bool = False) -> None:
    """Deletes the checkpoints that are kept no longer. Called at the end of training.

    The newest stays, unless there may be one only and the best was to be loaded: then the best is that one.
    `is_preempted`: the run will be resumed from the newest, so that one stays in any case.
    """
    if args.should_save:
        loads_best = args.save_total_limit == 1 and bool(getattr(args, "load_best_model_at_end", False))
        CheckpointStore(run_dir).rotate(retention(args), best, only_best=loads_best and not is_preempted)


def save_rng_state(output_dir: str, args: Any) -> None:
    """Writes this process's random state into `output_dir`."""
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    distributed = getattr(args.parallel_mode, "value", args.parallel_mode) == "distributed"
    rng.save_rng(output_dir, args.process_index, args.world_size, distributed)


def load_rng_state(checkpoint: str | None, args: Any) -> None:
    """Restores this process's random state from `checkpoint`."""
    if checkpoint is not None:
        rng.load_rng(checkpoint, args.process_index, args.world_size)
