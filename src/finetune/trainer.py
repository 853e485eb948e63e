"""`Trainer`: every override point of `transformers.Trainer`, most of them a few lines that call one other module.

This file has training and the loss; the mixins in `facade/` have the constructor (`base.py`), `attributes.py`,
`data.py`, `optimization.py`, `evaluation.py` and `saving.py`. Reading order of a run:
`train` -> `_inner_training_loop` -> `engine/loop.py`, which calls back `get_batch_samples`, `training_step`,
`_clip_grad_norm` and `_maybe_log_save_evaluate`.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from finetune.arguments import TrainingArguments, note_arguments
from finetune.checkpoint import manager as checkpoints
from finetune.checkpoint.preemption import saving_on_signals
from finetune.compat import TrainOutput
from finetune.control.builtin import close_bars
from finetune.data.loading import position
from finetune.distributed import prepare as preparation
from finetune.engine import checks, features, setup, step
from finetune.engine.accumulation import global_count, take, without_repeated_rows
from finetune.engine.best_metric import check_best_metric
from finetune.engine.divisor import at_least_one
from finetune.engine.loop import run_training
from finetune.engine.meter import LossMeter, NonFinitePolicy
from finetune.engine.plan import ResumePoint, StepPlan
from finetune.engine.position import describe_batch
from finetune.engine.run import TrainingRun
from finetune.errors import ArgumentError
from finetune.facade.evaluation import EvaluationMethods
from finetune.facade.optimization import OptimizerMethods
from finetune.facade.saving import SavingMethods
from finetune.models.traits import check_trainable
from finetune.optim.fused_backward import optimizer_logs, release_optimizer, works_in_backward
from finetune.reporting import flops, header, speed


class Trainer(EvaluationMethods, OptimizerMethods, SavingMethods):
    """Trains and evaluates a PyTorch model; a drop-in for `transformers.Trainer` (5.23).

    Same constructor, same attributes, same override points called at the same times. What differs on purpose is
    listed in `tests/contract/README.md`.

    Args:
        model: the model to train; or give `model_init`, which returns a new one for each run.
        args: the configuration. transformers' and a dict of fields are read too; unset means the defaults.
        data_collator: makes a batch from a list of rows; unset pads if `processing_class` can, else stacks.
        train_dataset, eval_dataset: rows as the model takes them; `eval_dataset` may be a dict of several datasets.
        processing_class: the tokenizer or processor, used to pad and saved with the model.
        compute_loss_func: called as `(outputs, labels, num_items_in_batch)`, returns the loss.
        compute_metrics: called with an `EvalPrediction`, returns a dict of metrics.
        callbacks: a list of callbacks, classes or instances, in addition to those of `report_to`.
        optimizers, optimizer_cls_and_kwargs: an optimizer and a schedule, or a class, instead of those of `args`.
        preprocess_logits_for_metrics: called as `(logits, labels)` before the logits are kept for `compute_metrics`.

    Attributes users read or set: `model`, `model_wrapped`, `args`, `data_collator`, `train_dataset`, `eval_dataset`,
    `processing_class`, `optimizer`, `lr_scheduler`, `compute_metrics`, `accelerator`, `callback_handler`, `state`,
    `control`, `label_names`, `is_in_train`, `loss_is_scaled_for_ga`.
    """

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Returns `TrainOutput(global_step, training_loss, metrics)` after training.

        Args:
            resume_from_checkpoint: a folder; True for the newest valid checkpoint of `output_dir` (an error without
                one); `"auto"` for the same, starting fresh without one.
            trial: a hyperparameter search trial.
            ignore_keys_for_eval: model outputs to leave out of predictions during evaluation.

        Raises:
            ArgumentError: no evaluation will report `metric_for_best_model`.
            CheckpointError: the checkpoint cannot be resumed from.
            NonFiniteLossError: the loss became NaN or infinite and `nonfinite_policy` is `raise`.
        """
        self._memory_tracker.start("train")
        self._run = self._guard = None
        self._hp_search_setup(trial)
        args = self.args
        check_best_metric(self)
        with checkpoints.agreeing():
            if args.should_save:
                checkpoints.require_writable(self._get_output_dir(trial))
        self._writer.start_run(tolerant=args.on_save_failure == "continue")
        checkpoint = checkpoints.resolve_resume(resume_from_checkpoint, self._get_output_dir(trial))
        with contextlib.ExitStack() as stack:
            self.is_in_train = True
            stack.callback(close_bars, self.callback_handler.callbacks)
            stack.callback(self._release_optimizer)
            stack.callback(setattr, self, "is_in_train", False)
            if self.model_init is not None:
                self._reset_model(trial)
            check_trainable(self.model)
            if not self.place_model_on_device and (args.fp16_full_eval or args.bf16_full_eval):
                self._move_model_to_device(self.model, args.device)
            self._feature_logs = features.enter(
                stack, self.model, args, self.processing_class, self.neftune_noise_alpha, self._recomputes_activations()
            )
            stack.enter_context(self.model_features())
            stack.enter_context(setup.underflow_debugger(self.model, args.debug))
            if args.enable_jit_checkpoint:
                self._guard = stack.enter_context(saving_on_signals(self.callback_handler, self.accelerator))
            if checkpoint is not None and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
                self._load_from_checkpoint(checkpoint)
            loop = self._loop_with_batch_size(checkpoint)
            stack.enter_context(self._settling_checkpoints(trial))
            return loop(
                args=args,
                resume_from_checkpoint=checkpoint,
                trial=trial,
                ignore_keys_for_eval=ignore_keys_for_eval,
            )

    def _loop_with_batch_size(self, checkpoint: str | None) -> Callable[..., TrainOutput]:
        """Returns `_inner_training_loop` with the batch size, with `auto_find_batch_size` the largest that fits."""
        if not self.args.auto_find_batch_size:
            return partial(self._inner_training_loop, batch_size=self._train_batch_size)
        from accelerate.utils import find_executable_batch_size

        return find_executable_batch_size(
            lambda batch_size, **rest: self._inner_training_loop(batch_size=batch_size, **rest),
            starting_batch_size=self._starting_batch_size(checkpoint),
        )

    def _inner_training_loop(
        self,
        batch_size: int | None = None,
        args: TrainingArguments | None = None,
        resume_from_checkpoint: str | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Runs one training with one batch size; `auto_find_batch_size` calls it again with a smaller one."""
        args = cast(TrainingArguments, args or self.args)
        if self._run is not None or self.accelerator._models:
            self.accelerator.free_memory()  # collects garbage too, which takes a third of a second
        checks.warn_of_second_start(self._run, self.state.global_step, batch_size, tried=self._train_batch_size)
        self._train_batch_size = batch_size or self._train_batch_size
        loader = self.get_train_dataloader()
        plan = StepPlan.from_values(args.gradient_accumulation_steps, self.set_initial_training_values(args, loader))
        resume = self._init_training_state(plan, resume_from_checkpoint, trial)
        model = self._prepare_for_training(plan.max_steps, loader, resume_from_checkpoint)
        run = self._run = TrainingRun(
            args=args,
            accelerator=self.accelerator,
            model=model,
            loader=loader,
            plan=plan,
            resume=resume,
            optimizer=self.optimizer,
            lr_scheduler=self.lr_scheduler,
            meter=LossMeter(
                args.device,
                cast(NonFinitePolicy, args.nonfinite_policy),
                self.state.global_step,
                partial(describe_batch, loader),
                self.accelerator.num_processes,
            ),
            skip_batches=position.skip_batches,
            restore_rng=partial(self._load_rng_state, resume_from_checkpoint) if resume_from_checkpoint else None,
            before_step=self._writer.settle,
            ends_epoch=lambda: self.control.should_epoch_stop,
            is_preempted=lambda: self.was_preempted,
            token_counter=setup.token_counter(args, self._traits, self.processing_class),
            trial=trial,
            ignore_keys_for_eval=ignore_keys_for_eval,
            initial_step=self.state.global_step,
            initial_tokens=self.state.num_input_tokens_seen,
        )
        if resume_from_checkpoint is not None:
            place = {"rank": args.process_index, "world_size": args.world_size}
            checkpoints.load_stateful(resume_from_checkpoint, self._stateful(), **place)
        header.start_observers(self, run)
        header.log_start(self, run)
        if args.should_save:
            note_arguments(self.output_dir, args)
        run.clear_gradients()
        self._events.fire("on_train_begin")
        if args.eval_on_start:
            self._evaluate(trial, ignore_keys_for_eval, skip_scheduler=True)
        if self._make_up_evaluation(run):
            run_training(run, self, self._events)
        return self._finalize_training(run)

    def _init_training_state(self, plan: StepPlan, checkpoint: str | None, trial: Any) -> ResumePoint:
        """Starts `self.state` fresh or from a checkpoint. Returns where in the data the run starts."""
        self.state = self._new_state()
        if checkpoint is not None:
            self.state = checkpoints.load_state(checkpoint, self.args)
            self._load_callback_state()
        self.state.is_hyper_param_search = trial is not None
        self.state.train_batch_size = self._train_batch_size
        self.state.compute_steps(self.args, plan.max_steps)
        self.state.init_training_references(self, plan.max_steps, plan.num_train_epochs, trial)
        return plan.resume_at(self.state.global_step, skip_data=not self.args.ignore_data_skip)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> nn.Module:
        """Creates optimizer and schedule, wraps the model, and loads their state. Returns the model to train."""
        if self._created_lr_scheduler:
            self.lr_scheduler, self._created_lr_scheduler = None, False
        if self._optimizer_is_released:
            self.optimizer, self._optimizer_is_released = None, False
        prepared = preparation.prepare(
            self.accelerator,
            self.model,
            self._optimizer_factory(max_steps),
            args=self.args,
            max_steps=max_steps,
            create_scheduler=self._schedule_for,
        )
        self.model_wrapped, self.optimizer = prepared.model, prepared.optimizer
        if self.is_fsdp_enabled:
            self.model = self.model_wrapped
        self.deepspeed = self.model_wrapped if self.is_deepspeed_enabled else None
        self.lr_scheduler = prepared.lr_scheduler or self._schedule_for(num_training_steps=max_steps)
        if resume_from_checkpoint is not None:
            if self.is_deepspeed_enabled or self.is_fsdp_enabled:
                self._load_from_checkpoint(resume_from_checkpoint, self.model_wrapped)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            self._load_scaler(resume_from_checkpoint)
        handler = self.callback_handler
        handler.model, handler.optimizer, handler.lr_scheduler = self.model, self.optimizer, self.lr_scheduler
        handler.train_dataloader = train_dataloader
        return self.model_wrapped

    @property
    def was_preempted(self) -> bool:
        """Whether the last `train` ended early because of a signal (`enable_jit_checkpoint`), after a checkpoint."""
        return self._guard is not None and self._guard.agreed

    def _release_optimizer(self) -> None:
        """Takes the hooks of an optimizer that works in backward off the model; the next `train` makes a new one."""
        if works_in_backward(self.optimizer):
            release_optimizer(self.optimizer)
            self._optimizer_is_released = True

    def _finalize_training(self, run: TrainingRun) -> TrainOutput:
        """Logs the run's totals, loads the best model if asked, and returns what `train` returns.

        After a signal the run is not over: the best model is not loaded then.
        """
        self._writer.wait()
        run.meter.drain(self.accelerator, self.state.global_step)
        loss = run.meter.total / max(self.state.global_step - run.meter.start_step, 0.001)
        steps = self.state.global_step - run.initial_step
        share = steps / max(self.state.max_steps, 1)
        metrics = speed.speed_metrics(
            "train", run.start_time, num_samples=run.plan.num_train_samples * share, num_steps=steps
        )
        self._collect_for_log()
        metrics.update(total_flos=self.state.total_flos, train_loss=loss)
        self._memory_tracker.stop(metrics)
        self.log(metrics)
        header.log_end(self, run, metrics, self._writer.stalls)
        best, is_preempted = self.state.best_model_checkpoint, self.was_preempted
        if self.args.load_best_model_at_end and best is not None and not is_preempted:
            self._load_best_model()
        checkpoints.rotate(self.args, self._get_output_dir(run.trial), best, is_preempted=is_preempted)
        self._events.fire("on_train_end")
        self._finish_current_push()
        return TrainOutput(self.state.global_step, loss, metrics)

    def _reset_model(self, trial: Any) -> None:
        """Makes a new model with `model_init`, from the same seed, and forgets the optimizer of the old one."""
        setup.seed_everything(self.args)
        self.model = self.model_wrapped = self.call_model_init(trial)
        self.optimizer = self.lr_scheduler = None
        if self.place_model_on_device:
            self._move_model_to_device(self.model, self.args.device)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Returns the micro-batches of one optimizer step and the number of items to divide their losses by.

        Called once per optimizer step. Fewer batches than asked for at the end of the data.
        """
        batches = take(epoch_iterator, num_batches)
        run = self._run
        if run is not None and (self.model_accepts_loss_kwargs or self.compute_loss_func is not None):
            place: dict[str, Any] = {"accelerator": self.accelerator, "loader": run.loader}
            batches = without_repeated_rows(batches, run.batches_done, sums=self._sums_losses, **place)
        return batches, self._get_num_items_in_batch(batches, device)

    @property
    def _sums_losses(self) -> bool:
        """Whether a batch without labels has the loss 0, because a sum is divided by the items of the whole batch."""
        return self.label_smoother is not None or self._loss_divisor.model_divides is True

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        if not (self.model_accepts_loss_kwargs or self.compute_loss_func is not None):
            return None
        count = global_count(
            batch_samples,
            accelerator=self.accelerator,
            device=device,
            shifts_labels=self._traits.shifts_labels,
            across_processes=self.args.average_tokens_across_devices,
        )
        if count is None:
            return None
        if self._run is not None:
            self._run.meter.note_items(count)
        count = at_least_one(count)
        return count if self._replicas == 1 else count / self._replicas

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Runs forward and backward of one micro-batch and returns its detached, scaled loss.

        Called by the loop for every micro-batch.
        """
        step.enter_train_mode(model, self.optimizer)
        inputs = self._prepare_inputs(inputs)
        told = num_items_in_batch is not None and self._passes_num_items
        accumulation = self.current_gradient_accumulation_steps
        overridden = type(self).compute_loss is not Trainer.compute_loss
        assumed = told and overridden and accumulation > 1 and self.loss_is_scaled_for_ga is None
        if assumed:
            num_items_in_batch = self._division_check.pass_on(num_items_in_batch)
        with self.compute_loss_context_manager():
            extra: dict[str, Any] = {"num_items_in_batch": num_items_in_batch} if self._passes_num_items else {}
            loss = self.compute_loss(model, inputs, **extra)
        del inputs
        step.empty_cache(self.args.torch_empty_cache_steps, self.state.global_step)
        if assumed:
            self._division_check.look_at(loss, num_items_in_batch, accumulation, type(self).__name__)
        scaled = self.loss_is_scaled_for_ga
        if scaled is None:
            scaled = told and (self.model_accepts_loss_kwargs or self.compute_loss_func is not None)
        loss = step.scale_loss(loss, already_scaled=scaled, accumulation=accumulation)
        extra = step.backward_kwargs(self.args.optim, self.accelerator, self._get_learning_rate)
        self.accelerator.backward(loss, **extra)
        return loss.detach()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Returns the loss of a micro-batch, or (loss, outputs). Called by `training_step` and `prediction_step`.

        An override that returns a mean over the micro-batch sets `loss_is_scaled_for_ga = False`; one that divides by
        `num_items_in_batch` sets it to True.
        """
        loss, outputs = step.forward_loss(
            model,
            inputs,
            num_items_in_batch=num_items_in_batch,
            accepts_loss_kwargs=self.model_accepts_loss_kwargs,
            divisor=self._loss_divisor,
            shifts_labels=self._traits.shifts_labels,
            compute_loss_func=self.compute_loss_func,
            label_smoother=self.label_smoother,
        )
        loss = self._undo_process_average(loss, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _undo_process_average(self, loss: Tensor, num_items_in_batch: Any) -> Tensor:
        processes = self.accelerator.num_processes
        if processes == 1 or num_items_in_batch is None or not self.args.average_tokens_across_devices:
            return loss
        return step.undo_process_average(loss, processes // self.get_tp_size())

    def _recomputes_activations(self) -> bool:
        return bool(self.args.activation_checkpointing)

    @property
    def _passes_num_items(self) -> bool:
        return step.accepts_num_items(type(self).compute_loss)

    def compute_loss_context_manager(self) -> contextlib.AbstractContextManager[Any]:
        """Returns the context in which every loss is computed."""
        return self.autocast_smart_context_manager()

    def autocast_smart_context_manager(
        self, cache_enabled: bool | None = True
    ) -> contextlib.AbstractContextManager[Any]:
        """Returns the autocast context of every loss. Empty: accelerate applies autocast itself."""
        return contextlib.nullcontext()

    def _prepare_input(self, data: Any) -> Any:
        """Returns a batch, or part of one, with its tensors on the device. Calls itself for nested data."""
        return step.move(data, self.args.device, step.input_dtype(self.accelerator), each=self._prepare_input)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Returns a batch with its tensors on the device. Called for every training and evaluation batch."""
        inputs = self._prepare_input(inputs)
        if len(inputs) == 0:
            wanted = ", ".join(self._signature_columns or [])
            raise ArgumentError(f"An empty batch reached the model. Rows need columns it takes: {wanted}.")
        return inputs

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clips gradients to `max_grad_norm` and returns their norm before. Called before each optimizer step."""
        return step.clip_gradients(self.accelerator, model, self.optimizer, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None:
            grad_norm = step.clip_gradients(self.accelerator, model, self.optimizer, math.inf)
        return grad_norm.item() if self.is_deepspeed_enabled and isinstance(grad_norm, Tensor) else grad_norm

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Returns the operations of one forward and backward pass: 6 x tokens x parameters without embeddings."""
        return flops.floating_point_ops(self.model, inputs)

    def store_flos(self) -> None:
        """Adds the operations counted since the last call, over all processes, to `state.total_flos`."""
        if self._run is not None:
            local, self._run.flos = self._run.flos, 0.0
            self.state.total_flos += flops.sum_over_processes(local, self.accelerator)

    def store_tokens(self) -> None:
        """Adds the input tokens counted since the last call, over all processes, to `state.num_input_tokens_seen`."""
        if self._run is not None and self._run.token_counter is not None:
            self.state.num_input_tokens_seen += self._run.drain_tokens()

    def _collect_for_log(self) -> None:
        """Sums over all processes what `log` will add: `log` itself may be called by one process alone."""
        self.store_flos()
        self.store_tokens()

    def _maybe_log_save_evaluate(
        self,
        tr_loss: Tensor,
        grad_norm: Any,
        model: nn.Module,
        trial: Any,
        epoch: float,
        ignore_keys_for_eval: list[str] | None,
        start_time: float,
        learning_rate: float | None = None,
    ) -> None:
        """Logs, evaluates and saves where `control` asks for it. Called after each optimizer step and epoch."""
        run = self._run
        assert run is not None
        if self.control.should_log and self.state.global_step > run.meter.logged_at:
            steps = self.state.global_step - run.meter.logged_at
            loss, nonfinite = run.meter.drain(self.accelerator, self.state.global_step)
            logs: dict[str, Any] = {"loss": loss / steps}
            if grad_norm is not None:
                logs["grad_norm"] = grad_norm.item() if isinstance(grad_norm, Tensor) else grad_norm
            logs["learning_rate"] = self._get_learning_rate() if learning_rate is None else learning_rate
            if nonfinite:
                logs["nonfinite_losses"] = nonfinite
            logs |= optimizer_logs(self.optimizer) | self._feature_logs()
            self._collect_for_log()
            self.log(logs, start_time)
        if self.control.should_evaluate:
            self._evaluate_in_run(run, trial, ignore_keys_for_eval)
        if self.control.should_save:
            self._save_checkpoint(model, trial)
            self.control.should_save = False
            if self._save_error is None:
                self._events.fire("on_save")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds epoch and step to `logs`, keeps them in `state.log_history` and hands them to the callbacks."""
        if self.state.epoch is not None:
            logs["epoch"] = self.state.epoch
        if self.args.include_num_input_tokens_seen != "no" and self._run is not None:
            logs["num_input_tokens_seen"] = self.state.num_input_tokens_seen
            if start_time is not None:
                tokens = self.state.num_input_tokens_seen - self._run.initial_tokens
                logs.update(speed.speed_metrics("train", start_time, num_tokens=tokens))
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self._events.fire("on_log", logs=logs)
