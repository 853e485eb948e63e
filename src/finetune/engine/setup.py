"""What the constructor of a trainer decides: the model, the collator, and which arguments contradict each other."""

import contextlib
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from finetune.data.position import has_length
from finetune.engine.step import LabelSmoother
from finetune.engine.streaming import SumMetrics
from finetune.errors import ArgumentError, nearest
from finetune.models.adapters import unwrap
from finetune.models.traits import ModelTraits

if TYPE_CHECKING:
    from finetune.arguments import TrainingArguments

logger = logging.getLogger(__name__)


def resolve_model(model: Any, model_init: Callable[..., Any] | None) -> nn.Module:
    """Returns the model to train, from exactly one of `model` and `model_init`."""
    if (model is None) == (model_init is None):
        given = "neither" if model is None else "both"
        raise ArgumentError(f"Pass either `model` or `model_init`; {given} was given.")
    if model is None:
        assert model_init is not None
        model = call_model_init(model_init, None)
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"`model` must be a `torch.nn.Module`, got {type(model).__name__}. `SFTTrainer` and "
            "`SequenceClassificationTrainer` also take a model id or folder."
        )
    return model


def call_model_init(model_init: Callable[..., Any], trial: Any) -> nn.Module:
    """Returns `model_init()` or `model_init(trial)`, depending on how many arguments it takes."""
    takes = len(inspect.signature(model_init).parameters)
    if takes > 1:
        raise ArgumentError(f"`model_init` takes no argument or one (the trial), this one takes {takes}.")
    model = model_init(trial) if takes else model_init()
    if model is None:
        raise ArgumentError("`model_init` returned None; it must return a model.")
    return model


def default_collator(processing_class: Any) -> Callable[[list[Any]], dict[str, Any]]:
    """Returns transformers' padding collator for a tokenizer, its stacking collator otherwise."""
    from transformers import DataCollatorWithPadding, default_data_collator

    if hasattr(processing_class, "pad"):
        return DataCollatorWithPadding(processing_class)
    return default_data_collator


def label_smoother(args: "TrainingArguments", model: nn.Module) -> LabelSmoother | None:
    """Returns the smoother for `label_smoothing_factor`, None when it is 0.

    Labels are shifted for decoder-only language models, as transformers does by class name.
    """
    if args.label_smoothing_factor == 0:
        return None
    base = unwrap(model)
    if getattr(getattr(base, "config", None), "problem_type", None) == "multi_label_classification":
        raise ArgumentError(
            "`label_smoothing_factor` is for one class per row; this model's `problem_type` is "
            "multi_label_classification. Set `label_smoothing_factor=0`."
        )
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = {
        name
        for value in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        for name in ([value] if isinstance(value, str) else value)
    }
    return LabelSmoother(args.label_smoothing_factor, shift_labels=type(base).__name__ in names)


def check_combination(trainer: Any, *, is_fsdp: bool) -> None:
    """Raises `ArgumentError` when what a trainer was given contradicts its `args` or itself."""
    args, optimizer, lr_scheduler = trainer.args, trainer.optimizer, trainer.lr_scheduler
    if str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no" and trainer.eval_dataset is None:
        raise ArgumentError(
            f"`eval_strategy` is {getattr(args.eval_strategy, 'value', args.eval_strategy)!r} but there is no "
            "`eval_dataset`. Pass one, or set `eval_strategy='no'`."
        )
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
    """Warns of methods that transformers calls, or called, and this trainer does not: they would silently not act."""
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


def warn_of_second_start(run: Any, global_step: int, batch_size: int | None) -> None:
    """Warns when `auto_find_batch_size` starts again after updates were made: they stay in the weights."""
    if run is not None and global_step > run.initial_step:
        logger.warning(
            "Out of memory after %s updates. Starting again from step %s with `per_device_train_batch_size` %s; the "
            "weights keep those updates. Set that batch size yourself for a run that can be repeated.",
            global_step - run.initial_step,
            run.initial_step,
            batch_size,
        )


def set_log_level(args: "TrainingArguments") -> None:
    """Makes this package and transformers speak from `log_level` on (`log_level_replica` on other processes)."""
    from transformers.utils import logging as transformers_logging

    level = args.get_process_log_level()
    transformers_logging.set_verbosity(level)
    ours = logging.getLogger("finetune")
    ours.setLevel(level)
    if level < logging.WARNING and not ours.hasHandlers():
        # Python's handler of last resort drops everything below a warning.
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("[%(levelname)s] %(message)s"))
        ours.addHandler(handler)


def tensor_parallel_size(model: Any, args: "TrainingArguments", accelerator: Any) -> int:
    """Returns over how many processes the model's layers are split: said by the model, DeepSpeed or accelerate."""
    if (size := getattr(model, "_tp_size", None)) is not None:
        return size
    deepspeed = getattr(args, "hf_deepspeed_config", None)
    if deepspeed is not None and getattr(accelerator.state, "deepspeed_plugin", None) is not None:
        return deepspeed.config.get("tensor_parallel", {}).get("autotp_size", 1)
    return getattr(getattr(accelerator, "parallelism_config", None), "tp_size", 1)


@contextlib.contextmanager
def underflow_debugger(model: nn.Module, debug: Any) -> Iterator[None]:
    """Within, reports where activations overflow, if `debug` asks for `underflow_overflow`; no hook stays behind."""
    if "underflow_overflow" not in [str(option) for option in debug or ()]:
        yield
        return
    from transformers.debug_utils import DebugUnderflowOverflow

    before = {module: list(module._forward_hooks) for module in model.modules()}
    DebugUnderflowOverflow(model)
    try:
        yield
    finally:
        for module, known in before.items():
            for key in [key for key in module._forward_hooks if key not in known]:
                del module._forward_hooks[key]


def token_counter(
    args: "TrainingArguments", traits: ModelTraits, processing_class: Any
) -> Callable[[dict[str, Any]], Any] | None:
    """Returns the function that counts a batch's input tokens (`include_num_input_tokens_seen`), or None.

    `all` counts padding too: a batch of shape (2, 5) has 10. `non_padding` sums `attention_mask`, or counts the ids
    that are not the pad token. The count may be a device tensor.
    """
    mode = args.include_num_input_tokens_seen
    if mode in ("no", False, None):
        return None
    name, pad_id = traits.main_input_name, getattr(processing_class, "pad_token_id", None)

    def count(inputs: dict[str, Any]) -> Any:
        if name not in inputs:
            raise ArgumentError(
                f"`include_num_input_tokens_seen` counts the batch entry `{name}`, but batches hold {sorted(inputs)}. "
                "Set `include_num_input_tokens_seen='no'` or the model's `main_input_name`."
            )
        if mode == "non_padding":
            if "attention_mask" in inputs:
                return inputs["attention_mask"].sum()
            if pad_id is not None and "cu_seq_lens_q" not in inputs:
                return (inputs[name] != pad_id).sum()
        return inputs[name].numel()

    return count


def accept_old_names(given: dict[str, Any], processing_class: Any, constructor: Callable[..., Any]) -> Any:
    """Returns the processing class, from its old name `tokenizer` too.

    Raises:
        ArgumentError: any other unknown keyword, or both names at once.
    """
    given = dict(given)
    tokenizer = given.pop("tokenizer", None)
    if given:
        allowed = [name for name in inspect.signature(constructor).parameters if name != "old_names"]
        unknown = next(iter(given))
        raise ArgumentError(f"Unknown argument `{unknown}`.{nearest(unknown, allowed)} Allowed: {', '.join(allowed)}.")
    if tokenizer is None:
        return processing_class
    if processing_class is not None:
        raise ArgumentError("`tokenizer` is the old name of `processing_class`; pass one of them.")
    warnings.warn("`tokenizer` is now called `processing_class`.", FutureWarning, stacklevel=4)
    return tokenizer


def seed_everything(args: "TrainingArguments") -> None:
    """Seeds Python, numpy and torch with `args.seed`; with `full_determinism` also forbids nondeterministic kernels."""
    from transformers import enable_full_determinism, set_seed

    (enable_full_determinism if args.full_determinism else set_seed)(args.seed)


def is_model_parallel(model: nn.Module, args: "TrainingArguments") -> bool:
    """Returns whether a device map spread the model over several devices, or put it elsewhere than `args.device`."""
    device_map = getattr(model, "hf_device_map", None)
    if not device_map:
        return False
    devices = {device for device in device_map.values() if device not in ("cpu", "disk")}
    return len(devices) > 1 or (len(devices) == 1 and args.device != torch.device(*devices))


def places_model(
    args: "TrainingArguments", model: nn.Module, *, parallel: bool, is_deepspeed: bool, is_fsdp: bool
) -> bool:
    """Returns whether the trainer moves the model to `args.device`, instead of whoever shards or quantised it."""
    if args.place_model_on_device is not None:
        return bool(args.place_model_on_device)
    sharded_at_load = getattr(model, "is_distributed_loading_by_transformers", False)
    return not (parallel or is_deepspeed or is_fsdp or args.fp16_full_eval or args.bf16_full_eval or sharded_at_load)


def move_model(model: nn.Module, device: torch.device) -> None:
    """Moves a model to `device` in place; bitsandbytes models stay, and tied weights are tied again."""
    if getattr(model, "quantization_method", None) == "bitsandbytes":
        return
    model.to(device)
    if hasattr(model, "tie_weights") and device.type == "xla":
        model.tie_weights()  # pyright: ignore[reportCallIssue]
