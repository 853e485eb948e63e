"""Hyperparameter search with optuna: one training per trial, with arguments that hold for that trial only.

The functions are methods of the facade, bound there. With several processes the first one asks optuna and tells the
others; pruning is decided by the first one, too, so all leave a trial at the same step.
"""

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any, Protocol

from finetune.arguments import TrainingArguments, replace_arguments
from finetune.compat import BestRun, HPSearchBackend
from finetune.control.callbacks import Events
from finetune.distributed.ranks import broadcast_object
from finetune.errors import ArgumentError, nearest

logger = logging.getLogger(__name__)

_SPEED = ("_runtime", "_samples_per_second", "_steps_per_second", "_model_preparation_time")


class Searchable(Protocol):
    """What a search asks of the trainer."""

    @property
    def args(self) -> TrainingArguments: ...
    @args.setter
    def args(self, value: Any) -> None: ...

    eval_dataset: Any
    model_init: Callable[..., Any] | None
    hp_search_backend: Any
    hp_name: Any
    hp_space: Any
    compute_objective: Any
    objective: Any
    is_deepspeed_enabled: bool
    accelerator: Any
    _token_metric_names: tuple[str, ...]
    _trial: Any
    _events: Events
    _searched_args: Any

    def train(self, resume_from_checkpoint: str | bool | None = None, trial: Any = None) -> Any: ...

    def evaluate(self) -> dict[str, float]: ...

    def create_accelerator_and_postprocess(self) -> None: ...

    def is_world_process_zero(self) -> bool: ...


def default_hp_space(trial: Any) -> dict[str, Any]:
    """Returns the space searched when `hp_space` is not given; that of transformers for optuna."""
    return {
        "learning_rate": trial.suggest_float("learning_rate", 1e-6, 1e-4, log=True),
        "num_train_epochs": trial.suggest_int("num_train_epochs", 1, 5),
        "seed": trial.suggest_int("seed", 1, 40),
        "per_device_train_batch_size": trial.suggest_categorical("per_device_train_batch_size", [4, 8, 16, 32, 64]),
    }


def default_compute_objective(metrics: dict[str, float], leave_out: Collection[str] = ()) -> float:
    """Returns the evaluation loss, or the sum of the other metrics where there are any besides speed.

    `leave_out` are the keys of metrics that say nothing about how good the model is, such as a number of tokens.

    >>> default_compute_objective({"eval_loss": 0.5, "epoch": 1.0, "eval_runtime": 3.0})
    0.5
    >>> default_compute_objective({"eval_loss": 0.5, "eval_accuracy": 0.75, "eval_f1": 0.5, "epoch": 1.0})
    1.25
    """
    others = {"eval_loss", "epoch", "num_input_tokens_seen", *leave_out}
    own = {k: v for k, v in metrics.items() if k not in others and not k.endswith(_SPEED)}
    return sum(own.values()) if own else metrics["eval_loss"]


def _token_metrics(trainer: Searchable) -> set[str]:
    """Returns the keys under which an evaluation reports the trainer's token metrics, with each set's name or none."""
    sets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {}
    prefixes = ["eval", *(f"eval_{name}" for name in sets)]
    return {f"{prefix}_{name}" for prefix in prefixes for name in trainer._token_metric_names}


def hyperparameter_search(
    self: Searchable,
    hp_space: Callable[[Any], dict[str, float]] | None = None,
    compute_objective: Callable[[dict[str, float]], float] | None = None,
    n_trials: int = 20,
    direction: str | list[str] = "minimize",
    backend: str | None = None,
    hp_name: Callable[[Any], str] | None = None,
    **kwargs: Any,
) -> BestRun | list[BestRun] | None:
    """Returns the best of `n_trials` trainings, or the Pareto front for a list of directions.

    Args:
        hp_space: `(trial) -> {argument: value}`, for example `{"learning_rate": trial.suggest_float(...)}`.
        compute_objective: `(metrics of an evaluation) -> number` (a list of them for several directions); the
            evaluation loss, or the sum of the metrics of `compute_metrics`, by default.
        hp_name: `(trial) -> str` names a trial's folder below `output_dir`; `run-<number>` by default.
        kwargs: for `optuna.create_study`, and `timeout`, `gc_after_trial`, `catch` for `Study.optimize`.

    None on every process but the first. `args` are as before afterwards; `model` is that of the last trial.

    Raises:
        ArgumentError: no `model_init`, another backend than optuna, or parallel trials in one process.
    """
    backend = HPSearchBackend(backend or "optuna")
    if backend != HPSearchBackend.OPTUNA:
        raise ArgumentError(f"`backend` is {backend!r}; only 'optuna' is supported. Drop the argument.")
    if self.model_init is None:
        raise ArgumentError("A search trains a new model per trial: pass `model_init` to the trainer, not `model`.")
    if kwargs.get("n_jobs", 1) != 1:
        raise ArgumentError(
            "`n_jobs` must be 1: one trainer runs one training at a time. Start more processes instead."
        )
    try:
        import optuna
    except ImportError as error:
        raise ArgumentError("`hyperparameter_search` needs optuna. Run `pip install optuna`.") from error
    self.hp_space, self.hp_name = hp_space or default_hp_space, hp_name
    self.compute_objective = compute_objective or partial(default_compute_objective, leave_out=_token_metrics(self))
    with _searching(self, backend):
        if not self.is_world_process_zero():
            _follow(self, optuna)
            return None
        study = _run_study(self, optuna, n_trials, direction, kwargs)
    if isinstance(direction, list):
        return [BestRun(str(best.number), list(best.values), best.params) for best in study.best_trials]
    best = study.best_trial
    return BestRun(str(best.number), best.value, best.params)


@contextlib.contextmanager
def _searching(trainer: Searchable, backend: HPSearchBackend) -> Iterator[None]:
    """Context manager: trials may replace the arguments; afterwards they are what they were."""
    trainer.hp_search_backend, trainer._searched_args = backend, trainer.args
    try:
        yield
    finally:
        before, trainer._searched_args = trainer._searched_args, None
        trainer.hp_search_backend = trainer._trial = trainer.hp_name = None
        if trainer.args is not before and before is not None:
            _use_arguments(trainer, before)


def _run_study(
    trainer: Searchable, optuna: Any, n_trials: int, direction: str | list[str], kwargs: dict[str, Any]
) -> Any:
    running = {name: kwargs.pop(name) for name in ("timeout", "gc_after_trial", "catch") if name in kwargs}
    kwargs.pop("n_jobs", None)
    goal = {"directions": direction} if isinstance(direction, list) else {"direction": direction}

    def objective(trial: Any) -> Any:
        assert trainer.hp_space is not None
        trainer.hp_space(trial)  # draws the values, which the other processes are then told
        broadcast_object(optuna.trial.FixedTrial(dict(trial.params), trial.number))
        return _run_trial(trainer, trial)

    study = optuna.create_study(**goal, **kwargs)
    try:
        study.optimize(objective, n_trials=n_trials, **running)
    finally:
        broadcast_object(None)
    return study


def _follow(trainer: Searchable, optuna: Any) -> None:
    """Runs the trials that the first process announces."""
    while (trial := broadcast_object(None)) is not None:
        with contextlib.suppress(optuna.TrialPruned):
            _run_trial(trainer, trial)


def _run_trial(trainer: Searchable, trial: Any) -> Any:
    trainer.objective = None
    trainer.train(trial=trial)
    if trainer.objective is None:
        assert trainer.compute_objective is not None
        trainer.objective = trainer.compute_objective(trainer.evaluate())
    return trainer.objective


def set_up_trial(self: Searchable, trial: Any) -> None:
    """Gives the trainer the arguments of `trial`, and an accelerator made from them. Called first by `train`.

    Values are checked as in the constructor of the arguments; a name that is not an argument is left to `model_init`.
    """
    self._trial = trial
    if self.hp_search_backend is None or trial is None:
        return
    assert self.hp_space is not None and self._searched_args is not None
    base = self._searched_args
    values: dict[str, Any] = {}
    for name, value in self.hp_space(trial).items():
        if not hasattr(base, name):
            logger.warning(
                "`hp_space` names `%s`, which is not a training argument:%s only `model_init` can read it.",
                name,
                nearest(name, vars(base)),
            )
            continue
        values[name] = float(value) if isinstance(getattr(base, name), float) and isinstance(value, int) else value
    logger.info("Trial %s: %s", getattr(trial, "number", ""), values)
    _use_arguments(self, replace_arguments(base, **values))


def _use_arguments(trainer: Searchable, args: TrainingArguments) -> None:
    if trainer.is_deepspeed_enabled:
        # DeepSpeed's settings live in accelerate's process-wide state, which only a reset renews.
        from accelerate.state import AcceleratorState

        trainer.accelerator.free_memory()
        AcceleratorState._reset_state()
    trainer.args = args
    trainer.create_accelerator_and_postprocess()


def report_to_search(self: Searchable, trial: Any, step: int, metrics: Mapping[str, float]) -> None:
    """Tells optuna how the trial does at `step`. Called after each evaluation.

    Raises:
        optuna.TrialPruned: the trial is not worth going on with.
    """
    if self.hp_search_backend is None or trial is None:
        return
    assert self.compute_objective is not None
    self.objective = self.compute_objective(dict(metrics))
    import optuna

    prune = False
    if isinstance(trial, optuna.Trial) and not trial.study._is_multi_objective():
        trial.report(self.objective, step)
        prune = trial.should_prune()
    if broadcast_object(prune):
        self._events.fire("on_train_end")
        raise optuna.TrialPruned
