"""A run that a signal ends, and the one that goes on from its checkpoint, are the run that was not interrupted."""

import importlib.util
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

import finetune

spec = importlib.util.spec_from_file_location("resume_helpers", Path(__file__).with_name("test_resume.py"))
assert spec is not None and spec.loader is not None
helpers: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(helpers)

SIGNALS: dict[str, Any] = {"enable_jit_checkpoint": True, "save_strategy": "no"}
EVERY_TWO: dict[str, Any] = {**SIGNALS, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}


def make_classified() -> Dataset:
    """Returns 18 rows for a classifier: no multiple of the rows of one step, and five batches of an evaluation."""
    ids = torch.randint(5, 128, (18, 12), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": [index % 3 for index in range(18)]})


@pytest.fixture
def classified() -> Dataset:
    return make_classified()


class Signal(finetune.TrainerCallback):
    """Sends this process, once, the signal a scheduler sends before it takes the machine away: at an event of a step.

    Counts the batches evaluated after it.
    """

    def __init__(self, event: str, step: int, batch: int = 1, process: int = 0) -> None:
        self.event, self.step, self.batch, self.process = event, step, batch, process
        self.sent, self.batches, self.batches_after = False, 0, 0

    def _hear(self, event: str, step: int) -> None:
        if self.sent:
            self.batches_after += event == "on_prediction_step"
        elif (event, step) == (self.event, self.step):
            self.batches += 1
            self.sent = self.batches == self.batch
            if self.sent and int(os.environ.get("RANK", "0")) == self.process:
                os.kill(os.getpid(), signal.SIGTERM)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._hear("on_step_begin", state.global_step)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._hear("on_prediction_step", state.global_step)


def cut_and_resumed(
    make_model: Any,
    dataset: Any,
    out: Path,
    signals: list[Signal],
    stop: int,
    callbacks: tuple[finetune.TrainerCallback, ...] = (),
    **options: Any,
) -> finetune.Trainer:
    """Returns the last of a row of runs, of which each is ended by one of the signals, at step `stop`."""
    for each in signals:
        run = helpers.build(make_model, dataset, out, [each, *callbacks], **options)
        run.train(resume_from_checkpoint="auto")
        assert each.sent and run.was_preempted and run.state.global_step == stop
    resumed = helpers.build(make_model, dataset, out, callbacks, **options)
    resumed.train(resume_from_checkpoint="auto")
    assert not resumed.was_preempted
    return resumed


def test_a_signal_saves_and_the_next_run_goes_on(tiny_llama: Any, padded_dataset: Any, tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    whole = helpers.build(tiny_llama, padded_dataset(18), tmp_path / "whole", **SIGNALS)
    whole.train()
    sent = [Signal("on_step_begin", 4)]
    resumed = cut_and_resumed(tiny_llama, padded_dataset(18), tmp_path / "cut", sent, stop=5, **SIGNALS)
    assert signal.getsignal(signal.SIGTERM) is handler
    helpers.assert_equal(helpers.everything(resumed), helpers.everything(whole))
    assert resumed.state.global_step == 10


@pytest.mark.parametrize(
    ("stop", "options"),
    [
        (4, EVERY_TWO),
        (4, {**EVERY_TWO, "save_strategy": "best", "greater_is_better": True}),
        (5, {**EVERY_TWO, "eval_strategy": "epoch"}),
        (10, {**EVERY_TWO, "eval_strategy": "epoch"}),
        (4, {**EVERY_TWO, "lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "loss"}),
    ],
    ids=["steps", "best", "end of an epoch", "end of training", "a schedule that follows the loss"],
)
def test_a_signal_cuts_an_evaluation_short_and_the_next_run_begins_with_it(
    stop: int, options: dict[str, Any], tiny_bert: Any, classified: Any, tmp_path: Path
) -> None:
    """With dropout: a random state that is not that of before the evaluation would show in every later step."""
    whole = helpers.build(tiny_bert, classified, tmp_path / "whole", **options)
    whole.train()
    sent = Signal("on_prediction_step", stop, batch=2)
    resumed = cut_and_resumed(tiny_bert, classified, tmp_path / "cut", [sent], stop=stop, **options)
    assert sent.batches_after == 0
    helpers.assert_equal(helpers.everything(resumed), helpers.everything(whole))


@pytest.mark.parametrize(
    "sent",
    [[("on_prediction_step", 4, 3), ("on_prediction_step", 4, 1)], [("on_step_begin", 3)]],
    ids=["the one that is made up for is cut short too", "a signal before it begins"],
)
def test_an_evaluation_is_left_to_the_next_run(
    sent: list[tuple[Any, ...]], tiny_bert: Any, classified: Any, tmp_path: Path
) -> None:
    whole = helpers.build(tiny_bert, classified, tmp_path / "whole", **EVERY_TWO)
    whole.train()
    signals = [Signal(*each) for each in sent]
    resumed = cut_and_resumed(tiny_bert, classified, tmp_path / "cut", signals, stop=4, **EVERY_TWO)
    assert [each.batches_after for each in signals] == [0] * len(signals)
    helpers.assert_equal(helpers.everything(resumed), helpers.everything(whole))


def test_the_end_of_an_epoch_is_that_of_the_run_that_reaches_it(
    tiny_bert: Any, classified: Any, tmp_path: Path
) -> None:
    """Logged, evaluated and saved after each epoch, not where a signal came."""
    by_epoch = {**EVERY_TWO, "logging_strategy": "epoch", "eval_strategy": "epoch", "save_strategy": "epoch"}
    whole = helpers.build(tiny_bert, classified, tmp_path / "whole", **by_epoch)
    whole.train()
    sent = Signal("on_step_begin", 2)
    resumed = cut_and_resumed(tiny_bert, classified, tmp_path / "cut", [sent], stop=3, **by_epoch)
    helpers.assert_equal(helpers.everything(resumed), helpers.everything(whole))


def test_the_result_may_end_the_run(tiny_bert: Any, classified: Any, tmp_path: Path) -> None:
    class StopsBehind(finetune.TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 4

    sent = Signal("on_prediction_step", 4)
    resumed = cut_and_resumed(tiny_bert, classified, tmp_path, [sent], 4, (StopsBehind(),), **EVERY_TWO)
    assert resumed.state.global_step == 4
    assert "eval_loss" in {name for entry in resumed.state.log_history if entry["step"] == 4 for name in entry}


def test_one_of_several_datasets_with_a_result_is_not_evaluated_twice(
    tiny_bert: Any, classified: Any, tmp_path: Path
) -> None:
    def build(out: str, callbacks: list[Any]) -> finetune.Trainer:
        made = helpers.build(tiny_bert, classified, tmp_path / out, callbacks, **EVERY_TWO)
        made.eval_dataset = {"first": classified, "second": classified.select(range(8))}
        return made

    whole = build("whole", [])
    whole.train()
    sent = Signal("on_prediction_step", 4, batch=6)  # the first has five
    cut = build("cut", [sent])
    cut.train()
    assert sent.batches_after == 1 and cut.was_preempted
    resumed = build("cut", [])
    resumed.train(resume_from_checkpoint="auto")
    helpers.assert_equal(helpers.everything(resumed), helpers.everything(whole))
