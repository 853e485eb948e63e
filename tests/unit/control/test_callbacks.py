import time

import numpy as np
import pytest

from finetune.control.builtin import DefaultFlowCallback, EarlyStoppingCallback, ProgressCallback
from finetune.control.callbacks import EVENTS, CallbackHandler, Events, TrainerCallback, apply_reply
from finetune.control.state import ExportableState, TrainerControl, TrainerState
from finetune.errors import ArgumentError

KEYWORDS = {"model", "processing_class", "optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader"}
EXTRA = {"on_log": {"logs": {}}, "on_evaluate": {"metrics": {}}, "on_predict": {"metrics": {}}}


class Recorder(TrainerCallback):
    def __init__(self):
        self.calls = []

    def __getattribute__(self, name):
        if name.startswith("on_"):
            return lambda args, state, control, **kwargs: self.calls.append((name, set(kwargs)))
        return super().__getattribute__(name)


class Replier(TrainerCallback):
    def __init__(self, reply):
        self.reply = reply

    def on_step_end(self, args, state, control, **kwargs):
        return self.reply


class Tally(TrainerCallback, ExportableState):
    def __init__(self, start=0):
        self.start = start
        self.count = start

    def on_step_end(self, args, state, control, **kwargs):
        self.count += 1

    def state(self):
        return {"args": {"start": self.start}, "attributes": {"count": self.count}}


def handler_of(*callbacks):
    return CallbackHandler([DefaultFlowCallback, *callbacks], "model", "tokenizer", "optimizer", "scheduler")


def events_of(*callbacks):
    handler = CallbackHandler(callbacks, None, None, None, None)
    return Events(None, handler, TrainerState(), TrainerControl())


@pytest.mark.parametrize("event", EVENTS)
def test_each_event_reaches_the_callback_with_all_keywords(event):
    recorder = Recorder()
    events = events_of(recorder)
    events.fire(event, **EXTRA.get(event, {}))
    assert recorder.calls == [(event, KEYWORDS | set(EXTRA.get(event, {})))]


@pytest.mark.parametrize(
    ("event", "cleared"),
    [
        ("on_train_begin", {"should_training_stop"}),
        ("on_epoch_begin", {"should_epoch_stop"}),
        ("on_step_begin", {"should_save", "should_evaluate", "should_log"}),
        ("on_evaluate", {"should_evaluate"}),
        ("on_save", {"should_save"}),
        ("on_log", {"should_log"}),
        ("on_step_end", set()),
    ],
)
def test_events_clear_the_switches_they_answer(event, cleared):
    events = events_of()
    events.control = TrainerControl(*[True] * 5)
    control = events.fire(event, **EXTRA.get(event, {}))
    assert {name for name, value in control.state()["args"].items() if not value} == cleared


def test_callbacks_may_reply_with_the_control_nothing_or_a_dictionary():
    other = TrainerControl(should_log=True)
    events = events_of(Replier(None), Replier(other), Replier({"should_save": np.bool_(True)}))
    control = events.fire("on_step_end")
    assert control is other is events.control
    assert control.should_log and control.should_save is True


def test_unknown_field_names_the_nearest():
    with pytest.raises(ArgumentError, match=r"`Replier.on_step_end`.*'should_training_stp'.*`should_training_stop`"):
        events_of(Replier({"should_training_stp": True})).fire("on_step_end")


def test_values_must_be_bool():
    with pytest.raises(ArgumentError, match="must be True or False"):
        events_of(Replier({"should_save": "no"})).fire("on_step_end")


def test_other_replies_are_refused():
    with pytest.raises(ArgumentError, match="returned a `bool`; return the control"):
        events_of(Replier(True)).fire("on_step_end")


def test_fields_of_a_control_subclass_are_accepted():
    control = TrainerControl()
    control.should_generate = False
    assert apply_reply(control, {"should_generate": True}, "mine").should_generate


def test_callbacks_added_later_and_methods_set_on_an_instance_are_called():
    events, heard = events_of(), []
    events.fire("on_step_end")
    quiet = TrainerCallback()
    events.handler.add_callback(quiet)
    events.fire("on_step_end")
    quiet.on_step_end = lambda *args, **kwargs: heard.append("instance")
    events.fire("on_step_end")
    assert heard == ["instance"]


def test_a_patched_base_class_is_called(monkeypatch):
    heard = []
    monkeypatch.setattr(TrainerCallback, "on_step_end", lambda *args, **kwargs: heard.append(1))
    events_of(TrainerCallback()).fire("on_step_end")
    assert heard == [1]


def test_an_object_with_some_of_the_methods_is_a_callback():
    class Bare:
        def on_step_end(self, args, state, control, **kwargs):
            return {"should_log": True}

    events = events_of(Bare())
    events.fire("on_push_begin")
    assert events.fire("on_step_end").should_log


def test_a_callback_may_remove_itself_while_called():
    class Once(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            handler.remove_callback(self)

    tally = Tally()
    handler = handler_of(Once(), tally)
    handler.call_event("on_step_end", *_flow_arguments())
    assert tally.count == 1 and handler.callback_list == "DefaultFlowCallback\nTally"


def _flow_arguments():
    from types import SimpleNamespace

    args = SimpleNamespace(
        eval_strategy="no", save_strategy="no", logging_strategy="no", logging_first_step=False, eval_delay=0
    )
    return args, TrainerState(max_steps=10), TrainerControl()


def test_add_pop_remove(caplog):
    handler = handler_of()
    assert not caplog.records
    first, second = Tally(1), Tally(2)
    handler.add_callback(first)
    handler.add_callback(second)
    assert "`Tally` is already" in caplog.text
    assert handler.pop_callback(second) is second
    assert handler.pop_callback(Tally) is first
    assert handler.pop_callback(Tally) is None
    handler.remove_callback(Tally)
    with pytest.raises(ValueError, match="`Tally` is not among"):
        handler.remove_callback(first)
    assert handler.callback_list == "DefaultFlowCallback"


def test_missing_default_flow_is_said(caplog):
    CallbackHandler([], None, None, None, None)
    assert "nothing will log" in caplog.text


def test_removing_by_the_class_of_transformers_finds_ours():
    import transformers

    handler = handler_of(ProgressCallback)
    handler.remove_callback(transformers.ProgressCallback)
    assert handler.callback_list == "DefaultFlowCallback"


def test_capture_and_restore_keep_order_and_states(tmp_path):
    events = events_of(Tally(1), EarlyStoppingCallback(3, 0.5), Tally(2))
    events.handler.callbacks[1].early_stopping_patience_counter = 2
    for _ in range(3):
        events.fire("on_step_end")
        events.save(tmp_path / "trainer_state.json")
    events.control.should_epoch_stop = True
    events.save(tmp_path / "trainer_state.json")

    fresh = events_of(Tally(), EarlyStoppingCallback(), Tally())
    fresh.state = TrainerState.load_from_json(tmp_path / "trainer_state.json")
    fresh.restore()
    one, stopper, two = fresh.handler.callbacks
    assert (one.count, two.count, one.start, two.start) == (4, 5, 1, 2)
    assert (stopper.early_stopping_patience, stopper.early_stopping_patience_counter) == (3, 2)
    assert fresh.control.should_epoch_stop


def test_restore_reads_the_current_states_from_a_list_that_grew():
    grown = [{"args": {}, "attributes": {"count": count}} for count in (0, 0, 5, 6, 11, 12)]
    events = events_of(Tally(), Tally())
    events.state.stateful_callbacks = {"Tally": grown}
    events.restore()
    assert [callback.count for callback in events.handler.callbacks] == [11, 12]


def test_restore_names_callbacks_that_are_gone(caplog):
    events = events_of()
    events.state.stateful_callbacks = {"Lost": {"args": {}, "attributes": {}}}
    events.restore()
    assert "Lost" in caplog.text


def test_events_nobody_hears_cost_next_to_nothing():
    events = events_of(*[type(f"Quiet{i}", (TrainerCallback,), {}) for i in range(6)])
    repeats = 2000
    best = min(_seconds(events, repeats) for _ in range(5))
    assert best / repeats < 20e-6


def _seconds(events, repeats):
    start = time.perf_counter()
    for _ in range(repeats):
        events.fire("on_pre_optimizer_step")
    return time.perf_counter() - start
