"""How long to train, with which batches, learning rate and optimizer."""

# ruff: noqa: RUF009

import math
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

from finetune.arguments.base import ArgumentGroup, arg, require, require_positive
from finetune.compat import OptimizerNames, SchedulerType
from finetune.errors import ArgumentError, nearest

# Names that `finetune.optim` or a user registered besides those of transformers. `optim` is checked against both.
REGISTERED_OPTIMIZERS = {"adadelta", "adam", "adamax", "asgd", "muon", "nadam", "radam", "rprop"}


@cache
def default_optimizer() -> str:
    """Returns `adamw_torch_fused` from torch 2.8 on, else `adamw_torch`; does not import torch."""
    from importlib.metadata import version

    major, minor = (int(part) for part in version("torch").split(".")[:2])
    return "adamw_torch_fused" if (major, minor) >= (2, 8) else "adamw_torch"


@dataclass(kw_only=True, repr=False)
class BatchingArguments(ArgumentGroup):
    """Size of a batch and length of the run."""

    per_device_train_batch_size: int = arg(
        8, "Training samples per device and forward pass.", old=["per_gpu_train_batch_size"]
    )
    gradient_accumulation_steps: int = arg(
        1, "Forward passes per optimizer step. Samples per step = batch size x devices x this."
    )
    num_train_epochs: float = arg(3.0, "Passes over the training data; a fraction stops inside the last pass.")
    max_steps: int = arg(
        -1, "Optimizer steps to train; from 0 on it overrides `num_train_epochs`. Needed for data without a length."
    )
    average_tokens_across_devices: bool = arg(
        True, "Divide the loss by the tokens of all devices together, so that every token weighs the same."
    )
    auto_find_batch_size: bool = arg(
        False, "Halve the training batch size and start again when the device runs out of memory."
    )

    def _validate(self) -> None:
        require_positive("per_device_train_batch_size", self.per_device_train_batch_size)
        require_positive("gradient_accumulation_steps", self.gradient_accumulation_steps)
        whole = self.max_steps is not None and math.isfinite(self.max_steps) and self.max_steps == int(self.max_steps)
        require(
            whole, f"`max_steps={self.max_steps}` must be a number of whole steps; -1 leaves it to `num_train_epochs`."
        )
        epochs = self.num_train_epochs  # None where a YAML file says null
        require(
            self.max_steps >= 0 or (epochs is not None and 0 <= epochs < math.inf),
            f"`num_train_epochs={epochs}` must be at least 0 and finite, unless `max_steps` is.",
        )


@dataclass(kw_only=True, repr=False)
class ScheduleArguments(ArgumentGroup):
    """The learning rate over the run."""

    learning_rate: float = arg(5e-5, "Peak learning rate.")
    lr_scheduler_type: SchedulerType | str = arg("linear", "Shape of the learning rate over the run.")
    lr_scheduler_kwargs: dict[str, Any] | str | None = arg(
        None, "Further settings of the schedule, as a dict or JSON, such as {'num_cycles': 1}."
    )
    warmup_steps: float = arg(
        0, "Steps during which the rate rises from 0 to its peak; a value below 1 is a share of all steps."
    )

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Returns the warm-up in steps; a share is rounded up.

        >>> ScheduleArguments(warmup_steps=0.05).get_warmup_steps(50)
        3
        >>> ScheduleArguments(warmup_steps=7).get_warmup_steps(50)
        7
        """
        return int(self.warmup_steps) if self.warmup_steps >= 1 else math.ceil(num_training_steps * self.warmup_steps)

    def _validate(self) -> None:
        require_positive("learning_rate", self.learning_rate, zero=True)
        require_positive("warmup_steps", self.warmup_steps, zero=True)


@dataclass(kw_only=True, repr=False)
class OptimizerArguments(ArgumentGroup):
    """The optimizer and what is done to gradients and targets before it."""

    optim: OptimizerNames | str = arg(default_optimizer(), "Optimizer; the names of transformers and registered ones.")
    optim_args: str | None = arg(None, "Further settings of the optimizer, as `key=value,key=value`.")
    # The order of this union decides how HfArgumentParser reads the flag: the second member, here a string.
    optim_target_modules: None | str | list[str] = arg(  # noqa: RUF036
        None, "Modules that GaLore and APOLLO project: names, a regular expression, or `all-linear`."
    )
    weight_decay: float = arg(0.0, "Decoupled weight decay; biases and normalisation weights are exempt.")
    adam_beta1: float = arg(0.9, "Decay rate of Adam's first moment.")
    adam_beta2: float = arg(0.999, "Decay rate of Adam's second moment.")
    adam_epsilon: float = arg(1e-8, "Added to Adam's denominator.")
    max_grad_norm: float = arg(1.0, "Gradients are scaled down to this global norm; 0 turns clipping off.")
    label_smoothing_factor: float = arg(
        0.0, "Share of the target probability that is spread over all classes.", old=["label_smoothing"]
    )

    def _validate(self) -> None:
        known = {member.value for member in OptimizerNames} | REGISTERED_OPTIMIZERS
        if self.optim not in known:
            raise ArgumentError(
                f"`optim={str(self.optim)!r}` is unknown.{nearest(str(self.optim), known)} Known: {sorted(known)}."
            )
        name = str(getattr(self.optim, "value", self.optim))
        # An optimizer that somebody registered may well look at them.
        ours = name == "muon" or isinstance(self.optim, OptimizerNames)
        if self.optim_target_modules and ours and not name.startswith(("galore", "apollo")):
            warnings.warn(
                f"`optim_target_modules` has no effect with `optim={name}`: only GaLore and APOLLO project.",
                stacklevel=2,
            )
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"`{name}={value}` must be in [0, 1).")
        require_positive("adam_epsilon", self.adam_epsilon, zero=True)
        require_positive("weight_decay", self.weight_decay, zero=True)
        if self.max_grad_norm is None:
            self.max_grad_norm = 0.0  # transformers takes None as no clipping
        require_positive("max_grad_norm", self.max_grad_norm, zero=True)
        require(
            0 <= self.label_smoothing_factor < 1,
            f"`label_smoothing_factor={self.label_smoothing_factor}` must be in [0, 1): at 1 no label counts.",
        )
