"""Learning-rate schedules: every name of transformers' `SchedulerType`, most of them built by transformers itself."""

import inspect
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from finetune.errors import ArgumentError, nearest


class ScheduleArguments(Protocol):
    """The arguments a schedule depends on; `TrainingArguments` has them."""

    lr_scheduler_type: Any
    lr_scheduler_kwargs: Any

    def get_warmup_steps(self, num_training_steps: int) -> int: ...


def _linear(step: int, *, warmup: int, total: int) -> float:
    """Returns the factor of the learning rate: for 2 steps of warmup and 6 in all 0, 0.5, 1, 0.75, 0.5, 0.25, 0."""
    if step < warmup:
        return step / warmup
    return max(0.0, (total - step) / max(1, total - warmup))


def _cosine(step: int, *, warmup: int, total: int) -> float:
    if step < warmup:
        return step / warmup
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((step - warmup) / max(1, total - warmup)))))


def _constant(step: int, *, warmup: int, total: int) -> float:
    return 1.0


def _constant_with_warmup(step: int, *, warmup: int, total: int) -> float:
    return step / warmup if step < warmup else 1.0


# The same numbers as transformers', whose module of schedules imports peft and bitsandbytes, seconds of each start.
_BUILT_HERE = {
    "linear": _linear,
    "cosine": _cosine,
    "constant": _constant,
    "constant_with_warmup": _constant_with_warmup,
}


def build_scheduler(args: ScheduleArguments, optimizer: Optimizer, num_training_steps: int) -> Any:
    """Returns the scheduler that `args.lr_scheduler_type` names, stepped once per optimizer step.

    The values are those of `transformers.get_scheduler` to the last bit. Every parameter group keeps its own base
    learning rate. Raises `ArgumentError` for an unknown name, and for keys of `lr_scheduler_kwargs` that the schedule
    does not take.
    """
    given = args.lr_scheduler_type
    name = str(getattr(given, "value", given))
    warmup = args.get_warmup_steps(num_training_steps)
    if name in _BUILT_HERE and not args.lr_scheduler_kwargs:
        return LambdaLR(optimizer, partial(_BUILT_HERE[name], warmup=warmup, total=num_training_steps))

    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler

    functions = {str(key.value): function for key, function in TYPE_TO_SCHEDULER_FUNCTION.items()}
    if name not in functions:
        raise ArgumentError(
            f"`lr_scheduler_type={name}` is not a schedule.{nearest(name, functions)} Allowed: {', '.join(functions)}."
        )
    options = dict(args.lr_scheduler_kwargs or {})
    _check_options(name, options, functions[name])
    try:
        return get_scheduler(
            name,
            optimizer=optimizer,
            num_warmup_steps=warmup,
            num_training_steps=num_training_steps,
            scheduler_specific_kwargs=options,
        )
    except (TypeError, ValueError) as problem:
        raise ArgumentError(f"`lr_scheduler_type={name}` with `lr_scheduler_kwargs={options}`: {problem}") from problem


def _check_options(name: str, options: Mapping[str, Any], function: Any) -> None:
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        # These two forward their keywords to a class and name the bad one themselves.
        return
    reserved = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    # transformers drops the options of the constant schedules in silence; an option without effect is an error here.
    allowed = [] if name.startswith("constant") else [key for key in parameters if key not in reserved]
    for key in options:
        if key not in allowed:
            raise ArgumentError(
                f"`lr_scheduler_kwargs` has `{key}`, which `lr_scheduler_type={name}` does not take."
                f"{nearest(key, allowed)} Allowed: {', '.join(allowed) or 'none'}."
            )


def needs_metric(scheduler: Any) -> bool:
    """Returns whether the scheduler is stepped with an evaluation metric instead of once per optimizer step."""
    inner = getattr(scheduler, "scheduler", scheduler)
    return isinstance(inner, torch.optim.lr_scheduler.ReduceLROnPlateau) or type(inner).__name__ == "GreedyLR"


def current_learning_rate(scheduler: Any, optimizer: Optimizer) -> float:
    """Returns the learning rate of the first parameter group as a Python float, for the log.

    Schedulers that follow a metric only know it through the optimizer. A DeepSpeed scheduler that has not stepped
    yet, because its loss scale is still being searched, has no rate: 0.0.
    """
    if needs_metric(scheduler):
        rate = optimizer.param_groups[0]["lr"]
    else:
        try:
            rate = scheduler.get_last_lr()[0]
        except AssertionError as problem:
            if "need to call step" not in str(problem):
                raise
            rate = 0.0
    return rate.item() if isinstance(rate, torch.Tensor) else rate
