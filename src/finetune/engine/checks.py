"""What a trainer says before a run: arguments that contradict each other, and what would silently have no effect."""

import inspect
import logging
import warnings
from typing import TYPE_CHECKING, Any

import torch

from finetune.data.loading.position import has_length
from finetune.engine.sum_metrics import SumMetrics
from finetune.errors import ArgumentError

if TYPE_CHECKING:
    from finetune.arguments import TrainingArguments

logger = logging.getLogger(__name__)


def check_combination(trainer: Any, *, is_fsdp: bool) -> None:
    """Raises `ArgumentError` when what a trainer was given contradicts its `args` or itself."""
    args, optimizer, lr_scheduler = trainer.args, trainer.optimizer, trainer.lr_scheduler
    check_eval_dataset(args, trainer.eval_dataset)
    _check_metrics(args, trainer.compute_metrics)
    if not callable(trainer.data_collator):
        raise ArgumentError(
            f"`data_collator` must be callable with a list of rows, got {type(trainer.data_collator).__name__}."
        )
    if trainer.train_dataset is not None and not has_length(trainer.train_dataset) and args.max_steps <= 0:
        raise ArgumentError(
            f"`train_dataset` has no known length and `max_steps` is {args.max_steps}, so the end of the run is "
            "unknown. Set `max_steps` to a positive number of optimizer steps."
        )
    own_optimizer = optimizer is not None or lr_scheduler is not None
    if trainer.optimizer_cls_and_kwargs is not None and optimizer is not None:
        raise ArgumentError("Pass `optimizers` or `optimizer_cls_and_kwargs`, not both.")
    if trainer.model_init is not None and own_optimizer:
        raise ArgumentError(
            "`optimizers` hold parameters of one model, but `model_init` makes a new one for each run. Override "
            "`create_optimizer` and `create_scheduler`, or pass `optimizer_cls_and_kwargs`."
        )
    if is_fsdp and own_optimizer:
        raise ArgumentError(
            "FSDP replaces the parameters that `optimizers` hold. Override `create_optimizer`, or pass "
            "`optimizer_cls_and_kwargs`."
        )
    if trainer.get_cp_size() > 1 or trainer.get_sp_size() > 1:
        raise ArgumentError(
            "`parallelism_config` asks for context or sequence parallelism, which this trainer does not split rows "
            "for. Leave `cp_size` and `sp_size` at 1."
        )


def check_eval_dataset(args: "TrainingArguments", eval_dataset: Any) -> None:
    """Raises `ArgumentError` if `eval_strategy` asks for evaluation and there is nothing to evaluate on."""
    strategy = str(getattr(args.eval_strategy, "value", args.eval_strategy))
    if strategy != "no" and eval_dataset is None:
        raise ArgumentError(
            f"`eval_strategy` is {strategy!r} but there is no `eval_dataset`. Pass one, or set `eval_strategy='no'`."
        )


def _check_metrics(args: "TrainingArguments", compute_metrics: Any) -> None:
    if compute_metrics is None or isinstance(compute_metrics, SumMetrics):
        return
    if not callable(compute_metrics):
        raise ArgumentError(
            f"`compute_metrics` must be a function of an `EvalPrediction`, or have the methods `batch_sums` and "
            f"`from_sums`; got {type(compute_metrics).__name__}."
        )
    if args.batch_eval_metrics and "compute_result" not in inspect.signature(compute_metrics).parameters:
        raise ArgumentError(
            "With `batch_eval_metrics=True`, `compute_metrics` is called for every batch and must take a boolean "
            "`compute_result`, which is True for the last one."
        )


def warn_of_dead_overrides(cls: type) -> None:
    """Warns of methods that transformers calls, or called, and this trainer does not: they would have no effect."""
    for name, instead in DEAD_OVERRIDES.items():
        if name in vars(cls):
            warnings.warn(f"`{cls.__name__}.{name}` is never called here. {instead}", UserWarning, stacklevel=4)


# Overridable in transformers, now or in earlier releases, without a counterpart here: what to override instead.
DEAD_OVERRIDES = {
    "_build_accelerator_args": "Override `create_accelerator_and_postprocess` and set `self.accelerator` there.",
    "_wrap_model": "Override `_prepare_for_training`, or pass a model that is already wrapped.",
    "_run_epoch": "Override `_inner_training_loop`, `get_batch_samples` or `training_step`.",
    "_track_num_input_tokens": "Tokens are counted on the device; override `log` to report others.",
    "_update_auto_batch_size": "Override `_inner_training_loop`, which gets each batch size that is tried.",
    "_prepare_context_parallel_inputs": "There is no context parallelism in this release.",
    "_issue_warnings_after_load": "Override `_load_from_checkpoint`.",
    "_tune_save_checkpoint": "Searches use optuna, not Ray.",
    "_rotate_checkpoints": "Set `save_total_limit`, `keep_last` or `keep_best`, or override `_save_checkpoint`.",
    "_sorted_checkpoints": "Set `save_total_limit`, `keep_last` or `keep_best`, or override `_save_checkpoint`.",
    "_nested_gather": "Set `self.gather_function`.",
    "prediction_loop": "Override `evaluation_loop`.",
}


def warn_of_second_start(run: Any, global_step: int, batch_size: int | None, *, tried: int | None = None) -> None:
    """Warns when `auto_find_batch_size` starts again: the steps get smaller, and updates stay in the weights.

    Args:
        run: that of the start before, None at the first one.
        batch_size: what comes now.
        tried: what did not fit into memory.
    """
    if run is None:
        return
    if batch_size is not None and tried is not None and batch_size < tried:
        logger.warning(
            "`per_device_train_batch_size` %s does not fit into memory: starting again with %s. "
            "`gradient_accumulation_steps` stays at %s, so an optimizer step now has %s rows per process instead of "
            "%s. Raise it to keep the size of a step.",
            tried,
            batch_size,
            run.plan.accumulation,
            batch_size * run.plan.accumulation,
            tried * run.plan.accumulation,
        )
    if global_step > run.initial_step:
        logger.warning(
            "Out of memory after %s updates. Starting again from step %s with `per_device_train_batch_size` %s; the "
            "weights keep those updates. Set that batch size yourself for a run that can be repeated.",
            global_step - run.initial_step,
            run.initial_step,
            batch_size,
        )


def warn_of_idle_devices(args: "TrainingArguments") -> None:
    """Warns when this process, alone, sees several accelerators: it uses one of them only."""
    count = torch.accelerator.device_count() if args.world_size == 1 and args.device.type != "cpu" else 1
    if count > 1:
        logger.warning(
            "%s accelerators are visible and one is used. Start one process for each: `accelerate launch "
            "--num_processes %s script.py`; or show this one only (`CUDA_VISIBLE_DEVICES=0`).",
            count,
            count,
        )


def warn_of_slow_bfloat16(args: "TrainingArguments") -> None:
    """Warns when a run is to compute in bfloat16 on a processor that can only do so a number at a time.

    Measured on an AVX2 processor, products of 2048 x 2048: 0.3 GFLOP/s in bfloat16, 97 in float32.
    """
    asked = args.mixed_precision == "bf16" or args.bf16_full_eval
    if asked and args.device.type == "cpu" and args.process_index == 0 and not cpu_has_bfloat16():
        logger.warning(
            "This processor has no bfloat16 arithmetic (AVX-512 or AMX): training in bf16 takes up to a hundred times "
            "as long as in float32. Leave out `bf16` (`--mixed_precision no` for `accelerate launch`)."
        )


def cpu_has_bfloat16() -> bool:
    """Returns whether torch has fast bfloat16 products for this processor; True where it does not say."""
    ask = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return True if ask is None else bool(ask())
