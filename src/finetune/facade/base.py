"""`TrainerBase`: the constructor, callbacks, and the small questions about processes."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from finetune.arguments import TrainingArguments
from finetune.checkpoint.preemption import PreemptionGuard
from finetune.checkpoint.writer import CheckpointWriter
from finetune.control.builtin import DefaultFlowCallback, PrinterCallback, ProgressCallback
from finetune.control.callbacks import CallbackHandler
from finetune.control.state import TrainerState, export_states
from finetune.data.loading.collate import default_collator
from finetune.distributed.accelerator import build_accelerator, fsdp_version, zero_stage
from finetune.engine import checks, divisor, search, setup
from finetune.engine.before_rows import check_given
from finetune.engine.run import TrainingRun
from finetune.facade.attributes import RunAttributes
from finetune.models.traits import inspect_model
from finetune.reporting import metrics_io, trackers
from finetune.reporting.memory import MemoryTracker

if TYPE_CHECKING:
    import transformers
    from typing_extensions import Unpack


class TrainerBase(RunAttributes):
    """What every part of the facade stands on. Use `Trainer`."""

    log_metrics = metrics_io.log_metrics
    save_metrics = metrics_io.save_metrics
    save_state = metrics_io.save_state
    metrics_format = metrics_io.metrics_format
    hyperparameter_search = search.hyperparameter_search
    _hp_search_setup = search.set_up_trial
    _report_to_hp_search = search.report_to_search

    loss_is_scaled_for_ga: bool | None = None
    # What `log` adds to the metrics of an evaluation.
    _token_metric_names: tuple[str, ...] = ()

    # Set within `hyperparameter_search` only.
    hp_search_backend: Any = None
    hp_name: Any = None
    hp_space: Any = None
    compute_objective: Any = None
    objective: Any = None
    _trial: Any = None
    _searched_args: Any = None

    if TYPE_CHECKING:  # what one half of the facade asks of another

        def train(
            self,
            resume_from_checkpoint: str | bool | None = None,
            trial: Any = None,
            ignore_keys_for_eval: list[str] | None = None,
        ) -> Any: ...
        def evaluate(
            self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
        ) -> dict[str, float]: ...
        def log(self, logs: dict[str, float], start_time: float | None = None) -> None: ...
        def compute_loss(
            self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any: ...
        def compute_loss_context_manager(self) -> Any: ...
        def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]: ...
        def store_flos(self) -> None: ...
        def store_tokens(self) -> None: ...

        @property
        def _passes_num_items(self) -> bool: ...

    # ---- Changes to the model ----

    _features_are_on = False

    @contextlib.contextmanager
    def model_features(self) -> Iterator[None]:
        """Context manager that turns on what the trainer changes on the model to train or evaluate it; re-entrant.

        `train` and `evaluate` enter it themselves; a custom loop has to. For `SFTTrainer` it is attention within
        packed samples, activation offloading and the fused loss. Everything is undone at the end.
        """
        if self._features_are_on:
            yield
            return
        self._features_are_on = True
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, self, "_features_are_on", False)
            self._change_model(stack)
            yield

    def _change_model(self, stack: contextlib.ExitStack) -> None:
        """Enters on `stack` what a subclass changes on the model to train or evaluate it, before it is wrapped."""

    # ---- Construction ----

    def __init__(
        self,
        model: nn.Module | None = None,
        args: "TrainingArguments | transformers.TrainingArguments | dict[str, Any] | None" = None,
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
        **old_names: "Unpack[setup.OldNames]",
    ) -> None:
        processing_class = setup.accept_old_names(old_names, processing_class, type(self), TrainingArguments)
        check_given(processing_class=processing_class, callbacks=callbacks)
        self._use_arguments(args)
        args = self.args
        setup.set_log_level(args)
        checks.warn_of_idle_devices(args)
        checks.warn_of_slow_bfloat16(args)
        setup.seed_everything(args)
        self.model_init = model_init
        self.model = self.model_wrapped = setup.resolve_model(model, model_init)
        self.create_accelerator_and_postprocess()
        self._memory_tracker = MemoryTracker(args.skip_memory_metrics)
        self._memory_tracker.start("init")
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
        sharded = {"sharded": self.is_fsdp_enabled or self.is_deepspeed_enabled}
        self._loss_divisor, self._division_check = divisor.LossDivisor(**sharded), divisor.DivisionCheck(**sharded)
        self.label_smoother = setup.label_smoother(args, self.model)
        self.data_collator = data_collator or default_collator(processing_class)
        self.train_dataset, self.eval_dataset, self.processing_class = train_dataset, eval_dataset, processing_class
        self.compute_loss_func, self.compute_metrics = compute_loss_func, compute_metrics
        self.preprocess_logits_for_metrics = preprocess_logits_for_metrics
        self.optimizer: Any
        self.lr_scheduler: Any
        self.optimizer, self.lr_scheduler = optimizers
        self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs
        self.neftune_noise_alpha = args.neftune_noise_alpha
        self._validate_args()

        reporters = [DefaultFlowCallback, *trackers.callbacks(args.report_to, args.logging_dir)]
        self.callback_handler = CallbackHandler(
            [*reporters, *(callbacks or [])], self.model, processing_class, self.optimizer, self.lr_scheduler
        )
        self.add_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)
        self.hub_model_id: str | None = None
        setup.make_output_dir(args)
        if args.push_to_hub:
            self.init_hf_repo()  # pyright: ignore[reportAttributeAccessIssue]
        self._run: TrainingRun | None = None
        self._guard: PreemptionGuard | None = None
        self._writer = CheckpointWriter(tolerant=args.on_save_failure == "continue")
        self._created_lr_scheduler = self._optimizer_is_released = self.is_in_train = False
        self._eval_loaders: dict[str, Any] = {}
        self.model_preparation_time: float | None = None
        self.deepspeed: Any = None
        self._feature_logs: Callable[[], dict[str, float]] = dict
        self._signature_columns: list[str] | None = None
        self._events.handler, self._events.state = self.callback_handler, self._new_state()
        self._events.fire("on_init_end")
        self._memory_tracker.stop()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        checks.warn_of_dead_overrides(cls)

    def _validate_args(self) -> None:
        """Raises `ArgumentError` when arguments contradict each other. Called by the constructor."""
        checks.check_combination(self, is_fsdp=self.is_fsdp_enabled)

    def _new_state(self) -> TrainerState:
        listeners = [*self.callback_handler.callbacks]
        return TrainerState(
            is_local_process_zero=self.is_local_process_zero(),
            is_world_process_zero=self.is_world_process_zero(),
            stateful_callbacks=export_states(listeners),
        )

    def create_accelerator_and_postprocess(self) -> None:
        """Creates `self.accelerator`. Called once by the constructor."""
        self.accelerator = build_accelerator(self.args, self.model)
        self.gather_function = partial(
            self.accelerator.gather_for_metrics, use_gather_object=self.args.eval_use_gather_object
        )
        self.is_deepspeed_enabled = zero_stage(self.accelerator) is not None
        self.is_fsdp_enabled = fsdp_version(self.accelerator) is not None

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Returns a new model from `model_init`."""
        assert self.model_init is not None
        return setup.call_model_init(self.model_init, trial)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        setup.move_model(model, device)

    def get_tp_size(self) -> int:
        """Returns over how many processes each layer is split (tensor parallelism); they see the same rows."""
        return setup.tensor_parallel_size(self.model, self.args, self.accelerator)

    def get_cp_size(self) -> int:
        """Returns over how many processes each row is split (context parallelism). Always 1 in this release."""
        return getattr(getattr(self.accelerator, "parallelism_config", None), "cp_size", 1)

    def get_sp_size(self) -> int:
        """Returns over how many processes each row is split (DeepSpeed's sequence parallelism). Always 1 here."""
        return getattr(getattr(self.accelerator, "parallelism_config", None), "sp_size", 1)

    @property
    def _replicas(self) -> int:
        """Processes that share their rows."""
        return self.get_tp_size() * self.get_cp_size() * self.get_sp_size()

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Returns the rows of one optimizer step: micro-batch x accumulation x data-parallel processes."""
        return self._train_batch_size * args.gradient_accumulation_steps * (args.world_size // self._replicas)

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
