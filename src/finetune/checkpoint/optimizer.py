"""The files of optimizer, learning rate schedule and loss scaler: tensors and plain values, verified when loaded."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from finetune.checkpoint import backends, files, layout
from finetune.checkpoint.writer import CheckpointWriter
from finetune.errors import CheckpointError

logger = logging.getLogger(__name__)

OPTIMIZER_LAYOUT = "optimizer_layout.json"

# The settings of an optimizer that arguments have names for, by the name in its parameter groups.
_ARGUMENT_OF = {
    "initial_lr": "`learning_rate`",
    "weight_decay": "`weight_decay`",
    "betas": "`adam_beta1`, `adam_beta2`",
    "eps": "`adam_epsilon`",
}


def save_optimizer_and_scheduler(
    output_dir: str | os.PathLike[str],
    *,
    accelerator: Any,
    args: Any,
    model: nn.Module,
    model_wrapped: Any,
    optimizer: Any,
    lr_scheduler: Any,
    writer: CheckpointWriter,
) -> None:
    """Writes `optimizer.pt` and `scheduler.pt`, or what FSDP and DeepSpeed write instead. Called on all processes."""
    folder = Path(output_dir)
    with files.writing(folder):
        sharded = backends.save_sharded(
            folder, accelerator=accelerator, model=model, model_wrapped=model_wrapped, optimizer=optimizer
        )
    if not args.should_save:
        return
    if not sharded:
        state = writer.snapshot(optimizer.state_dict())
        names = json.dumps(parameter_layout(model, optimizer))
        writer.run(lambda: files.save_plain(state, folder / layout.OPTIMIZER))
        writer.run(lambda: _write_text(folder / OPTIMIZER_LAYOUT, names))
    if not backends.owns_schedule(accelerator, lr_scheduler):
        schedule = writer.snapshot(lr_scheduler.state_dict())
        writer.run(lambda: files.save_plain(schedule, folder / layout.SCHEDULER))


def load_optimizer_and_scheduler(
    checkpoint: str | os.PathLike[str] | None, *, accelerator: Any, model: nn.Module, optimizer: Any, lr_scheduler: Any
) -> None:
    """Restores optimizer and schedule in place, and verifies that what they hold is what the files hold.

    A checkpoint of `save_only_model` has neither: both stay as they are, with a warning. DeepSpeed restored its own
    optimizer together with the weights.

    Raises:
        CheckpointError: the state is of other parameters, or did not arrive.
    """
    if checkpoint is None:
        return
    folder = Path(checkpoint)
    if not backends.load_sharded_optimizer(folder, accelerator=accelerator, model=model, optimizer=optimizer):
        if not (folder / layout.OPTIMIZER).is_file():
            logger.warning(
                "`%s` has weights only: the optimizer and the learning rate schedule start from the beginning.", folder
            )
            return
        load_optimizer(folder, model, optimizer)
    if not backends.owns_schedule(accelerator, lr_scheduler):
        path = folder / layout.SCHEDULER
        with backends.restoring(path):
            lr_scheduler.load_state_dict(files.load_plain(path, allow=files.numpy_scalar_globals()))


def load_optimizer(folder: Path, model: nn.Module, optimizer: Any) -> None:
    """Restores `optimizer` from `optimizer.pt` and compares every tensor it then holds with the file.

    The settings in the file, such as the learning rate, replace those of the arguments, as in PyTorch and
    transformers; a warning names those that differ.

    Raises:
        CheckpointError: another kind of optimizer, other parameters, other shapes, or a tensor that arrived changed.
    """
    names, same_types = folder / OPTIMIZER_LAYOUT, False
    if names.is_file():
        here = parameter_layout(model, optimizer)
        with backends.restoring(names):
            saved = json.loads(names.read_text(encoding="utf-8"))
            same_types = saved == here
            same = _without_types(saved) == _without_types(here)
        if not same:
            raise CheckpointError(
                f"The optimizer state in `{folder}` is of other parameters: {_first_difference(saved, here)}. Resume "
                "with the same model, adapters, frozen layers and `optim`, or start without `resume_from_checkpoint`."
            )
    state, asked = files.load_plain(folder / layout.OPTIMIZER), [dict(group) for group in optimizer.param_groups]
    with backends.restoring(folder / layout.OPTIMIZER):
        optimizer.load_state_dict(state)
        if same_types:
            _keep_types(state.get("state", {}), optimizer.state_dict().get("state", {}))
    _compare_settings(folder, asked, optimizer)
    # `state` may share memory with the optimizer now; equality of a tensor with itself is what is wanted then.
    difference = _difference(state.get("state", {}), optimizer.state_dict().get("state", {}), "state")
    if difference:
        raise CheckpointError(
            f"The optimizer did not take over its state from `{folder}`: {difference}. Resume with the same `optim` "
            "and the same data type of the weights as before."
        )


def _keep_types(saved: Any, live: Any) -> None:
    """Puts state back that torch rounded to the type of its weights, where the optimizer keeps a wider one.

    Adafactor of transformers keeps float32 for weights in 16 bits, as do scalars of NAdam and ASGD. `live` holds the
    dictionaries that the optimizer works on.
    """
    for key, state in saved.items():
        current = live.get(key)
        if not isinstance(state, dict) or not isinstance(current, dict):
            continue
        for name, value in state.items():
            rounded = current.get(name)
            if not isinstance(value, Tensor) or not isinstance(rounded, Tensor) or value.dtype == rounded.dtype:
                continue
            if value.is_floating_point() and rounded.is_floating_point() and value.shape == rounded.shape:
                current[name] = value.to(rounded.device)


def _compare_settings(folder: Path, asked: list[dict[str, Any]], optimizer: Any) -> None:
    """Raises where the loaded settings are of another kind of optimizer, warns where they are not those asked for."""
    needed = getattr(optimizer, "defaults", {})
    for before, now in zip(asked, optimizer.param_groups, strict=True):
        missing = [f"`{name}`" for name in needed if name in before and name not in now]
        if missing:
            raise CheckpointError(
                f"The optimizer state in `{folder}` is of another kind of optimizer, without {', '.join(missing)}. "
                "Resume with the same `optim`, or train the checkpoint's weights without `resume_from_checkpoint`."
            )
    changed: dict[str, None] = {}
    for before, now in zip(asked, optimizer.param_groups, strict=True):
        # Schedules that cycle momentum, or betas in its place, move what was asked for.
        fixed = (name for name in _ARGUMENT_OF if name != "betas" or "max_momentum" not in now)
        for name in fixed:
            if name in before and name in now and _plain(before[name]) != _plain(now[name]):
                changed[f"{_ARGUMENT_OF[name]} {now[name]} instead of {before[name]}"] = None
    if changed:
        logger.warning(
            "The optimizer goes on with the settings of the checkpoint, not with those of the arguments: %s. To change "
            "them, train the checkpoint's weights without `resume_from_checkpoint`.",
            "; ".join(changed),
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def parameter_layout(model: nn.Module, optimizer: Any) -> list[list[list[Any]]]:
    """Returns, per parameter group, `[name, shape, type]` of each parameter, in the order the optimizer numbers them.

    Layouts of older checkpoints have no types.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def entry(parameter: Tensor) -> list[Any]:
        name = names.get(id(parameter), "?").replace("_orig_mod.", "").removeprefix("module.")
        return [name, list(parameter.shape), str(parameter.dtype)]

    return [[entry(parameter) for parameter in group["params"]] for group in optimizer.param_groups]


def save_scaler(output_dir: str | os.PathLike[str], *, accelerator: Any, args: Any, writer: CheckpointWriter) -> None:
    """Writes `scaler.pt` when training scales its loss (fp16)."""
    scaler = getattr(accelerator, "scaler", None)
    if scaler is not None and args.should_save:
        state = writer.snapshot(scaler.state_dict())
        writer.run(lambda: files.save_plain(state, Path(output_dir) / layout.SCALER))


def load_scaler(checkpoint: str | os.PathLike[str] | None, *, accelerator: Any) -> None:
    """Restores the loss scaler when the checkpoint has one."""
    path = Path(checkpoint) / layout.SCALER if checkpoint is not None else None
    scaler = getattr(accelerator, "scaler", None)
    if path is None or not path.is_file():
        return
    if scaler is None:
        logger.warning("The checkpoint was trained with a loss scaler (fp16); this run has none.")
        return
    with backends.restoring(path):
        scaler.load_state_dict(files.load_plain(path))


def _write_text(path: Path, text: str) -> None:
    with files.writing(path):
        path.write_text(text, encoding="utf-8")


def _without_types(groups: list[list[list[Any]]]) -> list[list[list[Any]]]:
    return [[entry[:2] for entry in group] for group in groups]


def _first_difference(saved: list[list[Any]], here: list[list[Any]]) -> str:
    flat = [[entry for group in side for entry in group] for side in (saved, here)]
    for number, (old, new) in enumerate(zip(*flat, strict=False)):
        if old[:2] != new[:2]:
            return f"number {number} was `{old[0]}` {tuple(old[1])} and is `{new[0]}` {tuple(new[1])}"
    return f"there were {len(flat[0])} in {len(saved)} groups and are {len(flat[1])} in {len(here)}"


def _difference(saved: Any, live: Any, where: str) -> str | None:
    """Returns the first place where the restored state is not bit for bit the saved one."""
    if isinstance(saved, Tensor):
        if isinstance(live, Tensor) and (saved is live or files.same_bits(saved, live)):
            return None
        return f"`{where}` was {saved.dtype} {tuple(saved.shape)} and is " + (
            f"{live.dtype} {tuple(live.shape)} with other values" if isinstance(live, Tensor) else f"`{live!r:.40}`"
        )
    if isinstance(saved, dict) and isinstance(live, dict):
        for key, value in saved.items():
            if key not in live:
                return f"`{where}.{key}` is missing"
            found = _difference(value, live[key], f"{where}.{key}")
            if found:
                return found
    return None
