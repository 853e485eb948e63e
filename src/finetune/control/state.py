"""Where a run is (`TrainerState`), what it should do next (`TrainerControl`), and what of it can be saved.

`trainer_state.json` has the fields, the order and the formatting of transformers 5.23, so that a checkpoint
written by either trainer is resumed by the other.
"""

import dataclasses
import json
import logging
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from finetune.errors import CheckpointError

logger = logging.getLogger(__name__)


class ExportableState:
    """An object whose state is written into `trainer_state.json` and restored on resume.

    `state()` returns `{"args": constructor keywords, "attributes": what to set afterwards}`, in values that
    JSON can hold; nothing is pickled. Inherit it next to `TrainerCallback`.
    """

    def state(self) -> dict[str, Any]:
        """Returns `{"args": {...}, "attributes": {...}}`. Called at each checkpoint."""
        raise NotImplementedError(f"`{type(self).__name__}` inherits `ExportableState` and must implement `state()`.")

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Any:
        """Returns a new object equal to the one that wrote `state`."""
        instance = cls(**state["args"])
        for name, value in state["attributes"].items():
            setattr(instance, name, value)
        return instance


def is_exportable(candidate: Any) -> bool:
    """Returns whether `candidate` follows the protocol of `ExportableState`, ours or transformers'."""
    return callable(getattr(candidate, "state", None)) and callable(getattr(type(candidate), "from_state", None))


def export_states(candidates: Iterable[Any]) -> dict[str, Any]:
    """Returns `{class name: state}` of the exportable ones; a list of states where a class occurs twice.

    >>> class Counter(ExportableState):
    ...     def __init__(self, seen): self.seen = seen
    ...     def state(self): return {"args": {"seen": self.seen}, "attributes": {}}
    >>> export_states([Counter(1), Counter(2)])["Counter"]
    [{'args': {'seen': 1}, 'attributes': {}}, {'args': {'seen': 2}, 'attributes': {}}]
    """
    states: dict[str, list[dict[str, Any]]] = {}
    for candidate in candidates:
        if is_exportable(candidate):
            states.setdefault(type(candidate).__name__, []).append(candidate.state())
    return {name: found if len(found) > 1 else found[0] for name, found in states.items()}


@dataclass
class TrainerControl(ExportableState):
    """The switches that callbacks set and the loop obeys.

    `should_training_stop` stays set for the rest of the run; `should_epoch_stop` is cleared at the next
    epoch; `should_save`, `should_evaluate` and `should_log` at the next step.
    """

    should_training_stop: bool = False
    should_epoch_stop: bool = False
    should_save: bool = False
    should_evaluate: bool = False
    should_log: bool = False

    def _new_training(self) -> None:
        self.should_training_stop = False

    def _new_epoch(self) -> None:
        self.should_epoch_stop = False

    def _new_step(self) -> None:
        self.should_save = self.should_evaluate = self.should_log = False

    def state(self) -> dict[str, Any]:
        return {"args": {name: getattr(self, name) for name in CONTROL_FIELDS}, "attributes": {}}


CONTROL_FIELDS = tuple(field.name for field in dataclasses.fields(TrainerControl))


class _IntervalArguments(Protocol):
    @property
    def logging_steps(self) -> float: ...
    @property
    def eval_steps(self) -> float | None: ...
    @property
    def save_steps(self) -> float: ...


@dataclass
class TrainerState:
    """Where the run is. Saved with each checkpoint, passed to each callback. A step is one optimizer update.

    `epoch` counts with fractions; `total_flos` is in floating-point operations; `num_input_tokens_seen`
    counts over all processes when asked for; `log_history` holds one dictionary per call of
    `Trainer.log`, with its `step`.
    `stateful_callbacks` takes callbacks and keeps their states (see `export_states`).
    """

    epoch: float | None = 0
    global_step: int = 0
    max_steps: int = 0
    logging_steps: int = 500
    eval_steps: int = 500
    save_steps: int = 500
    train_batch_size: int | None = None
    num_train_epochs: int = 0
    num_input_tokens_seen: int = 0
    total_flos: float = 0
    log_history: list[dict[str, Any]] = None  # pyright: ignore[reportAssignmentType]
    best_metric: float | None = None
    best_global_step: int | None = None
    best_model_checkpoint: str | None = None
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True
    is_hyper_param_search: bool = False
    trial_name: str | None = None
    trial_params: dict[str, str | float | int | bool] | None = None
    stateful_callbacks: dict[str, Any] = None  # pyright: ignore[reportAssignmentType]

    def __post_init__(self) -> None:
        if self.log_history is None:
            self.log_history = []
        if self.stateful_callbacks is None:
            self.stateful_callbacks = {}
        elif not isinstance(self.stateful_callbacks, dict):
            callbacks = list(self.stateful_callbacks)
            for callback in callbacks:
                if not is_exportable(callback):
                    raise TypeError(
                        f"`stateful_callbacks` takes objects that inherit `ExportableState`, not "
                        f"`{type(callback).__name__}`, which has no `state()` and `from_state()`."
                    )
            self.stateful_callbacks = export_states(callbacks)

    def update_stateful_callbacks(self, candidates: Iterable[Any]) -> None:
        """Replaces the saved states by the present ones of `candidates` (callbacks and the control).

        Replaced, never appended: two callbacks of one class give two entries however often this is called.
        States of classes that are not among `candidates` (from the checkpoint resumed from) are kept.
        """
        self.stateful_callbacks = {**self.stateful_callbacks, **export_states(candidates)}

    def save_to_json(self, json_path: str | os.PathLike[str]) -> None:
        """Writes this state to `json_path`. NumPy and tensor scalars become numbers, arrays lists."""
        text = json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True, default=as_json) + "\n"
        with open(json_path, "w", encoding="utf-8") as file:
            file.write(text)

    @classmethod
    def load_from_json(cls, json_path: str | os.PathLike[str]) -> "TrainerState":
        """Returns the state written in `json_path`. Fields this version does not know are named and left out.

        Raises:
            CheckpointError: the file is missing, or is not the JSON of a trainer state.
        """
        try:
            with open(json_path, encoding="utf-8") as file:
                content = json.load(file)
        except FileNotFoundError:
            raise CheckpointError(
                f"`{os.fspath(json_path)}` does not exist: the folder is not a complete checkpoint. Pass the folder "
                "of another one as `resume_from_checkpoint`."
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"`{os.fspath(json_path)}` is not valid JSON ({error}): the checkpoint is damaged. Pass the folder of "
                "another one as `resume_from_checkpoint`."
            ) from error
        if not isinstance(content, dict):
            raise CheckpointError(
                f"`{os.fspath(json_path)}` holds a JSON {type(content).__name__}, and a trainer state is an object. "
                "Pass the folder of another checkpoint as `resume_from_checkpoint`."
            )
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(content) - known)
        if unknown:
            logger.warning("`%s` has fields this version does not read: %s", os.fspath(json_path), ", ".join(unknown))
        return cls(**{name: value for name, value in content.items() if name in known})

    def compute_steps(self, args: _IntervalArguments, max_steps: int) -> None:
        """Stores the intervals of logging, evaluation and saving in steps; below 1 is a share of `max_steps`.

        >>> from types import SimpleNamespace
        >>> state = TrainerState()
        >>> args = SimpleNamespace(logging_steps=5, eval_steps=0.25, save_steps=0.5)
        >>> state.compute_steps(args, max_steps=10)
        >>> state.logging_steps, state.eval_steps, state.save_steps
        (5, 3, 5)
        """
        for kind in ("logging", "eval", "save"):
            interval = getattr(args, f"{kind}_steps")
            if interval is not None:
                setattr(self, f"{kind}_steps", math.ceil(max_steps * interval) if interval < 1 else interval)

    def init_training_references(self, trainer: Any, max_steps: int, num_train_epochs: int, trial: Any) -> None:
        """Stores the length of the run, this process's place, and the search trial it belongs to."""
        if trainer.hp_name is not None and trainer._trial is not None:
            self.trial_name = trainer.hp_name(trainer._trial)
        self.trial_params = None
        if trial is not None:
            self.trial_params = dict(trial) if isinstance(trial, dict) else dict(trial.params)
        self.max_steps = max_steps
        self.num_train_epochs = num_train_epochs
        self.is_local_process_zero = trainer.is_local_process_zero()
        self.is_world_process_zero = trainer.is_world_process_zero()


def as_json(value: Any) -> Any:
    """Returns the number in a NumPy or tensor scalar, and nested lists for an array; anything else is not JSON.

    Raises `TypeError`, as `json.dumps(default=as_json)` wants it.
    """
    if callable(getattr(value, "item", None)) and callable(getattr(value, "tolist", None)):
        return value.item() if math.prod(value.shape) == 1 else value.tolist()
    raise TypeError(f"`{type(value).__name__}` cannot be written as JSON; log numbers, strings, lists and arrays.")
