"""Finds a `metric_for_best_model` that no evaluation can report before training, not at the first evaluation."""

from typing import Any

from finetune.checkpoint.metrics import MissingMetricError, metric_key
from finetune.errors import nearest, ticked

# Whoever overrides one of them may report other metrics.
_METHODS = ("evaluate", "evaluation_loop", "log", "_evaluate", "_determine_best_metric", "_maybe_log_save_evaluate")
_EVENTS = ("on_evaluate", "on_log")  # callbacks get the dict of the metrics, and may add to it
_SPEED = ("runtime", "samples_per_second", "steps_per_second")


def check_best_metric(trainer: Any) -> None:
    """Raises `MissingMetricError` if `metric_for_best_model` is none of the metrics that an evaluation will report.

    Nothing is checked where that cannot be known: with `compute_metrics`, an overridden evaluation, or a callback that
    sees the metrics.
    """
    args = trainer.args
    name = args.metric_for_best_model
    if name is None or str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "no":
        return
    if trainer.compute_metrics is not None or _may_report_more(trainer):
        return
    sets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else None
    prefixes = ["eval"] if sets is None else [f"eval_{key}" for key in sets]
    losses, key = [f"{prefix}_loss" for prefix in prefixes], metric_key(name)
    # `log` gives its metrics the prefix `eval`, also those of one set among several.
    others = [f"{prefix}_{own}" for prefix in ["eval", *prefixes] for own in trainer._token_metric_names]
    if key in losses or key in others or any(key == f"{prefix}_{own}" for prefix in prefixes for own in _SPEED):
        return
    several = "" if sets is None else " With several evaluation sets, the name of one belongs to the metric."
    raise MissingMetricError(
        f"`metric_for_best_model` is `{name}`, and evaluations will not report `{key}`, but {ticked(losses + others)}."
        f"{several}{nearest(key, losses + others)} Name one of them, or pass `compute_metrics` that returns it."
    )


def _may_report_more(trainer: Any) -> bool:
    replaced = any(name in vars(trainer) or _is_foreign(getattr(type(trainer), name)) for name in _METHODS)
    listens = any(
        event in vars(callback) or _is_foreign(getattr(type(callback), event, None))
        for callback in trainer.callback_handler.callbacks
        for event in _EVENTS
    )
    return replaced or listens


def _is_foreign(method: Any) -> bool:
    """Returns whether `method` was written by somebody else than this package or transformers."""
    return method is not None and getattr(method, "__module__", "").split(".")[0] not in ("finetune", "transformers")
