"""Callbacks, the handler that calls them, and `Events`, through which the engine fires them.

Callbacks written for transformers work unchanged: nothing here asks for our base class, only for the methods.
"""

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partialmethod
from typing import Any

import numpy as np

from finetune.control.state import CONTROL_FIELDS, TrainerControl, TrainerState, is_exportable
from finetune.errors import ArgumentError, nearest

logger = logging.getLogger(__name__)

Reply = Any  # of a callback to an event: TrainerControl | dict[str, bool] | None


class TrainerCallback:
    """Base of callbacks: override the events of interest.

    `args`, `state` and `control` are positional. All events also receive the keywords `model`,
    `processing_class`, `optimizer`, `lr_scheduler`, `train_dataloader` and `eval_dataloader`, so end each
    signature with `**kwargs`. `on_log` adds `logs`, `on_evaluate` and `on_predict` add `metrics`.

    To steer the run, change `control` in place, return it, or return a dictionary of its fields:

        class StopBelow(TrainerCallback):
            def on_log(self, args, state, control, logs=None, **kwargs):
                return {"should_training_stop": logs.get("loss", 1.0) < 0.1}
    """

    def on_init_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Reply:
        """Called once, at the end of the constructor of the trainer."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Reply:
        """Called once per `train()`, before the first epoch."""

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Reply:
        """Called once per `train()`, after the last log."""

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Reply:
        """Called at the start of each epoch."""

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Reply:
        """Called at the end of each epoch, before its log, evaluation and save."""

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Reply:
        """Called before the first micro-batch of each step."""

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Reply:
        """Called after clipping and before the update: gradients are final."""

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Reply:
        """Called after the update and before the gradients are cleared."""

    def on_substep_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Reply:
        """Called after each micro-batch of a step but the last."""

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Reply:
        """Called after each step, when `state.global_step` has been counted up."""

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Reply:
        """Called after each evaluation, with its `metrics`."""

    def on_predict(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **kwargs: Any
    ) -> Reply:
        """Called after `predict()`, with its `metrics`."""

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Reply:
        """Called after each checkpoint."""

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Reply:
        """Called by `Trainer.log`, with its `logs`."""

    def on_prediction_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Reply:
        """Called after each batch of an evaluation or prediction."""

    def on_push_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Reply:
        """Called before each upload to the Hub."""


EVENTS = tuple(name for name in vars(TrainerCallback) if name.startswith("on_"))
_EMPTY_HANDLERS = frozenset(vars(TrainerCallback)[name] for name in EVENTS)

# Fields of the control that the handler sets to False before it calls the callbacks of an event: what they asked for
# is being done, and a callback that wants it again says so.
_CLEARED_BY = {
    "on_train_begin": ("should_training_stop",),
    "on_epoch_begin": ("should_epoch_stop",),
    "on_step_begin": ("should_log", "should_evaluate", "should_save"),
    "on_evaluate": ("should_evaluate",),
    "on_save": ("should_save",),
    "on_log": ("should_log",),
}


def apply_reply(control: TrainerControl, reply: Any, source: str) -> TrainerControl:
    """Returns the control that holds after the callback `source` answered `reply`.

    >>> apply_reply(TrainerControl(), {"should_save": True}, "mine").should_save
    True

    Raises:
        ArgumentError: `reply` is not a control, a dictionary or None; or the dictionary has an unknown field or a
            value that is not a bool.
    """
    if reply is None or reply is control:
        return control
    if isinstance(reply, dict):
        for name, value in reply.items():
            if name not in CONTROL_FIELDS and name not in vars(control):
                raise ArgumentError(
                    f"`{source}` returned a dictionary with the field {name!r}; the fields "
                    f"are {', '.join(CONTROL_FIELDS)}.{nearest(str(name), CONTROL_FIELDS)}"
                )
            if not isinstance(value, bool | np.bool_):
                raise ArgumentError(f"`{source}` returned {name!r}: {value!r}; the value must be True or False.")
            setattr(control, name, bool(value))
        return control
    if all(hasattr(reply, name) for name in CONTROL_FIELDS):
        return reply
    raise ArgumentError(
        f"`{source}` returned a `{type(reply).__name__}`; return the control, a dictionary of its fields, or nothing."
    )


class CallbackHandler(TrainerCallback):
    """Calls the callbacks in order, each with the run's objects and the control its predecessor left."""

    def __init__(
        self, callbacks: Iterable[Any], model: Any, processing_class: Any, optimizer: Any, lr_scheduler: Any
    ) -> None:
        self.callbacks: list[Any] = []
        for callback in callbacks:
            self.add_callback(callback)
        self.model = model
        self.processing_class = processing_class
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.train_dataloader: Any = None
        self.eval_dataloader: Any = None
        if not any(_class_named(type(callback), "DefaultFlowCallback") for callback in self.callbacks):
            logger.warning(
                "No `DefaultFlowCallback` among the callbacks (%s): nothing will log, evaluate, save or stop the "
                "training. Add it with `trainer.add_callback(DefaultFlowCallback)`.",
                self.callback_list.replace("\n", ", ") or "none",
            )

    def add_callback(self, callback: Any) -> None:
        """Appends a callback, given as an instance or as a class to instantiate."""
        instance = callback() if isinstance(callback, type) else callback
        if any(type(known) is type(instance) for known in self.callbacks):
            logger.warning(
                "A `%s` is already among the callbacks (%s); both will be called.",
                type(instance).__name__,
                self.callback_list.replace("\n", ", "),
            )
        self.callbacks.append(instance)

    def pop_callback(self, callback: Any) -> Any:
        """Removes and returns the first callback of that class, or that instance; None when there is none."""
        place = next((place for place, known in enumerate(self.callbacks) if _matches(known, callback)), None)
        return None if place is None else self.callbacks.pop(place)

    def remove_callback(self, callback: Any) -> None:
        """Removes the first callback of that class, or that instance (ValueError if it is unknown)."""
        if self.pop_callback(callback) is None and not isinstance(callback, type):
            raise ValueError(f"`{type(callback).__name__}` is not among the callbacks.")

    @property
    def callback_list(self) -> str:
        """The class names of the callbacks, one per line, in the order they are called."""
        return "\n".join(type(callback).__name__ for callback in self.callbacks)

    def on_evaluate(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any
    ) -> Any:
        return self._clear_and_call("on_evaluate", args, state, control, metrics=metrics, **kwargs)

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> Any:
        return self._clear_and_call("on_predict", args, state, control, metrics=metrics, **kwargs)

    def on_log(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any
    ) -> Any:
        return self._clear_and_call("on_log", args, state, control, logs=logs, **kwargs)

    def _clear_and_call(self, event: str, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Returns as `call_event`. The methods of the events that add no value of their own are made of it below."""
        for name in _CLEARED_BY.get(event, ()):
            setattr(control, name, False)
        return self.call_event(event, args, state, control, **kwargs)

    def call_event(self, event: str, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Returns the control after each callback that listens to `event` was called with the run's objects.

        A callback that inherits the empty method of `TrainerCallback` is passed over at the cost of one
        look-up, which is made at each call, so callbacks and methods may be added at any time.
        """
        for callback in list(self.callbacks):
            method = getattr(callback, event, None)
            if method is None or getattr(method, "__func__", None) in _EMPTY_HANDLERS:
                continue
            reply = method(
                args,
                state,
                control,
                model=self.model,
                processing_class=self.processing_class,
                optimizer=self.optimizer,
                lr_scheduler=self.lr_scheduler,
                train_dataloader=self.train_dataloader,
                eval_dataloader=self.eval_dataloader,
                **kwargs,
            )
            if reply is not None and reply is not control:
                control = apply_reply(control, reply, f"{type(callback).__name__}.{event}")
        return control

    def restore(self, saved: dict[str, Any], control: TrainerControl) -> TrainerControl:
        """Returns the restored control, after putting the callbacks back as `saved` says.

        `saved` is `TrainerState.stateful_callbacks`. Each restored callback keeps its place in the order. Saved
        classes without a callback here are named in one warning.
        """
        missing: list[str] = []
        for name, entry in saved.items():
            entries = entry if isinstance(entry, list) else [entry]
            if name == type(control).__name__:
                control = type(control).from_state(entries[0])
                continue
            places = [i for i, one in enumerate(self.callbacks) if type(one).__name__ == name and is_exportable(one)]
            if not places:
                missing.append(name)
            if len(places) > 1 and len(entries) % len(places) == 0:
                # transformers 5.23 appends the states of a repeated class at each checkpoint: the last are current.
                entries = entries[-len(places) :]
            for place, callback_state in zip(places, entries, strict=False):
                complete = {"args": {}, "attributes": {}, **callback_state}
                self.callbacks[place] = type(self.callbacks[place]).from_state(complete)
        if missing:
            logger.warning("The checkpoint has the state of callbacks that are not in this run: %s", ", ".join(missing))
        return control


for _event in EVENTS:
    if _event not in vars(CallbackHandler):
        setattr(CallbackHandler, _event, partialmethod(CallbackHandler._clear_and_call, _event))


@dataclass
class Events:
    """The one holder of the run's `state` and `control`, through which the engine fires events."""

    args: Any
    handler: CallbackHandler
    state: TrainerState
    control: TrainerControl

    def fire(self, event: str, **kwargs: Any) -> TrainerControl:
        """Returns, and stores, the control after all callbacks were called for `event`."""
        self.control = getattr(self.handler, event)(self.args, self.state, self.control, **kwargs)
        return self.control

    def capture(self) -> None:
        """Writes the present states of callbacks and control into `state`."""
        self.state.update_stateful_callbacks([*self.handler.callbacks, self.control])

    def restore(self) -> None:
        """Restores callbacks and control from `state`, as read from a checkpoint."""
        self.control = self.handler.restore(self.state.stateful_callbacks, self.control)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Captures, then writes `trainer_state.json` to `path`."""
        self.capture()
        self.state.save_to_json(path)


def _class_named(cls: type, name: str) -> bool:
    return any(base.__name__ == name for base in cls.__mro__)


def _matches(callback: Any, wanted: Any) -> bool:
    """Returns whether `callback` is, or is an instance of, `wanted`.

    `trainer.remove_callback(transformers.ProgressCallback)` must find our `ProgressCallback`: classes of
    transformers' callback module match by name as well.
    """
    if not isinstance(wanted, type):
        return callback is wanted or callback == wanted
    if isinstance(callback, wanted):
        return True
    return wanted.__module__ == "transformers.trainer_callback" and _class_named(type(callback), wanted.__name__)
