"""The callbacks every run needs: the default flow, progress on the terminal, and early stopping."""

import logging
from collections.abc import Iterable, Mapping, Sized
from typing import Any

import numpy as np

from finetune.control.callbacks import TrainerCallback
from finetune.control.state import ExportableState, TrainerControl, TrainerState
from finetune.errors import ArgumentError

logger = logging.getLogger(__name__)


class DefaultFlowCallback(TrainerCallback):
    """Decides from the arguments when to log, evaluate, save and stop."""

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        step = state.global_step
        may_evaluate = args.eval_strategy == "steps" and args.eval_delay <= step
        if step == 1 and args.logging_first_step:
            control.should_log = True
        if args.logging_strategy == "steps" and step % state.logging_steps == 0:
            control.should_log = True
        if may_evaluate and step % state.eval_steps == 0:
            control.should_evaluate = True
        if args.save_strategy == "steps" and state.save_steps > 0 and step % state.save_steps == 0:
            control.should_save = True
        if step >= state.max_steps:
            control.should_training_stop = True
            if may_evaluate:
                control.should_evaluate = True
            if args.save_strategy == "steps":
                control.should_save = True
        return control

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        if args.logging_strategy == "epoch":
            control.should_log = True
        if args.eval_strategy == "epoch" and args.eval_delay <= (state.epoch or 0):
            control.should_evaluate = True
        if args.save_strategy == "epoch":
            control.should_save = True
        return control


class ProgressCallback(TrainerCallback):
    """A bar for training and one for evaluation, on the first process; logs are written above it.

    `max_str_len` is the number of characters from which a logged string is replaced by its length.
    """

    def __init__(self, max_str_len: int = 100) -> None:
        self.training_bar: Any = None
        self.prediction_bar: Any = None
        self._handlers: list[logging.Handler] = []
        self.max_str_len = max_str_len
        self.current_step = 0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        from tqdm.auto import tqdm

        # A resumed run starts in the middle: `initial` keeps the earlier steps out of the measured rate.
        self.current_step = state.global_step
        if state.is_world_process_zero:
            self.close()
            self._watch_messages(True)
            self.training_bar = tqdm(total=state.max_steps, initial=self.current_step, dynamic_ncols=True, unit="step")

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.training_bar is not None:
            self.training_bar.update(state.global_step - self.current_step)
            self.current_step = state.global_step

    def on_prediction_step(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or (total := _length(eval_dataloader)) is None:
            return
        if self.prediction_bar is None:
            from tqdm.auto import tqdm

            self.prediction_bar = tqdm(
                total=total,
                leave=self.training_bar is None,
                dynamic_ncols=True,
                desc="evaluating",
                unit="batch",
            )
        self.prediction_bar.update(1)

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._close_prediction_bar()

    def on_predict(self, args: Any, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any) -> None:
        self._close_prediction_bar()

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is None or not logs:
            return
        shown = {name: self._shorten(value) for name, value in logs.items() if name != "total_flos"}
        names = [name for name in ("loss", "eval_loss", "learning_rate") if name in logs]
        if names:
            self.training_bar.set_postfix(
                {name.replace("learning_rate", "lr"): shown[name] for name in names}, refresh=False
            )
        self.training_bar.write(str(shown))

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._close_training_bar()

    def close(self) -> None:
        """Closes the bars: the next ones would be drawn below those that an error has left open."""
        self._close_prediction_bar()
        self._close_training_bar()

    def _watch_messages(self, watch: bool) -> None:
        for handler in self._handlers:
            handler.removeFilter(self._clear_bars)
        self._handlers = _handlers() if watch else []
        for handler in self._handlers:
            handler.addFilter(self._clear_bars)

    def _clear_bars(self, record: logging.LogRecord) -> bool:
        """Takes the bars off the screen until their next update: a message would continue their line."""
        for bar in (self.prediction_bar, self.training_bar):
            if bar is not None:
                bar.clear()
        return True

    def _shorten(self, value: Any) -> Any:
        if isinstance(value, str) and len(value) > self.max_str_len:
            return f"[{len(value)} characters, more than `max_str_len`={self.max_str_len}]"
        return f"{value:.4g}" if isinstance(value, float) else value

    def _close_prediction_bar(self) -> None:
        if self.prediction_bar is not None:
            self.prediction_bar.close()
            self.prediction_bar = None

    def _close_training_bar(self) -> None:
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None
        self._watch_messages(False)


def close_bars(callbacks: Iterable[Any]) -> None:
    """Closes the progress bars that are still open. Called when training or an evaluation ends, by an error too."""
    for callback in callbacks:
        if isinstance(callback, ProgressCallback):
            callback.close()


class PrinterCallback(TrainerCallback):
    """Prints each log on the first process of each machine; used when `disable_tqdm` is set."""

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        if state.is_local_process_zero and logs is not None:
            print(
                {
                    name: f"{value:.4g}" if isinstance(value, float) else value
                    for name, value in logs.items()
                    if name != "total_flos"
                }
            )


class EarlyStoppingCallback(TrainerCallback, ExportableState):
    """Stops the run when `metric_for_best_model` has not improved for `early_stopping_patience` evaluations.

    An improvement must exceed `early_stopping_threshold`, in the unit of the metric. The count of evaluations
    without improvement is part of the checkpoint.

    Raises:
        ArgumentError: at the start of training, when there is no metric to watch or no evaluation; by an evaluation
            outside of training, when there is no metric.
    """

    def __init__(self, early_stopping_patience: int = 1, early_stopping_threshold: float | None = 0.0) -> None:
        self.early_stopping_patience = early_stopping_patience
        self.early_stopping_threshold = early_stopping_threshold
        self.early_stopping_patience_counter = 0

    def check_metric_value(self, args: Any, state: TrainerState, control: TrainerControl, metric_value: float) -> None:
        """Counts this evaluation; `state.best_metric` is still that of the evaluations before it."""
        better = np.greater if args.greater_is_better else np.less
        best = state.best_metric
        if best is None or (
            better(metric_value, best) and abs(metric_value - best) > (self.early_stopping_threshold or 0.0)
        ):
            self.early_stopping_patience_counter = 0
        else:
            self.early_stopping_patience_counter += 1

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        _require_metric(args)
        if args.eval_strategy == "no":
            raise ArgumentError(
                "`EarlyStoppingCallback` needs evaluations, and `eval_strategy` is `no`. Set it to `steps` or `epoch`."
            )
        if not args.load_best_model_at_end:
            logger.warning(
                "`EarlyStoppingCallback` without `load_best_model_at_end=True`: the model kept at the end is the last "
                "one, not the best."
            )

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        name = _require_metric(args)
        name = name if name.startswith("eval_") else f"eval_{name}"
        value = metrics.get(name)
        if value is None and _is_of_another_set(name, metrics):
            return
        if value is None:
            logger.warning(
                "`metric_for_best_model` names `%s`, which this evaluation did not report, so it does not count for "
                "early stopping. It reported: %s",
                name,
                ", ".join(metrics),
            )
            return
        self.check_metric_value(args, state, control, value)
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True

    def state(self) -> dict[str, Any]:
        return {
            "args": {
                "early_stopping_patience": self.early_stopping_patience,
                "early_stopping_threshold": self.early_stopping_threshold,
            },
            "attributes": {"early_stopping_patience_counter": self.early_stopping_patience_counter},
        }


def _is_of_another_set(name: str, metrics: Mapping[str, Any]) -> bool:
    """Returns whether `metrics` are those of one of several evaluation sets, and `name` is a metric of another one.

    Every evaluation reports its `<prefix>_runtime`: `eval_runtime` for the only set, `eval_<set>_runtime` for others.
    """
    prefixes = [key.removesuffix("_runtime") for key in metrics if key.endswith("_runtime")]
    return bool(prefixes) and not any(name.startswith(f"{prefix}_") for prefix in prefixes)


def _require_metric(args: Any) -> str:
    if args.metric_for_best_model is None:
        raise ArgumentError(
            "`EarlyStoppingCallback` needs a metric to watch, and `metric_for_best_model` is None. Set it, for "
            'instance to `"eval_loss"`.'
        )
    return args.metric_for_best_model


def _handlers() -> list[logging.Handler]:
    """Returns the handlers that this package's messages go through."""
    found: list[logging.Handler] = []
    each: logging.Logger | None = logger
    while each is not None:
        found += each.handlers
        each = each.parent if each.propagate else None
    return found or ([logging.lastResort] if logging.lastResort else [])


def _length(loader: Any) -> int | None:
    """Returns the number of batches, or None where it is unknown (streaming)."""
    if not isinstance(loader, Sized):
        return None
    try:
        return len(loader)
    except TypeError:
        return None
