"""What the training code needs to know about a model, read once and then only passed around."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from finetune.errors import ArgumentError
from finetune.models.adapters import unwrap
from finetune.models.architecture import class_names, image_text_classes
from finetune.wrappers import is_peft_model

_ANSWER_SPAN_LABELS = ("start_positions", "end_positions")


@dataclass(frozen=True)
class ModelTraits:
    """The facts about one model on which losses, collation and token counting depend.

    `label_names` are the batch keys that hold targets. `shifts_labels` says that the loss compares position i with
    label i+1, so label 0 of each row is never a target: a row `labels = [5, 6, -100, 7]` then counts 2 targets (6 and
    7), not 3. `accepts_loss_kwargs` says that `num_items_in_batch` may be passed to `forward`, which then divides a
    sum by it. `can_return_loss` says that `forward(return_loss=True)` yields a loss without any label.
    """

    label_names: tuple[str, ...]
    shifts_labels: bool
    accepts_loss_kwargs: bool
    can_return_loss: bool
    main_input_name: str


def inspect_model(model: nn.Module, label_names: Sequence[str] | None = None) -> ModelTraits:
    """Returns the traits of `model`, whatever wraps it (DDP, FSDP, `torch.compile`, PEFT).

    Agrees with the introspection in the constructor of transformers' Trainer (5.23). `label_names` overrides what is
    found in the signature of `forward`.
    """
    base = unwrap(model)
    class_parameters = _parameters(type(base))
    names = tuple(label_names) if label_names is not None else _find_labels(type(base).__name__, class_parameters)
    is_encoder_decoder = bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))
    return_loss = class_parameters.get("return_loss")
    return ModelTraits(
        label_names=names,
        shifts_labels=_has_causal_loss(base) and not is_encoder_decoder,
        accepts_loss_kwargs=_accepts_loss_kwargs(base),
        can_return_loss=return_loss is not None and return_loss.default is True,
        main_input_name=getattr(base, "main_input_name", "input_ids"),
    )


def saves_itself(model: Any) -> bool:
    """Returns whether `model.save_pretrained` can be trusted with the weights: that of transformers or PEFT is.

    So is one that takes `state_dict` and `is_main_process` by these names. Any other of a hand-written module may
    write what it likes, on every process.
    """
    method = getattr(model, "save_pretrained", None)
    if method is None or is_peft_model(model):
        return method is not None
    kinds = {f"{base.__module__.split('.')[0]}.{base.__name__}" for base in type(model).__mro__}
    return "transformers.PreTrainedModel" in kinds or {"state_dict", "is_main_process"} <= set(
        inspect.signature(method).parameters
    )


def check_trainable(model: nn.Module) -> None:
    """Raises `ArgumentError` for a model that no optimizer step could train as it stands.

    Three cases: a bare backbone without a head (it takes no labels), quantized weights without adapters, and a model
    whose parameters are all frozen.
    """
    kept = unwrap(model, keep_adapters=True)
    base = unwrap(model)
    name = type(base).__name__
    if _is_bare_backbone(name):
        raise ArgumentError(
            f"`model` is a {name}, which returns hidden states and takes no labels. Load it with a head for your "
            "task, for example `AutoModelForCausalLM` or `AutoModelForSequenceClassification`."
        )
    quantizer: Any = getattr(base, "hf_quantizer", None)
    if getattr(base, "is_quantized", False):
        _check_quantized(kept, base, quantizer)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        remedy = (
            "Load the adapter for training: `PeftModel.from_pretrained(model, adapter, is_trainable=True)`, or merge "
            "it into the model (`merge_and_unload()`) and pass that."
            if is_peft_model(kept) or getattr(base, "_hf_peft_config_loaded", False)
            else "Unfreeze some with `requires_grad_(True)` or pass `peft_config`."
        )
        raise ArgumentError(f"Every parameter of `model` ({name}) is frozen, so there is nothing to train. {remedy}")


def takes_argument(model: nn.Module, name: str) -> bool:
    """Returns whether `forward`, as it is now (kernels may have replaced it), names the argument; `**kwargs` do not."""
    return name in inspect.signature(unwrap(model).forward).parameters


def _check_quantized(kept: nn.Module, base: nn.Module, quantizer: Any) -> None:
    has_adapters = is_peft_model(kept) or getattr(base, "_hf_peft_config_loaded", False)
    if hasattr(base, "_orig_mod") and not has_adapters:
        raise ArgumentError(
            "`model` is quantized and compiled; pass it before `torch.compile` and set `torch_compile` instead."
        )
    if not has_adapters and not getattr(quantizer, "is_qat_trainable", False):
        raise ArgumentError(
            "`model` is quantized and has no adapters, and quantized weights receive no gradient. Pass `peft_config` "
            "(for example `peft.LoraConfig(task_type='CAUSAL_LM')`), or load the model without `quantization_config`."
        )
    if quantizer is not None and not quantizer.is_trainable:
        method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", "its quantization")
        raise ArgumentError(
            f"Models quantized with {method} cannot be trained, not even through adapters. Load `model` with another "
            "`quantization_config`, for example `BitsAndBytesConfig(load_in_4bit=True)`."
        )


def _parameters(model_class: type[nn.Module]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(model_class.forward).parameters)


def _find_labels(class_name: str, parameters: Iterable[str]) -> tuple[str, ...]:
    spans = _ANSWER_SPAN_LABELS if "QuestionAnswering" in class_name else ()
    return tuple(name for name in parameters if "label" in name or name in spans)


def _accepts_loss_kwargs(base: nn.Module) -> bool:
    declared = getattr(base, "accepts_loss_kwargs", None)
    if declared is not None:
        return bool(declared)
    kinds = (parameter.kind for parameter in inspect.signature(base.forward).parameters.values())
    return inspect.Parameter.VAR_KEYWORD in kinds


def _has_causal_loss(base: nn.Module) -> bool:
    loss_type = getattr(base, "loss_type", None)
    if loss_type is None:
        return False
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    return LOSS_MAPPING.get(loss_type) is ForCausalLMLoss


def _is_bare_backbone(class_name: str) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    # The mapping calls Llama 4 with its head a backbone.
    return class_name in class_names(MODEL_MAPPING_NAMES) - image_text_classes()


def max_positions(model: Any) -> int | None:
    """Returns how many tokens a row of `model` may have, None where its config sets no limit.

    RoBERTa's positions start behind the padding token: of 514 it can use 512.
    """
    config: Any = getattr(unwrap(model), "config", None)
    positions = getattr(config, "max_position_embeddings", None)
    if not positions or positions < 0:
        return None
    return positions - (2 if "roberta" in str(getattr(config, "model_type", "")) else 0)


def learned_positions(model: Any) -> int | None:
    """Returns the tokens that a row may have for a model with a learned vector per position (GPT-2, OPT), else None.

    Rotary positions have no such end.
    """
    tables = ("wpe", "embed_positions", "position_embeddings")
    modules = unwrap(model).named_modules()
    learned = any(isinstance(each, nn.Embedding) and name.rpartition(".")[2] in tables for name, each in modules)
    return max_positions(model) if learned else None
