"""`TrainerBase`: the constructor, the attributes, and the parts of a trainer that need no training loop.

Data loaders, optimizer, schedule, callbacks and the small questions about processes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from finetune.arguments import TrainingArguments
from finetune.checkpoint.writer import CheckpointWriter
from finetune.compat import coerce_training_arguments
from finetune.control.builtin import DefaultFlowCallback, PrinterCallback, ProgressCallback
from finetune.control.callbacks import CallbackHandler, Events
from finetune.control.state import TrainerControl, TrainerState, export_states
from finetune.data import columns
from finetune.data import loader as loaders
from finetune.distributed.accelerator import build_accelerator
from finetune.engine import setup, step
from finetune.engine.run import TrainingRun
from finetune.errors import ArgumentError
from finetune.models.traits import inspect_model
from finetune.optim import groups, registry, schedules
from finetune.reporting import metrics_io, trackers
from finetune.reporting.memory import MemoryTracker


class TrainerBase:
    """What every part of the facade stands on. Use `Trainer`."""

    log_metrics = metrics_io.log_metrics
    save_metrics = metrics_io.save_metrics
    save_state = metrics_io.save_state
    metrics_format = metrics_io.metrics_format

    loss_is_scaled_for_ga: bool | None = None

    # ---- Construction ----

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., nn.Module] | None = None,
        compute_loss_func: Callable[..., Tensor] | None = None,
        compute_metrics: Callable[..., dict[str, Any]] | None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
        **old_names: Any,
    ) -> None:
        processing_class = setup.accept_old_names(old_names, processing_class, type(self))
        self.args = args = coerce_training_arguments(args, TrainingArguments)
        setup.seed_everything(args)
        self.model_init = model_init
        self.model = self.model_wrapped = setup.resolve_model(model, model_init)
        self.create_accelerator_and_postprocess()
        self._memory_tracker = MemoryTracker(args.skip_memory_metrics)
        self._memory_tracker.start("init")
        setup.check_combination(
            args,
            eval_dataset=eval_dataset,
            compute_metrics=compute_metrics,
            model_init=model_init,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            is_fsdp=self.is_fsdp_enabled,
        )
        self.is_model_parallel = setup.is_model_parallel(self.model, args)
        self.place_model_on_device = setup.places_model(
            args,
            self.model,
            parallel=self.is_model_parallel,
            is_deepspeed=self.is_deepspeed_enabled,
            is_fsdp=self.is_fsdp_enabled,
        )
        if self.place_model_on_device:
            self._move_model_to_device(self.model, args.device)

        self._traits = inspect_model(self.model, args.label_names)
        self.model_accepts_loss_kwargs = self._traits.accepts_loss_kwargs
        self.label_names, self.can_return_loss = list(self._traits.label_names), self._traits.can_return_loss
        self._loss_divisor = step.LossDivisor()
        self.label_smoother = setup.label_smoother(args, self.model)
        self.data_collator = data_collator or setup.default_collator(processing_class)
        self.train_dataset, self.eval_dataset, self.processing_class = train_dataset, eval_dataset, processing_class
        self.compute_loss_func, self.compute_metrics = compute_loss_func, compute_metrics
        self.preprocess_logits_for_metrics = preprocess_logits_for_metrics
        self.optimizer, self.lr_scheduler = optimizers
        self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs
        self.neftune_noise_alpha = args.neftune_noise_alpha

        reporters = [DefaultFlowCallback, *trackers.callbacks(args.report_to, args.logging_dir)]
        self.callback_handler = CallbackHandler(
            [*reporters, *(callbacks or [])], self.model, processing_class, self.optimizer, self.lr_scheduler
        )
        self.add_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)
        self.hub_model_id: str | None = None
        if args.push_to_hub:
            self.init_hf_repo()
        self._run: TrainingRun | None = None
        self._writer = CheckpointWriter(args.async_save)
        self._created_lr_scheduler = False
        self._eval_loaders: dict[str, Any] = {}
        self.model_preparation_time: float | None = None
        self.deepspeed: Any = None
        self._signature_columns: list[str] | None = None
        self._train_batch_size = args.train_batch_size
        self.is_in_train, self.hp_name, self.hp_search_backend = False, None, None
        self._events = Events(args, self.callback_handler, self._new_state(), TrainerControl())
        self._events.fire("on_init_end")
        self._memory_tracker.stop()

    def _new_state(self) -> TrainerState:
        listeners = [*self.callback_handler.callbacks]
        return TrainerState(
            is_local_process_zero=self.is_local_process_zero(),
            is_world_process_zero=self.is_world_process_zero(),
            stateful_callbacks=export_states(listeners),
        )

    @property
    def state(self) -> TrainerState:
        return self._events.state

    @state.setter
    def state(self, value: TrainerState) -> None:
        self._events.state = value

    @property
    def control(self) -> TrainerControl:
        return self._events.control

    @control.setter
    def control(self, value: TrainerControl) -> None:
        self._events.control = value

    @property
    def current_gradient_accumulation_steps(self) -> int:
        """Micro-batches of the window in progress: fewer than `gradient_accumulation_steps` at the end of an epoch."""
        return self._run.window_batches if self._run else self.args.gradient_accumulation_steps

    @property
    def _tr_loss(self) -> Tensor | None:
        return self._run.meter.running if self._run else None

    @property
    def _total_loss_scalar(self) -> float:
        return self._run.meter.total if self._run else 0.0

    @property
    def _globalstep_last_logged(self) -> int:
        return self._run.meter.logged_at if self._run else 0

    def create_accelerator_and_postprocess(self) -> None:
        """Creates `self.accelerator`. Called once by the constructor."""
        self.accelerator = build_accelerator(self.args, self.model)
        self.gather_function = self.accelerator.gather_for_metrics
        self.is_deepspeed_enabled = getattr(self.accelerator.state, "deepspeed_plugin", None) is not None
        self.is_fsdp_enabled = getattr(self.accelerator.state, "fsdp_plugin", None) is not None

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Returns a new model from `model_init`."""
        assert self.model_init is not None
        return setup.call_model_init(self.model_init, trial)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        setup.move_model(model, device)

    def is_local_process_zero(self) -> bool:
        """Returns whether this process is the first one of its machine."""
        return self.args.local_process_index == 0

    def is_world_process_zero(self) -> bool:
        """Returns whether this process is the first of all."""
        return self.args.process_index == 0

    def add_callback(self, callback: Any) -> None:
        """Adds a callback: a class, which is instantiated, or an instance."""
        self.callback_handler.add_callback(callback)

    def pop_callback(self, callback: Any) -> Any:
        """Removes a callback and returns it; None when there is none of that class."""
        return self.callback_handler.pop_callback(callback)

    def remove_callback(self, callback: Any) -> None:
        """Removes a callback."""
        self.callback_handler.remove_callback(callback)

    # ---- Data ----

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Returns the training loader. Called once at the start of each `train()`."""
        if self.train_dataset is None:
            raise ArgumentError("Training needs data: pass `train_dataset`.")
        return self._get_dataloader(
            self.train_dataset, "Training", self._train_batch_size, self._get_train_sampler, is_training=True
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Returns the loader of `eval_dataset`: a data set, a key of `self.eval_dataset`, or None for the latter."""
        key = eval_dataset if isinstance(eval_dataset, str) else "eval"
        if self.args.dataloader_persistent_workers and key in self._eval_loaders:
            return self._eval_loaders[key]
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ArgumentError("Evaluation needs data: pass `eval_dataset`.")
        return self._get_dataloader(
            dataset, "Evaluation", self.args.eval_batch_size, self._get_eval_sampler, dataloader_key=key
        )

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """Returns the loader that `predict` uses."""
        return self._get_dataloader(test_dataset, "test", self.args.eval_batch_size, self._get_eval_sampler)

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Callable[[Any], Any] | None = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> DataLoader[Any]:
        """Returns a prepared loader over the columns the model takes. Called by the three `get_*_dataloader`."""
        collate = self.data_collator
        if hasattr(dataset, "remove_columns"):
            dataset = self._remove_unused_columns(dataset, description=description)
        if getattr(dataset, "column_names", None) is None:
            collate = self._get_collator_with_removed_columns(collate, description=description)
        sampler = sampler_fn(dataset) if sampler_fn is not None and not loaders.is_stream(dataset) else None
        loader = loaders.build_dataloader(
            dataset,
            args=self.args,
            accelerator=self.accelerator,
            collate_fn=collate,
            batch_size=batch_size,
            sampler=sampler,
            is_training=is_training,
        )
        if dataloader_key is not None and self.args.dataloader_persistent_workers:
            self._eval_loaders[dataloader_key] = loader
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Returns the sampler of the training data, None for a stream. Called by `get_train_dataloader`."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return loaders.train_sampler(dataset, self.args, self._input_name)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """Returns the sampler of an evaluation data set. Called by `get_eval_dataloader` and `get_test_dataloader`."""
        return loaders.eval_sampler(eval_dataset, self.args, self._input_name)

    @property
    def _input_name(self) -> str | None:
        names = getattr(self.processing_class, "model_input_names", None)
        return names[0] if names else None

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = columns.signature_columns(self.model, self.label_names)

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        """Returns the data set without the columns that `model.forward` does not take."""
        if not self.args.remove_unused_columns:
            return dataset
        self._set_signature_columns_if_needed()
        return columns.remove_unused_columns(
            dataset,
            self._signature_columns or [],
            description=description,
            model_name=type(self.model).__name__,
        )

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        """Returns the collator behind a filter of columns, for data sets whose columns cannot be removed up front."""
        if not self.args.remove_unused_columns:
            return data_collator
        self._set_signature_columns_if_needed()
        return columns.collator_with_columns(
            data_collator, self._signature_columns or [], description=description, model_name=type(self.model).__name__
        )

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        """Returns the rows of a loader's data set."""
        return loaders.num_examples(dataloader, self.args.per_device_train_batch_size)

    # ---- Optimizer and schedule ----

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        """Creates both. transformers 5 no longer calls this; here an override of a subclass still is."""
        self.create_optimizer()
        self.create_scheduler(num_training_steps=num_training_steps)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Returns `self.optimizer`, built from `args.optim` when there is none yet. Called before the model is wrapped
        (after, under FSDP1, which replaces the parameters)."""
        if self.optimizer is None:
            model = self.model if model is None else model
            self.optimizer = registry.build_optimizer(
                self.args,
                model,
                cls_and_kwargs=self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, model),
                decay_names=self.get_decay_parameter_names(model),
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Returns `self.lr_scheduler`, built from `args.lr_scheduler_type` when there is none yet."""
        if self.lr_scheduler is None:
            self.lr_scheduler = schedules.build_scheduler(
                self.args, self.optimizer if optimizer is None else optimizer, num_training_steps
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: nn.Module | None = None) -> tuple[Any, Any]:
        """Returns the class and the keyword arguments of the optimizer that `args.optim` names."""
        return registry.optimizer_cls_and_kwargs(args, model)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Returns the names of the parameters that `weight_decay` applies to: no biases, no norms."""
        return groups.decay_parameter_names(model)

    def _get_learning_rate(self) -> float:
        return schedules.current_learning_rate(self.lr_scheduler, self.optimizer)

    def get_learning_rates(self) -> list[float]:
        """Returns the learning rate of each parameter group."""
        return [group["lr"] for group in self._require_optimizer().param_groups]

    def get_num_trainable_parameters(self) -> int:
        """Returns the number of parameters that receive gradients."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def get_optimizer_group(self, param: Any = None) -> Any:
        """Returns the parameters of every group, or the group that holds `param`."""
        param_groups = self._require_optimizer().param_groups
        if param is None:
            return [group["params"] for group in param_groups]
        return next((group for group in param_groups if any(member is param for member in group["params"])), None)

    def _require_optimizer(self) -> Any:
        if self.optimizer is None:
            raise ArgumentError("There is no optimizer yet: call `create_optimizer` or `train` first.")
        return self.optimizer
