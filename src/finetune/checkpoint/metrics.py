"""The metric that decides which checkpoint is the best one."""

from collections.abc import Mapping
from typing import Any

from finetune.control.state import TrainerState
from finetune.errors import ArgumentError, nearest, ticked


class MissingMetricError(ArgumentError, KeyError):
    """`metric_for_best_model` is not among the evaluation's metrics."""

    __str__ = Exception.__str__  # KeyError would print the message in quotes.


def read_metric(metrics: Mapping[str, Any], name: str | None) -> float:
    """Returns the metric called `name`, with or without the prefix `eval_`.

    Raises:
        MissingMetricError: the evaluation did not report it.
    """
    key = metric_key(name)
    if key not in metrics:
        raise MissingMetricError(
            f"`metric_for_best_model` is `{name}`, and the evaluation has no `{key}`; it reports "
            f"{ticked(metrics) or 'nothing'}.{nearest(key, metrics)} Let "
            "`compute_metrics` return it, or name another metric."
        )
    return metrics[key]


def metric_key(name: str | None) -> str:
    """Returns the key of a metric in the evaluation's results.

    >>> metric_key("accuracy"), metric_key("eval_loss")
    ('eval_accuracy', 'eval_loss')
    """
    name = name or "loss"
    return name if name.startswith("eval_") else f"eval_{name}"


def determine_best_metric(metrics: Mapping[str, Any], *, args: Any, state: TrainerState) -> bool:
    """Returns whether this evaluation is the best so far, after noting metric and step in `state`. NaN never is."""
    if args.metric_for_best_model is None:
        return False
    value, best = read_metric(metrics, args.metric_for_best_model), state.best_metric
    better = best is None and value == value and abs(value) != float("inf")
    if best is not None:
        better = value > best if args.greater_is_better else value < best
    if better:
        state.best_metric = value
        if str(getattr(args.save_strategy, "value", args.save_strategy)) in ("steps", "epoch", "best"):
            state.best_global_step = state.global_step
    return bool(better)


def current_metric(state: TrainerState, name: str | None) -> float | None:
    """Returns `metric_for_best_model` as it was logged at the present step, None without an evaluation here."""
    key = metric_key(name)
    for entry in reversed(state.log_history):
        if entry.get("step") != state.global_step:
            return None
        if key in entry:
            return float(entry[key])
    return None
