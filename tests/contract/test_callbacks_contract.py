"""`finetune.control` against the installed transformers: names, signatures, order, keywords and files."""

import dataclasses
import inspect
import itertools
from types import SimpleNamespace

import pytest
import transformers
from transformers import trainer_callback as reference
from transformers.training_args import TrainingArguments

from finetune.control import builtin, callbacks, state

PAIRS = [
    (state.TrainerState, reference.TrainerState),
    (state.TrainerControl, reference.TrainerControl),
    (state.ExportableState, reference.ExportableState),
    (callbacks.TrainerCallback, reference.TrainerCallback),
    (callbacks.CallbackHandler, reference.CallbackHandler),
    (builtin.DefaultFlowCallback, reference.DefaultFlowCallback),
    (builtin.ProgressCallback, reference.ProgressCallback),
    (builtin.PrinterCallback, reference.PrinterCallback),
    (builtin.EarlyStoppingCallback, reference.EarlyStoppingCallback),
]


def own_methods(cls):
    names = [name for name in vars(cls) if not name.startswith("__") or name == "__init__"]
    return {name: inspect.unwrap(getattr(cls, name)) for name in names if inspect.isroutine(getattr(cls, name))}


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=lambda cls: cls.__name__)
def test_public_names_and_parameters(ours, theirs):
    for name, method in own_methods(theirs).items():
        mine = inspect.signature(getattr(ours, name)).parameters
        for key, parameter in inspect.signature(method).parameters.items():
            if key == "metrics" and ours is builtin.EarlyStoppingCallback:
                continue  # a keyword there, with a default here
            assert key in mine, f"{ours.__name__}.{name} lacks `{key}`"
            if name != "__init__" or parameter.default is not inspect.Parameter.empty:
                assert mine[key].default == parameter.default, (name, key)
        assert (
            list(mine)[: len(inspect.signature(method).parameters)][:4]
            == list(inspect.signature(method).parameters)[:4]
        )


@pytest.mark.parametrize("name", ["TrainerState", "TrainerControl"])
def test_fields_and_defaults(name):
    def fields(cls):
        return [(field.name, field.default) for field in dataclasses.fields(cls)]

    assert fields(getattr(state, name)) == fields(getattr(reference, name))


def test_events_are_those_of_transformers():
    assert list(callbacks.EVENTS) == [name for name in vars(reference.TrainerCallback) if name.startswith("on_")]


def filled(cls, stopper):
    return cls(
        epoch=1.5,
        global_step=7,
        max_steps=20,
        train_batch_size=4,
        total_flos=1e15,
        num_input_tokens_seen=123,
        log_history=[{"loss": 0.1 + 0.2, "step": 5}, {"eval_loss": float("inf"), "text": "é"}],
        best_metric=0.25,
        best_model_checkpoint="out/checkpoint-5",
        trial_params={"lr": 1e-4, "name": "x"},
        stateful_callbacks=[stopper, stopper],
    )


def test_files_cross_over_in_both_directions(tmp_path):
    mine = filled(state.TrainerState, builtin.EarlyStoppingCallback(2, 0.1))
    theirs = filled(reference.TrainerState, reference.EarlyStoppingCallback(2, 0.1))
    mine.save_to_json(tmp_path / "mine.json")
    theirs.save_to_json(tmp_path / "theirs.json")
    assert (tmp_path / "mine.json").read_bytes() == (tmp_path / "theirs.json").read_bytes()
    loaded_there = reference.TrainerState.load_from_json(tmp_path / "mine.json")
    loaded_here = state.TrainerState.load_from_json(tmp_path / "theirs.json")
    assert dataclasses.asdict(loaded_there) == dataclasses.asdict(loaded_here) == dataclasses.asdict(mine)


def test_exported_states_are_equal():
    for mine, theirs in [
        (state.TrainerControl(should_save=True), reference.TrainerControl(should_save=True)),
        (builtin.EarlyStoppingCallback(4, 0.5), reference.EarlyStoppingCallback(4, 0.5)),
    ]:
        assert mine.state() == theirs.state()


def drive(handler_class, state_class, control_class, flow_class, spy_base, args):
    """Returns every event with its keywords and the switches after it, over one scripted run of 6 steps."""
    heard = []

    class Spy(spy_base):
        pass

    for event in callbacks.EVENTS:

        def method(self, args, state, control, _event=event, **kwargs):
            heard.append((_event, sorted(kwargs), dataclasses.astuple(control)))

        setattr(Spy, event, method)
    handler = handler_class([flow_class, Spy], "model", "tokenizer", "optimizer", "scheduler")
    run, control = state_class(max_steps=6), control_class()
    run.compute_steps(args, 6)
    for event in ("on_init_end", "on_train_begin", "on_epoch_begin"):
        control = getattr(handler, event)(args, run, control)
    for step in range(1, 7):
        control = handler.on_step_begin(args, run, control)
        for event in ("on_substep_end", "on_pre_optimizer_step", "on_optimizer_step"):
            control = getattr(handler, event)(args, run, control)
        run.global_step, run.epoch = step, step / 3
        control = handler.on_step_end(args, run, control)
        if control.should_log:
            control = handler.on_log(args, run, control, {"loss": 1.0})
        if control.should_evaluate:
            control = handler.on_prediction_step(args, run, control)
            control = handler.on_evaluate(args, run, control, {"eval_loss": 1.0})
        if control.should_save:
            control = handler.on_push_begin(args, run, control)
            control = handler.on_save(args, run, control)
        if step % 3 == 0:
            control = handler.on_epoch_end(args, run, control)
    control = handler.on_train_end(args, run, control)
    handler.on_predict(args, run, control, {"test_loss": 1.0})
    return heard


STRATEGIES = list(itertools.product(["no", "steps", "epoch"], ["no", "steps", "epoch"], [0, 2.5]))


@pytest.mark.parametrize(("evaluating", "saving", "delay"), STRATEGIES)
def test_same_script_gives_the_same_events_keywords_and_switches(evaluating, saving, delay):
    args = SimpleNamespace(
        logging_strategy=transformers.trainer_utils.IntervalStrategy("steps"),
        eval_strategy=transformers.trainer_utils.IntervalStrategy(evaluating),
        save_strategy=transformers.trainer_utils.SaveStrategy(saving),
        logging_first_step=True,
        logging_steps=0.3,
        eval_steps=4,
        save_steps=5,
        eval_delay=delay,
    )
    mine = drive(
        callbacks.CallbackHandler,
        state.TrainerState,
        state.TrainerControl,
        builtin.DefaultFlowCallback,
        callbacks.TrainerCallback,
        args,
    )
    theirs = drive(
        reference.CallbackHandler,
        reference.TrainerState,
        reference.TrainerControl,
        reference.DefaultFlowCallback,
        reference.TrainerCallback,
        args,
    )
    assert mine == theirs and len(mine) > 30


def test_callbacks_of_transformers_run_in_our_handler(tmp_path, capsys):
    args = TrainingArguments(
        str(tmp_path),
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        metric_for_best_model="loss",
        load_best_model_at_end=True,
        report_to="none",
    )
    stopper = reference.EarlyStoppingCallback(2)
    handler = callbacks.CallbackHandler(
        [reference.DefaultFlowCallback, reference.ProgressCallback, reference.PrinterCallback, stopper], *[None] * 4
    )
    events = callbacks.Events(args, handler, state.TrainerState(max_steps=5, best_metric=1.0), state.TrainerControl())
    events.state.compute_steps(args, 5)
    events.fire("on_train_begin")
    for step in (1, 2):
        events.state.global_step = step
        events.fire("on_step_begin")
        assert events.fire("on_step_end").should_evaluate
        events.fire("on_log", logs={"loss": 2.0})
        events.fire("on_evaluate", metrics={"eval_loss": 2.0})
    assert events.control.should_training_stop
    events.fire("on_train_end")
    assert "'loss': '2'" in capsys.readouterr().out

    events.save(tmp_path / "trainer_state.json")
    again = reference.EarlyStoppingCallback()
    resumed = callbacks.Events(
        args,
        callbacks.CallbackHandler([builtin.DefaultFlowCallback, again], *[None] * 4),
        state.TrainerState.load_from_json(tmp_path / "trainer_state.json"),
        state.TrainerControl(),
    )
    resumed.restore()
    assert type(resumed.handler.callbacks[1]) is reference.EarlyStoppingCallback
    assert resumed.handler.callbacks[1].state() == stopper.state()


def test_a_tracker_of_transformers_runs_in_our_handler(tmp_path):
    pytest.importorskip("tensorboard")
    from transformers.integrations import TensorBoardCallback

    args = TrainingArguments(str(tmp_path / "out"), report_to="none")
    writer_log = []

    class Writer:
        def add_text(self, *given):
            writer_log.append(("text", given[0]))

        def add_scalar(self, name, value, step):
            writer_log.append((name, value, step))

        def add_hparams(self, *given, **named):
            pass

        def flush(self):
            pass

        def close(self):
            writer_log.append("closed")

    events = callbacks.Events(
        args,
        callbacks.CallbackHandler([builtin.DefaultFlowCallback, TensorBoardCallback(Writer())], *[None] * 4),
        state.TrainerState(max_steps=2, global_step=1),
        state.TrainerControl(),
    )
    events.fire("on_train_begin")
    events.fire("on_log", logs={"loss": 0.5, "eval_loss": 0.75})
    events.fire("on_train_end")
    assert ("train/loss", 0.5, 1) in writer_log and ("eval/loss", 0.75, 1) in writer_log
    assert writer_log[-1] == "closed"
