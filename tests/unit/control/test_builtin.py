import io
import logging
from types import SimpleNamespace
from weakref import WeakSet

import pytest
from tqdm import tqdm

from finetune.control.builtin import (
    DefaultFlowCallback,
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    close_bars,
)
from finetune.control.state import TrainerControl, TrainerState
from finetune.errors import ArgumentError


def flow_args(**changes):
    values = {
        "logging_strategy": "steps",
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "logging_first_step": False,
        "eval_delay": 0,
    }
    return SimpleNamespace(**{**values, **changes})


def flow_at(step, args, **state):
    values = {"max_steps": 10, "logging_steps": 2, "eval_steps": 3, "save_steps": 4, **state}
    control = DefaultFlowCallback().on_step_end(args, TrainerState(global_step=step, **values), TrainerControl())
    return "".join(letter for letter in "lesx" if getattr(control, NAMES[letter]))


NAMES = {"l": "should_log", "e": "should_evaluate", "s": "should_save", "x": "should_training_stop"}


def test_default_flow_by_steps():
    assert [flow_at(step, flow_args()) for step in range(1, 11)] == [
        "", "l", "e", "ls", "", "le", "", "ls", "e", "lesx",
    ]  # fmt: skip


def test_default_flow_first_step_delay_and_no_saving():
    args = flow_args(logging_first_step=True, eval_delay=5, save_strategy="no")
    assert [flow_at(step, args) for step in (1, 3, 6)] == ["l", "", "le"]
    assert flow_at(4, args, max_steps=4) == "lx"
    assert flow_at(2, flow_args(), save_steps=0) == "l"


@pytest.mark.parametrize("kind", ["logging_strategy", "eval_strategy", "save_strategy"])
def test_default_flow_by_epochs(kind):
    quiet = flow_args(logging_strategy="no", eval_strategy="no", save_strategy="no", eval_delay=2)
    setattr(quiet, kind, "epoch")
    control = DefaultFlowCallback().on_epoch_end(quiet, TrainerState(epoch=2.0), TrainerControl())
    assert [control.should_log, control.should_evaluate, control.should_save] == [
        kind == name for name in ("logging_strategy", "eval_strategy", "save_strategy")
    ]
    if kind == "eval_strategy":
        early = DefaultFlowCallback().on_epoch_end(quiet, TrainerState(epoch=1.0), TrainerControl())
        assert not early.should_evaluate


def run_progress(state, capsys):
    callback, control = ProgressCallback(max_str_len=5), TrainerControl()
    callback.on_train_begin(None, state, control)
    state.global_step = 4
    callback.on_step_end(None, state, control)
    callback.on_prediction_step(None, state, control, eval_dataloader=[1, 2])
    callback.on_evaluate(None, state, control, metrics={})
    callback.on_log(None, state, control, logs={"loss": 0.123456, "note": "abcdefgh", "total_flos": 1.0})
    callback.on_log(None, state, control, logs={"other": 1})
    callback.on_train_end(None, state, control)
    assert callback.training_bar is None and callback.prediction_bar is None
    return capsys.readouterr()


def test_progress_shows_steps_and_logs(capsys):
    shown = run_progress(TrainerState(max_steps=8), capsys)
    assert "4/8" in shown.err and "evaluating" in shown.err
    assert "'loss': '0.1235'" in shown.out and "8 characters" in shown.out and "total_flos" not in shown.out


def test_progress_of_a_resumed_run_starts_where_it_was(capsys):
    shown = run_progress(TrainerState(max_steps=8, global_step=2), capsys).err
    assert "2/8" in shown and "4/8" in shown and "0/8" not in shown


def test_progress_is_silent_on_other_processes(capsys):
    shown = run_progress(TrainerState(max_steps=8, is_world_process_zero=False), capsys)
    assert shown.out == shown.err == ""


def test_progress_without_length_and_without_training(capsys):
    callback, state, control = ProgressCallback(), TrainerState(), TrainerControl()
    callback.on_prediction_step(None, state, control, eval_dataloader=iter([]))
    assert callback.prediction_bar is None
    callback.on_prediction_step(None, state, control, eval_dataloader=[1])
    assert callback.prediction_bar is not None
    callback.on_predict(None, state, control, metrics={})
    callback.on_train_end(None, state, control)
    assert callback.prediction_bar is None


def test_printer_leaves_the_logs_untouched(capsys):
    logs = {"loss": 0.123456, "total_flos": 3.0}
    PrinterCallback().on_log(None, TrainerState(), TrainerControl(), logs=logs)
    PrinterCallback().on_log(None, TrainerState(is_local_process_zero=False), TrainerControl(), logs=logs)
    assert capsys.readouterr().out == "{'loss': '0.1235'}\n"
    assert "total_flos" in logs


def stop_args(**changes):
    values = {
        "metric_for_best_model": "loss",
        "eval_strategy": "steps",
        "load_best_model_at_end": True,
        "greater_is_better": False,
    }
    return SimpleNamespace(**{**values, **changes})


def evaluations_until_stop(values, args, **kwargs):
    callback, state, control = EarlyStoppingCallback(**kwargs), TrainerState(), TrainerControl()
    callback.on_train_begin(args, state, control)
    pick = max if args.greater_is_better else min
    for number, value in enumerate(values, 1):
        callback.on_evaluate(args, state, control, metrics={"eval_loss": value})
        state.best_metric = value if state.best_metric is None else pick(value, state.best_metric)
        if control.should_training_stop:
            return number
    return None


def test_early_stopping_counts_patience_threshold_and_direction():
    assert evaluations_until_stop([3.0, 2.0, 2.5, 1.0, 1.1, 1.2], stop_args(), early_stopping_patience=2) == 6
    assert evaluations_until_stop([3.0, 2.95, 2.9], stop_args(), early_stopping_threshold=0.2) == 2
    assert evaluations_until_stop([1.0, 2.0, 3.0], stop_args(greater_is_better=True)) is None
    assert evaluations_until_stop([1.0, 2.0], stop_args(metric_for_best_model="eval_loss")) == 2
    assert evaluations_until_stop([1.0, float("nan")], stop_args()) == 2


def test_early_stopping_asks_for_what_it_needs(caplog):
    callback, state, control = EarlyStoppingCallback(), TrainerState(), TrainerControl()
    with pytest.raises(ArgumentError, match="`metric_for_best_model` is None"):
        callback.on_train_begin(stop_args(metric_for_best_model=None), state, control)
    with pytest.raises(ArgumentError, match="`metric_for_best_model` is None"):
        callback.on_evaluate(stop_args(metric_for_best_model=None), state, control, metrics={"eval_loss": 1.0})
    with pytest.raises(ArgumentError, match="`eval_strategy` is `no`"):
        callback.on_train_begin(stop_args(eval_strategy="no"), state, control)
    callback.on_train_begin(stop_args(load_best_model_at_end=False), state, control)
    assert "not the best" in caplog.text


def test_early_stopping_names_the_metrics_there_are(caplog):
    callback, control = EarlyStoppingCallback(), TrainerControl()
    callback.on_evaluate(stop_args(), TrainerState(), control, metrics={"eval_accuracy": 1.0})
    assert "`eval_loss`" in caplog.text and "eval_accuracy" in caplog.text
    assert not control.should_training_stop and callback.early_stopping_patience_counter == 0


def test_early_stopping_says_nothing_about_the_other_evaluation_sets(caplog):
    callback, control, args = EarlyStoppingCallback(), TrainerControl(), stop_args(metric_for_best_model="eval_a_loss")
    callback.on_evaluate(args, TrainerState(), control, metrics={"eval_b_loss": 1.0, "eval_b_runtime": 1.0})
    assert caplog.text == ""
    callback.on_evaluate(args, TrainerState(), control, metrics={"eval_a_f1": 1.0, "eval_a_runtime": 1.0})
    assert "`eval_a_loss`" in caplog.text
    caplog.clear()
    callback.on_evaluate(stop_args(), TrainerState(), control, metrics={"eval_f1": 1.0, "eval_runtime": 1.0})
    assert "`eval_loss`" in caplog.text


@pytest.fixture(autouse=True)
def no_open_bars(monkeypatch):
    """Bars that other tests left open would move those of these tests down."""
    monkeypatch.setattr(tqdm, "_instances", WeakSet())


def test_messages_do_not_continue_the_line_of_a_bar(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    ours = logging.getLogger("finetune")
    monkeypatch.setattr(ours, "handlers", [handler := logging.StreamHandler(screen)])
    callback, state, control = ProgressCallback(), TrainerState(max_steps=4), TrainerControl()
    callback.on_train_begin(None, state, control)
    ours.warning("After the first step")
    state.global_step = 1
    callback.on_step_end(None, state, control)
    ours.warning("Trained")
    callback.on_train_end(None, state, control)
    last_on_their_lines = [line.split("\r")[-1] for line in screen.getvalue().split("\n")]
    assert last_on_their_lines[:2] == ["After the first step", "Trained"]
    assert "1/4" in screen.getvalue() and handler.filters == []


def test_a_second_start_closes_the_bars_of_the_first():
    callback, state, control = ProgressCallback(), TrainerState(max_steps=4), TrainerControl()
    callback.on_train_begin(None, state, control)
    callback.on_prediction_step(None, state, control, eval_dataloader=range(3))
    first, evaluating = callback.training_bar, callback.prediction_bar
    callback.on_train_begin(None, state, control)
    assert first.disable and evaluating.disable and not callback.training_bar.disable
    close_bars([callback, PrinterCallback()])
    assert callback.training_bar is callback.prediction_bar is None and not tqdm._instances
