"""What the constructor of a trainer decides: the model, its place, and which arguments contradict each other."""

import contextlib
import inspect
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import nn

from finetune.arguments.base import old_names_of
from finetune.distributed.accelerator import zero_stage
from finetune.engine.step import LabelSmoother
from finetune.errors import ArgumentError, nearest
from finetune.models.adapters import unwrap
from finetune.models.architecture import class_names, image_text_classes
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


def label_smoother(args: "TrainingArguments", model: nn.Module) -> LabelSmoother | None:
    """Returns the smoother for `label_smoothing_factor`, None when it is 0.

    Labels are shifted for decoder-only language models by class name, as transformers does, and for those that take
    images too, whose own loss shifts them as well.
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

    shifted = class_names(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if not getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        shifted |= image_text_classes()
    return LabelSmoother(args.label_smoothing_factor, shift_labels=type(base).__name__ in shifted)


def name_or_model(model: Any) -> Any:
    """Returns `model`, a path as text: a model is told from its name by the type."""
    return os.fspath(model) if isinstance(model, os.PathLike) else model


def folder_for(model: Any, purpose: str) -> str:
    """Returns the `output_dir` of a trainer that was given no arguments: `<model name>-<purpose>`, here."""
    name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
    return f"{(name or type(model).__name__).rstrip('/').split('/')[-1]}-{purpose}"


def make_output_dir(args: "TrainingArguments") -> None:
    """Makes the folder of the run, on the process that saves. Where it cannot be made, `train` says so.

    Evaluation needs none, so it is not an error before.
    """
    if args.should_save and args.output_dir is not None:
        with contextlib.suppress(OSError):
            os.makedirs(args.output_dir, exist_ok=True)


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
    if deepspeed is not None and zero_stage(accelerator) is not None:
        return deepspeed.config.get("tensor_parallel", {}).get("autotp_size", 1)
    return getattr(getattr(accelerator, "parallelism_config", None), "tp_size", 1)


@contextlib.contextmanager
def underflow_debugger(model: nn.Module, debug: Any) -> Iterator[None]:
    """Context manager: reports where activations overflow, if `debug` asks for it; no hook stays behind."""
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


class OldNames(TypedDict, total=False):
    """Keywords of former releases that the constructors of the trainers still take."""

    tokenizer: Any


def accept_old_names(
    given: Mapping[str, Any], processing_class: Any, constructor: Callable[..., Any], config: type
) -> Any:
    """Returns the processing class, from its old name `tokenizer` too. `config` is the class of the trainer's `args`.

    Raises:
        ArgumentError: any other unknown keyword, or both names at once.
    """
    given = dict(given)
    tokenizer = given.pop("tokenizer", None)
    if given:
        allowed = [name for name in inspect.signature(constructor).parameters if name != "old_names"]
        unknown = next(iter(given))
        if unknown in {*config.__dataclass_fields__, *old_names_of(config)}:  # pyright: ignore
            names = ", ".join(f"{name}=..." for name in given)
            raise ArgumentError(
                f"`{unknown}` is an argument of the configuration, not of the trainer: "
                f"`args={config.__name__}({names})`."
            )
        raise ArgumentError(f"Unknown argument `{unknown}`.{nearest(unknown, allowed)} Allowed: {', '.join(allowed)}.")
    if tokenizer is None:
        return processing_class
    if processing_class is not None:
        raise ArgumentError("`tokenizer` is the old name of `processing_class`; pass one of them.")
    warnings.warn("`tokenizer` is now called `processing_class`.", FutureWarning, stacklevel=4)
    return tokenizer


def seed_everything(args: "TrainingArguments") -> None:
    """Seeds Python, numpy and torch with `args.seed`; with `full_determinism` also forbids nondeterministic kernels."""
    if args.full_determinism:
        from transformers import enable_full_determinism as seed
    else:
        # As transformers' `set_seed`, which lies in a module that imports peft and bitsandbytes: seconds of each start.
        from accelerate.utils import set_seed as seed
    seed(args.seed)


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
    """Moves a model to `device` in place, and ties weights again where that parts them.

    What was placed when it was loaded stays there: a model with a device map, one of bitsandbytes.
    """
    if getattr(model, "hf_device_map", None) is not None or getattr(model, "quantization_method", "") == "bitsandbytes":
        return
    model.to(device)
    if hasattr(model, "tie_weights") and device.type == "xla":
        model.tie_weights()  # pyright: ignore[reportCallIssue]
