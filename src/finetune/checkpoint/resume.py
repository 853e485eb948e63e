"""Finding the checkpoint to resume from, and loading what it holds."""

import logging
from pathlib import Path
from typing import Any

from torch import nn

from finetune.checkpoint import backends, layout
from finetune.checkpoint.manifest import find_problem, read_manifest
from finetune.checkpoint.store import CheckpointStore
from finetune.checkpoint.weights import load_weights
from finetune.checkpoint.writer import raise_together
from finetune.control.state import TrainerState
from finetune.distributed import ranks
from finetune.errors import CheckpointError

logger = logging.getLogger(__name__)


def resolve_resume(value: str | bool | Path | None, output_dir: str) -> str | None:
    """Returns the verified folder to resume from, None to start fresh. The same answer on all processes.

    `None`, `False`: fresh. `True`: the newest valid checkpoint below `output_dir`; what is skipped is logged with the
    reason. `"auto"`: the same, but fresh when there is none. Anything else is a folder, verified as it is.

    Raises:
        CheckpointError: there is no valid checkpoint, or the given one is not valid. Nothing is replaced silently.
    """
    answer: tuple[str | None, str | None] = (None, None)
    if ranks.is_world_process_zero():
        try:
            answer = (_resolve(value, output_dir), None)
        except CheckpointError as error:
            answer = (None, str(error))
    resolved, problem = ranks.broadcast_object(answer)
    if problem is not None:
        raise CheckpointError(problem)
    return resolved


def _resolve(value: str | bool | Path | None, output_dir: str) -> str | None:
    if value is None or value is False or str(value).lower() in ("false", "none", ""):
        return None
    store = CheckpointStore(output_dir)
    store.recover()
    wanted = str(value)
    if value is not True and wanted.lower() not in ("true", "auto"):
        problem = find_problem(Path(wanted))
        if problem is None:
            return wanted
        inside = Path(wanted) if CheckpointStore(wanted).checkpoints() else Path(wanted).absolute().parent
        other, _ = CheckpointStore(inside).newest_valid()
        hint = f" The newest valid checkpoint beside it is `{other}`." if other else ""
        raise CheckpointError(f"`resume_from_checkpoint` is `{wanted}`, which {_phrase(problem)}.{hint}")
    newest, skipped = store.newest_valid()
    for reason in skipped:
        logger.warning("Not resuming from %s.", reason)
    if newest is None and wanted.lower() != "auto":
        why = f" Skipped: {'; '.join(skipped)}." if skipped else ""
        raise CheckpointError(
            f"There is no valid checkpoint in `{output_dir}` to resume from.{why} Pass the folder of one as "
            '`resume_from_checkpoint`, or `"auto"` to start fresh when there is none.'
        )
    if newest is not None:
        logger.info("Resuming from `%s`.", newest)
    return None if newest is None else str(newest)


def load_state(checkpoint: str, args: Any) -> TrainerState:
    """Returns the `TrainerState` in `checkpoint`.

    A best checkpoint that is no longer where it was is looked for beside this one; when it is gone, a warning says so.
    Arguments that changed the meaning of steps since the checkpoint are named in a warning.
    """
    path = Path(checkpoint) / layout.TRAINER_STATE
    with backends.restoring(path):
        state = TrainerState.load_from_json(path)
    if not isinstance(state.global_step, int) or not isinstance(state.log_history, list):
        raise CheckpointError(f"`{path}` is damaged: it has no step or no history. Pass another checkpoint.")
    best = state.best_model_checkpoint
    if best is not None and not Path(best).is_dir():
        beside = Path(checkpoint).parent / Path(best).name
        state.best_model_checkpoint = str(beside) if beside.is_dir() else None
        if state.best_model_checkpoint is None:
            logger.warning("The best checkpoint `%s` is gone; the best metric so far stays known.", best)
    for name in ("logging_steps", "eval_steps", "save_steps"):
        now, before = getattr(args, name, None), getattr(state, name)
        if now is not None and now >= 1 and now != before:
            logger.warning("`%s` was %s in the checkpoint and is %s now.", name, before, now)
    return state


def load_model(
    checkpoint: str, *, accelerator: Any, model: nn.Module, model_wrapped: Any = None, verify: bool = True
) -> None:
    """Loads the weights of `checkpoint`, whatever wrote them, after verifying its files.

    Args:
        model: the model to fill; with FSDP and DeepSpeed, which load into the prepared model, `model_wrapped` is it.
        verify: process 0 hashes the files, unless they were already and did not change; the others compare sizes.

    Raises:
        CheckpointError: a file is not what was saved, or the weights did not arrive in the model.
    """
    folder = Path(checkpoint)
    if verify and (read_manifest(folder) is not None or (folder / layout.TRAINER_STATE).is_file()):
        problem = find_problem(folder, deep=ranks.is_world_process_zero())
        raise_together(CheckpointError(f"`{folder}` {_phrase(problem)}.") if problem else None)
    elif not folder.is_dir():
        raise CheckpointError(f"`{folder}` is not a folder. Pass the folder of a checkpoint.")
    sharded = backends.uses_deepspeed(accelerator) or backends.uses_fsdp(accelerator)
    if sharded and (layout.sharded_parts(folder) or backends.uses_deepspeed(accelerator)):
        backends.load_sharded_weights(
            folder,
            accelerator=accelerator,
            model=model,
            model_wrapped=model if model_wrapped is None else model_wrapped,
        )
    else:
        load_weights(folder, model)


def load_best_model(state: TrainerState, *, accelerator: Any, model: nn.Module, model_wrapped: Any = None) -> None:
    """Loads the weights of `state.best_model_checkpoint` into `model`.

    Weights in files of the user's own, written by an override of `_save`, are left to the user, with a warning.
    """
    assert state.best_model_checkpoint is not None
    folder = Path(state.best_model_checkpoint)
    if folder.is_dir() and not _has_weights(folder):
        logger.warning(
            "The best model was not loaded: `%s` holds no weights under a name known here. The model is that of the "
            "last step. Override `_load_best_model` beside `_save`.",
            folder,
        )
        return
    logger.info("Loading the best model from `%s` (%s).", state.best_model_checkpoint, state.best_metric)
    load_model(state.best_model_checkpoint, accelerator=accelerator, model=model, model_wrapped=model_wrapped)


def _has_weights(folder: Path) -> bool:
    """Returns whether there are weights in `folder`; files that cannot be read are for whoever loads them to say."""
    try:
        return bool(layout.find_weights(folder))
    except (OSError, ValueError, KeyError, TypeError):
        return True


def _phrase(problem: str) -> str:
    """Returns a problem as the rest of a sentence about the folder."""
    verbs = ("is ", "does ", "was ", "cannot ", "has ", "holds ")
    return problem if problem.startswith(verbs) else f"is not valid: {problem}"
