"""Mixin of `Trainer`: `evaluate`, `predict` and what they call."""

import contextlib
import math
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from finetune.checkpoint import manager as checkpoints
from finetune.checkpoint import rng
from finetune.checkpoint.preemption import EvaluationInterrupted
from finetune.compat import EvalLoopOutput, PredictionOutput
from finetune.control.builtin import close_bars
from finetune.distributed import prepare as preparation
from finetune.engine import evaluation, prediction, step
from finetune.engine.run import TrainingRun
from finetune.facade.data import DataMethods
from finetune.models.activation import use_cache
from finetune.models.traits import takes_argument
from finetune.optim import schedules
from finetune.reporting import speed


class EvaluationMethods(DataMethods):
    """Evaluation and prediction. Use `Trainer`."""

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Returns `eval_loss`, the metrics of `compute_metrics`, and the speed of one pass over the evaluation data.

        A dict of datasets is evaluated one by one, as `eval_<name>_loss` and so on. Called by the user, and by
        `train` whenever `eval_strategy` asks for it.
        """
        override = eval_dataset is not None
        dataset = eval_dataset if override else self.eval_dataset
        if isinstance(dataset, dict):
            metrics: dict[str, float] = {}
            for name, part in dataset.items():
                part = part if override else name
                metrics |= self.evaluate(part, ignore_keys, metric_key_prefix=f"{metric_key_prefix}_{name}")
            return metrics
        self._memory_tracker.start("eval")
        loader = self.get_eval_dataloader(dataset)
        output = self._timed_loop(loader, "Evaluation", ignore_keys, metric_key_prefix)
        self.store_tokens()
        self.log(output.metrics)
        self._events.fire("on_evaluate", metrics=output.metrics)
        self._memory_tracker.stop(output.metrics)
        return output.metrics

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Returns `PredictionOutput(predictions, label_ids, metrics)`; labels and metrics where the data has labels."""
        self._memory_tracker.start("test")
        output = self._timed_loop(self.get_test_dataloader(test_dataset), "Prediction", ignore_keys, metric_key_prefix)
        self._events.fire("on_predict", metrics=output.metrics)
        self._memory_tracker.stop(output.metrics)
        return PredictionOutput(predictions=output.predictions, label_ids=output.label_ids, metrics=output.metrics)

    def _timed_loop(self, loader: Any, description: str, ignore_keys: list[str] | None, prefix: str) -> EvalLoopOutput:
        """Runs the overridable `evaluation_loop` and adds its speed to the metrics."""
        start = time.time()
        options: dict[str, Any] = {"ignore_keys": ignore_keys, "metric_key_prefix": prefix}
        if description == "Evaluation":
            # Without metrics nobody looks at the predictions.
            options["prediction_loss_only"] = True if self.compute_metrics is None else None
        try:
            output = self.evaluation_loop(loader, description=description, **options)
        except BaseException:
            if not self.is_in_train:
                close_bars(self.callback_handler.callbacks)
            raise
        start += output.metrics.get(f"{prefix}_model_preparation_time", 0.0)
        steps = math.ceil(output.num_samples / (self.args.eval_batch_size * self.args.world_size))
        output.metrics.update(speed.speed_metrics(prefix, start, num_samples=output.num_samples, num_steps=steps))
        return output

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Returns predictions, labels, metrics and the number of rows of one pass. Called by `evaluate`, `predict`."""
        with self.model_features():
            model = self._prepare_for_evaluation()
            self.callback_handler.eval_dataloader = dataloader
            if prediction_loss_only is None:
                prediction_loss_only = self.args.prediction_loss_only
            settings = evaluation.EvalSettings(
                args=self.args,
                accelerator=self.accelerator,
                compute_metrics=self.compute_metrics,
                preprocess_logits=self.preprocess_logits_for_metrics,
                gather_function=self.gather_function,
                prediction_loss_only=prediction_loss_only,
                ignore_keys=ignore_keys,
                metric_key_prefix=metric_key_prefix,
                shifts_labels=self._traits.shifts_labels,
                main_input_name=self._traits.main_input_name,
                keep_all=description == "Prediction",
            )
            step.enter_eval_mode(self.optimizer)
            with use_cache(self.model, bool(self.args.use_cache)):
                output = evaluation.evaluation_loop(self, model, dataloader, settings, self._events)
            if self.model_preparation_time is not None:
                output.metrics[f"{metric_key_prefix}_model_preparation_time"] = self.model_preparation_time
            return output

    def _prepare_for_evaluation(self) -> nn.Module:
        """Returns the model to evaluate: the one in training, or one prepared now, timed."""
        bare = partial(self.accelerator.unwrap_model, keep_torch_compile=False)
        if not self.is_in_train and bare(self.model_wrapped) is not bare(self.model):
            self.accelerator._models.clear()  # the user put another model in its place
        if not self.accelerator._models:
            start = time.time()
            self.model_wrapped = preparation.prepare_for_evaluation(self.accelerator, self.model)
            self.model_preparation_time = round(time.time() - start, 4)
            if self.is_fsdp_enabled:
                self.model = self.model_wrapped
        half = torch.float16 if self.args.fp16_full_eval else torch.bfloat16 if self.args.bf16_full_eval else None
        if half is not None and not self.is_in_train:
            self.model_wrapped.to(dtype=half, device=self.args.device)
        return self.model_wrapped

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Returns (loss, logits, labels) of one batch, each optional. Called for every evaluation batch."""
        if ignore_keys is None:
            config = getattr(self.model, "config", None)
            ignore_keys = getattr(config, "keys_to_ignore_at_inference", ["past_key_values"])
        if prediction_loss_only and self.args.use_liger_kernel and takes_argument(self.model, "skip_logits"):
            inputs = {**inputs, "skip_logits": True}
        return prediction.predict_batch(
            self,
            model,
            inputs,
            loss_only=prediction_loss_only,
            ignore_keys=ignore_keys,
            label_names=self.label_names,
            can_return_loss=self.can_return_loss,
            shifts_labels=self._traits.shifts_labels,
            pass_num_items=self._passes_num_items and (self.model_accepts_loss_kwargs or bool(self.compute_loss_func)),
        )

    def _evaluate(
        self, trial: Any, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False
    ) -> dict[str, float]:
        """Evaluates during training; a schedule that follows a metric makes its step with the result."""
        with evaluation.naming_memory_errors(self.args):
            metrics = self.evaluate(ignore_keys=ignore_keys_for_eval)
        self._report_to_hp_search(trial, self.state.global_step, metrics)
        if not skip_scheduler and schedules.needs_metric(self.lr_scheduler):
            self.lr_scheduler.step(checkpoints.read_metric(metrics, self.args.metric_for_best_model))
        return metrics

    def _evaluate_in_run(self, run: TrainingRun, trial: Any, ignore_keys_for_eval: list[str] | None) -> None:
        """Evaluates after a step or an epoch and notes whether the model is the best so far.

        A signal ends the evaluation; it is owed then, and what is saved says so.
        """
        guard, control = self._guard, self.control
        try:
            with contextlib.nullcontext() if guard is None else guard.interrupting():
                metrics = self._evaluate(trial, ignore_keys_for_eval)
        except EvaluationInterrupted:
            run.owes_evaluation = control.should_save = control.should_training_stop = True
            return
        run.owes_evaluation = False
        is_best = self._determine_best_metric(metrics=metrics, trial=trial)
        if self.args.save_strategy == "best":
            control.should_save = is_best
        if guard is not None and guard.requested(self.accelerator):
            control.should_save = control.should_training_stop = True

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any = None) -> bool:
        """Returns whether this evaluation is the best so far, and notes it in `state`."""
        return checkpoints.determine_best_metric(metrics, args=self.args, state=self.state)

    def _make_up_evaluation(self, run: TrainingRun) -> bool:
        """Makes the evaluation that the checkpoint owes, if any. Returns whether training goes on behind it."""
        if not run.owes_evaluation:
            return True
        run.restore_rng_once()
        self._evaluate_in_run(run, run.trial, run.ignore_keys_for_eval)
        # It would be saved as the checkpoint that the run was resumed from, whose next reader makes up for it again.
        self.control.should_save = False
        run.restore_rng = partial(rng.restore_rng, rng.capture_rng())
        return not self.control.should_training_stop
