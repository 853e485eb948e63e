"""Checks that a trainer makes before it prepares rows and loads weights, so that a mistake costs seconds, not minutes.

Each of them is made again where its subject is used; these find the same mistakes earlier.
"""

import copy
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from finetune.engine.checks import check_eval_dataset
from finetune.errors import ArgumentError
from finetune.models.adapters import check_peft_config
from finetune.optim.registry import is_built_here, optimizer_cls_and_kwargs
from finetune.reporting import trackers

if TYPE_CHECKING:
    from finetune.arguments import TrainingArguments

# A trainer whose class overrides one of them chooses its optimizer itself.
_OPTIMIZER_METHODS = ("create_optimizer", "create_optimizer_and_scheduler", "get_optimizer_cls_and_kwargs")


def check_given(
    *, processing_class: Any = None, callbacks: Any = None, formatting_func: Callable[..., Any] | None = None
) -> None:
    """Raises `ArgumentError` for arguments of a trainer's constructor that are of a wrong type."""
    if isinstance(processing_class, (str, os.PathLike)):
        name = os.fspath(processing_class)
        raise ArgumentError(
            f"`processing_class={name!r}` must be a tokenizer or a processor, not its name. Pass "
            f"`AutoTokenizer.from_pretrained({name!r})`, or leave it out to use the model's."
        )
    if callbacks is not None and (isinstance(callbacks, str) or not isinstance(callbacks, Iterable)):
        kind = callbacks.__name__ if isinstance(callbacks, type) else type(callbacks).__name__
        raise ArgumentError(f"`callbacks` must be a list of callbacks, got {kind}. Write `callbacks=[...]`.")
    if formatting_func is not None and not callable(formatting_func):
        raise ArgumentError(
            f"`formatting_func={formatting_func!r}` must be a function of one row. To name a column, set "
            "`dataset_text_field` in the configuration."
        )


def check_before_rows(
    trainer: Any,
    args: "TrainingArguments",
    *,
    model: Any,
    train_dataset: Any,
    eval_dataset: Any,
    peft_config: Any,
    brings_optimizer: bool,
) -> None:
    """Raises `ArgumentError` for what would otherwise be found once the rows are prepared and the model is loaded.

    `brings_optimizer`: an optimizer, or its class, was given to the constructor, so `args.optim` is not used.
    """
    if not isinstance(model, (str, nn.Module)):
        given = "is required" if model is None else f"is a {type(model).__name__}"
        raise ArgumentError(f"`model` {given}. Pass a folder, a Hub id or a loaded model (`torch.nn.Module`).")
    if train_dataset is None:
        raise ArgumentError("`train_dataset` is required.")
    check_eval_dataset(args, eval_dataset)
    trackers.resolve(args.report_to)
    if peft_config is not None:
        check_peft_config(peft_config, model)
    if args.use_liger_kernel:
        from finetune.kernels.liger import require_liger

        require_liger()
    if not brings_optimizer and not _chooses_optimizer(type(trainer)):
        _check_optimizer(args)


def _chooses_optimizer(cls: type) -> bool:
    package = __name__.split(".")[0]
    return any(getattr(cls, name).__module__.split(".")[0] != package for name in _OPTIMIZER_METHODS)


def _check_optimizer(args: "TrainingArguments") -> None:
    """Builds the optimizer for a stand-in of the model: names, packages and `optim_args` are the same for both.

    Left out are optimizers that others registered, which may want the model itself, and galore_torch, which warns.
    """
    if not is_built_here(args) or "galore_torch" in str(args.optim_args):
        return
    trial = copy.copy(args)
    if isinstance(trial.optim_target_modules, (str, list, tuple)) and trial.optim_target_modules:
        trial.optim_target_modules = "all-linear"  # the names are those of the model
    optimizer_cls_and_kwargs(trial, _StandIn())


class _StandIn(nn.Module):
    """Has a matrix of each kind that optimizers tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(2, 2), nn.Linear(2, 2)
