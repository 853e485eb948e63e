"""When to evaluate, what is kept of it, and which checkpoint counts as the best."""

# ruff: noqa: RUF009

import math
from dataclasses import dataclass

from finetune.arguments.base import ArgumentGroup, arg, require, require_choice, require_positive
from finetune.compat import IntervalStrategy


@dataclass(kw_only=True, repr=False)
class EvaluationArguments(ArgumentGroup):
    """The evaluation loop."""

    eval_strategy: IntervalStrategy | str = arg(
        "no", "When to evaluate: `no`, `steps` or `epoch`.", old=["evaluation_strategy"]
    )
    eval_steps: float | None = arg(
        None, "Steps between evaluations; below 1 a share of all steps; unset means `logging_steps`."
    )
    eval_delay: float = arg(0, "Epochs or steps (as `eval_strategy` counts) before the first evaluation.")
    eval_on_start: bool = arg(False, "Evaluate once before the first step.")
    per_device_eval_batch_size: int = arg(8, "Samples per device in evaluation.", old=["per_gpu_eval_batch_size"])
    prediction_loss_only: bool = arg(False, "Compute the loss only and keep no predictions.")
    eval_accumulation_steps: int | None = arg(
        None, "Move predictions to the CPU every N batches; unset keeps them on the device until the end."
    )
    eval_do_concat_batches: bool = arg(True, "Join the batches' predictions; otherwise give a list of batches.")
    eval_use_gather_object: bool = arg(False, "Gather arbitrary objects from the processes, not only tensors.")
    include_for_metrics: list[str] = arg(
        factory=list, help="What `compute_metrics` receives besides predictions and labels: `inputs`, `loss`."
    )
    batch_eval_metrics: bool = arg(False, "Call `compute_metrics` after each batch instead of keeping all predictions.")

    def _validate(self) -> None:
        require_positive("per_device_eval_batch_size", self.per_device_eval_batch_size)
        require_positive("eval_accumulation_steps", self.eval_accumulation_steps)
        require_positive("eval_delay", self.eval_delay, zero=True)
        if self.eval_strategy == IntervalStrategy.STEPS:
            require_positive("eval_steps", self.eval_steps)
            require_whole("eval_steps", self.eval_steps)
        for item in self.include_for_metrics:
            require_choice("include_for_metrics", item, ["inputs", "loss"])


@dataclass(kw_only=True, repr=False)
class BestModelArguments(ArgumentGroup):
    """Which checkpoint is the best."""

    load_best_model_at_end: bool = arg(False, "Load the best checkpoint when training ends; needs evaluation.")
    metric_for_best_model: str | None = arg(
        None, "Metric that compares checkpoints, with or without `eval_`; unset means `loss` where one is needed."
    )
    greater_is_better: bool | None = arg(
        None, "Whether a larger metric is better; unset means yes, unless its name ends in `loss`."
    )


def require_whole(name: str, value: float | None) -> None:
    """Raises ArgumentError for a count of steps such as 2.5; values below 1 are shares of the run."""
    require(
        value is None or value <= 1 or (math.isfinite(value) and value == int(value)),
        f"`{name}={value}` must be a whole number of steps, or a share of all steps below 1.",
    )
