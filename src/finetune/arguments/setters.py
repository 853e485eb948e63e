"""The `set_*` methods: explicit changes by the user, several related arguments at a time."""

from typing import TYPE_CHECKING, Any

from finetune.compat import HubStrategy, IntervalStrategy, OptimizerNames, SaveStrategy, SchedulerType
from finetune.errors import ArgumentError

if TYPE_CHECKING:
    from finetune.arguments.training import TrainingArguments


def _apply(args: Any, **values: Any) -> Any:
    for name, value in values.items():
        setattr(args, name, value)
    return args


def _require_steps(strategy: str, steps: float) -> None:
    if strategy == "steps" and steps <= 0:
        raise ArgumentError(f"`steps={steps}` must be above 0 when `strategy='steps'`.")


class Setters:
    """Methods of `TrainingArguments` that change it and return it; the package itself never calls them."""

    def set_training(
        self,
        learning_rate: float = 5e-5,
        batch_size: int = 8,
        weight_decay: float = 0,
        num_epochs: float = 3,
        max_steps: int = -1,
        gradient_accumulation_steps: int = 1,
        seed: int = 42,
        activation_checkpointing: bool = False,
        gradient_checkpointing: bool | None = None,
    ) -> "TrainingArguments":
        """Sets the basic training arguments and `do_train`; returns the arguments."""
        checkpointing = activation_checkpointing if gradient_checkpointing is None else gradient_checkpointing
        return _apply(
            self,
            do_train=True,
            learning_rate=learning_rate,
            per_device_train_batch_size=batch_size,
            weight_decay=weight_decay,
            num_train_epochs=num_epochs,
            max_steps=max_steps,
            gradient_accumulation_steps=gradient_accumulation_steps,
            seed=seed,
            activation_checkpointing=checkpointing,
            gradient_checkpointing=checkpointing,
        )

    def set_evaluate(
        self,
        strategy: str | IntervalStrategy = "no",
        steps: int = 500,
        batch_size: int = 8,
        accumulation_steps: int | None = None,
        delay: float | None = None,
        loss_only: bool = False,
    ) -> "TrainingArguments":
        """Sets when and how to evaluate, and `do_eval`; returns the arguments."""
        chosen = IntervalStrategy.read("strategy", strategy)
        _require_steps(chosen, steps)
        return _apply(
            self,
            eval_strategy=chosen,
            do_eval=chosen != IntervalStrategy.NO,
            eval_steps=steps,
            per_device_eval_batch_size=batch_size,
            eval_accumulation_steps=accumulation_steps,
            eval_delay=delay or 0,
            prediction_loss_only=loss_only,
        )

    def set_testing(self, batch_size: int = 8, loss_only: bool = False) -> "TrainingArguments":
        """Sets how to predict on a test set, and `do_predict`; returns the arguments."""
        return _apply(self, do_predict=True, per_device_eval_batch_size=batch_size, prediction_loss_only=loss_only)

    def set_save(
        self,
        strategy: str | SaveStrategy = "steps",
        steps: int = 500,
        total_limit: int | None = None,
        on_each_node: bool = False,
    ) -> "TrainingArguments":
        """Sets when to save and how much to keep; returns the arguments."""
        chosen = SaveStrategy.read("strategy", strategy)
        _require_steps(chosen, steps)
        return _apply(
            self, save_strategy=chosen, save_steps=steps, save_total_limit=total_limit, save_on_each_node=on_each_node
        )

    def set_logging(
        self,
        strategy: str | IntervalStrategy = "steps",
        steps: int = 500,
        report_to: str | list[str] = "none",
        level: str = "passive",
        first_step: bool = False,
        nan_inf_filter: bool = False,
        on_each_node: bool = False,
        replica_level: str = "passive",
    ) -> "TrainingArguments":
        """Sets what is logged, when and where to; returns the arguments."""
        chosen = IntervalStrategy.read("strategy", strategy)
        _require_steps(chosen, steps)
        trackers = [] if report_to == "none" else [report_to] if isinstance(report_to, str) else report_to
        return _apply(
            self,
            logging_strategy=chosen,
            logging_steps=steps,
            report_to=trackers,
            log_level=level,
            logging_first_step=first_step,
            logging_nan_inf_filter=nan_inf_filter,
            log_on_each_node=on_each_node,
            log_level_replica=replica_level,
        )

    def set_push_to_hub(
        self,
        model_id: str,
        strategy: str | HubStrategy = "every_save",
        token: str | None = None,
        private_repo: bool | None = None,
        always_push: bool = False,
        revision: str | None = None,
    ) -> "TrainingArguments":
        """Turns on pushing to the Hub; returns the arguments."""
        return _apply(
            self,
            push_to_hub=True,
            hub_model_id=model_id,
            hub_strategy=HubStrategy.read("strategy", strategy),
            hub_token=token,
            hub_private_repo=private_repo,
            hub_always_push=always_push,
            hub_revision=revision,
        )

    def set_optimizer(
        self,
        name: str | OptimizerNames = "adamw_torch",
        learning_rate: float = 5e-5,
        weight_decay: float = 0,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        args: str | None = None,
    ) -> "TrainingArguments":
        """Sets the optimizer; returns the arguments."""
        return _apply(
            self,
            optim=OptimizerNames.read("name", name),
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            adam_beta1=beta1,
            adam_beta2=beta2,
            adam_epsilon=epsilon,
            optim_args=args,
        )

    def set_lr_scheduler(
        self,
        name: str | SchedulerType = "linear",
        num_epochs: float = 3.0,
        max_steps: int = -1,
        warmup_steps: float = 0,
    ) -> "TrainingArguments":
        """Sets the learning-rate schedule and the length of the run; returns the arguments."""
        return _apply(
            self,
            lr_scheduler_type=SchedulerType.read("name", name),
            num_train_epochs=num_epochs,
            max_steps=max_steps,
            warmup_steps=warmup_steps,
        )

    def set_dataloader(
        self,
        train_batch_size: int = 8,
        eval_batch_size: int = 8,
        drop_last: bool = False,
        num_workers: int = 0,
        pin_memory: bool = True,
        persistent_workers: bool = False,
        prefetch_factor: int | None = None,
        multiprocessing_context: str | None = None,
        in_order: bool = True,
        auto_find_batch_size: bool = False,
        ignore_data_skip: bool = False,
        sampler_seed: int | None = None,
    ) -> "TrainingArguments":
        """Sets how data is loaded; returns the arguments."""
        return _apply(
            self,
            per_device_train_batch_size=train_batch_size,
            per_device_eval_batch_size=eval_batch_size,
            dataloader_drop_last=drop_last,
            dataloader_num_workers=num_workers,
            dataloader_pin_memory=pin_memory,
            dataloader_persistent_workers=persistent_workers,
            dataloader_prefetch_factor=prefetch_factor,
            dataloader_multiprocessing_context=multiprocessing_context,
            dataloader_in_order=in_order,
            auto_find_batch_size=auto_find_batch_size,
            ignore_data_skip=ignore_data_skip,
            data_seed=sampler_seed,
        )
