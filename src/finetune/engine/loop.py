"""The training loop: epochs, windows of micro-batches, optimizer steps.

It knows no model, tokenizer or distributed strategy. Everything a user can override is reached through `LoopHooks`,
looked up at each call; events go through `Events`, which also holds `state` and `control`.
"""

import logging
from collections.abc import Iterable
from typing import Any

from finetune.control.callbacks import Events
from finetune.engine.plan import ResumePoint
from finetune.engine.run import TrainingRun
from finetune.hooks import LoopHooks

logger = logging.getLogger(__name__)


def run_training(run: TrainingRun, hooks: LoopHooks, events: Events) -> None:
    """Runs all epochs of `run`. Fires the events of `transformers.Trainer` in its order.

    A run resumed behind its last step makes no step more (transformers makes one).
    """
    if events.state.global_step >= run.plan.max_steps:
        run.restore_rng_once()
        return
    for epoch in range(run.resume.epoch, run.plan.num_train_epochs):
        events.fire("on_epoch_begin")
        _run_epoch(run, epoch, hooks, events)
        if events.control.should_training_stop:
            break


def _run_epoch(run: TrainingRun, epoch: int, hooks: LoopHooks, events: Events) -> None:
    """Runs the updates of one epoch that are still to be done."""
    done = run.resume if epoch == run.resume.epoch else ResumePoint(epoch)
    run.epoch, run.epoch_is_over = epoch, False
    run.batches_done = run.batches_updated = done.batches_done
    run.grad_norm, run.learning_rate = None, None
    if done.updates_done == 0:
        # A checkpoint at the end of an epoch was written before the next epoch's loader drew its seed.
        run.restore_rng_once()
    iterator = iter(_epoch_loader(run, epoch, done))
    for update in range(done.updates_done, run.plan.updates_per_epoch):
        wanted = run.plan.batches_in_update(update)
        batches, num_items = hooks.get_batch_samples(iterator, wanted, run.args.device)
        run.restore_rng_once()
        if not batches:
            break
        _run_window(run, batches, num_items, hooks, events)
        if events.control.should_epoch_stop or events.control.should_training_stop:
            break
    # A run resumed at the end of an epoch fetches nothing in it, and the evaluation below may draw random numbers.
    run.restore_rng_once()
    if run.batches_done == 0:
        logger.warning(
            "The training data gave no batch in epoch %s: training stops at step %s of %s.",
            epoch,
            events.state.global_step,
            run.plan.max_steps,
        )
        events.control.should_training_stop = True
    run.epoch_is_over = not _stopped_inside(run, events)
    if run.is_preempted() and not run.epoch_is_over and events.state.global_step < run.plan.max_steps:
        return  # the end of the epoch, with its log and its evaluation, is the resumed run's
    events.fire("on_epoch_end")
    _log_save_evaluate(run, hooks)


def _stopped_inside(run: TrainingRun, events: Events) -> bool:
    """Returns whether training stopped and left batches of this epoch to a run that is resumed from here."""
    stops = events.control.should_training_stop and not events.control.should_epoch_stop
    return stops and (run.batches_updated < run.plan.batches_per_epoch or not run.plan.has_epochs)


def _epoch_loader(run: TrainingRun, epoch: int, done: ResumePoint) -> Iterable[Any]:
    """Returns the loader of `epoch`, starting behind the batches a resumed run has already seen."""
    run.set_epoch(epoch)
    return run.skip_batches(run.loader, done.batches_done) if done.batches_done else run.loader


def _run_window(run: TrainingRun, batches: list[Any], num_items: Any, hooks: LoopHooks, events: Events) -> None:
    """Runs the micro-batches of one optimizer step: gradients are synchronised at the last one only."""
    run.window_batches = len(batches)
    for index, inputs in enumerate(batches):
        last = index == len(batches) - 1
        run.set_sync(last)
        if index == 0:
            events.fire("on_step_begin")
        with run.sync_context(last), run.observed():
            loss = hooks.training_step(run.model, inputs, num_items)
        run.meter.add(loss, events.state.global_step, run.place)
        run.count_work(hooks, inputs)
        run.batches_done += 1
        if last:
            _update(run, hooks, events)
        else:
            events.fire("on_substep_end")
        if events.control.should_epoch_stop or events.control.should_training_stop:
            if not last:
                run.abandon_window()
            break


def _update(run: TrainingRun, hooks: LoopHooks, events: Events) -> None:
    """Clips, steps the optimizer and the schedule, clears the gradients, then logs, evaluates and saves if due."""
    grad_norm = hooks._clip_grad_norm(run.model) if run.args.max_grad_norm > 0 else None
    run.grad_norm = hooks._get_grad_norm(run.model, grad_norm=grad_norm)

    events.fire("on_pre_optimizer_step")
    run.stepping = True
    # A loss scaler leaves out an update whose gradients overflowed by itself, and lowers its scale.
    skipped = run.meter.window_is_bad(None if run.scaler is not None else run.grad_norm)
    if skipped:
        run.drop_update()
    else:
        run.before_update()
        run.before_step()
        run.optimizer.step()
        run.after_update()
    events.fire("on_optimizer_step")

    run.learning_rate = hooks._get_learning_rate()
    if not skipped:
        run.step_schedule()
    run.clear_gradients()

    state = events.state
    state.global_step += 1
    state.epoch = run.epoch + run.batches_done / run.plan.batches_per_epoch
    run.batches_updated = run.batches_done
    run.stepping = False
    events.fire("on_step_end")
    _log_save_evaluate(run, hooks)


def _log_save_evaluate(run: TrainingRun, hooks: LoopHooks) -> None:
    hooks._maybe_log_save_evaluate(
        run.meter.running,
        run.grad_norm,
        run.model,
        run.trial,
        run.epoch,
        run.ignore_keys_for_eval,
        run.start_time,
        learning_rate=run.learning_rate,
    )
