"""PEFT adapters: wrap a model with them, recognise a wrapped model, and look through the wrapper."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from finetune.errors import ArgumentError, ModelLoadError, first_nearest, one_line
from finetune.wrappers import is_peft_model, unwrap_peft

if TYPE_CHECKING:
    from peft import PeftConfig


def unwrap(model: nn.Module, *, keep_adapters: bool = False) -> nn.Module:
    """Returns the user's model inside DDP, FSDP, DeepSpeed and `torch.compile` wrappers, and inside PEFT's too.

    With `keep_adapters` the PEFT wrapper stays, which is what is saved. Wrappers are told by what they are, not by
    attribute names alone, so a model of the user that has an attribute `module` is left alone.
    """
    while True:
        inner = _inner_module(model)
        if inner is None:
            break
        model = inner
    return model if keep_adapters else unwrap_peft(model)


def _inner_module(model: nn.Module) -> nn.Module | None:
    # A lookup in `_modules`, because PEFT's `__getattr__` would reach through to a compiled model inside it.
    compiled = model._modules.get("_orig_mod")
    if compiled is not None:
        return compiled
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and isinstance(model, fsdp.FullyShardedDataParallel):
        return model._modules["_fsdp_wrapped_module"]
    parallel: tuple[type, ...] = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    deepspeed: Any = sys.modules.get("deepspeed")
    if deepspeed is not None and hasattr(deepspeed, "DeepSpeedEngine"):
        parallel += (deepspeed.DeepSpeedEngine,)
    return model._modules["module"] if isinstance(model, parallel) else None


def is_quantized(model: nn.Module) -> bool:
    """Returns whether bitsandbytes holds the weights in 4 or 8 bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def add_adapters(
    model: nn.Module,
    peft_config: PeftConfig,
    *,
    added_token_ids: Sequence[int] = (),
    zero_stage: int = 0,
    activation_checkpointing: bool = False,
    adapter_dtype: torch.dtype | None = None,
) -> nn.Module:
    """Returns `model` wrapped by PEFT, with the frozen base and the trainable adapters as TRL's SFTTrainer leaves them.

    - `added_token_ids`: tokens new to the vocabulary; their rows of the embedding and the head become trainable.
    - `zero_stage` 3 keeps unquantized adapters in the dtype of the base, because ZeRO-3 gathers one dtype at a time
      (https://github.com/deepspeedai/DeepSpeed/issues/8072).
    - `activation_checkpointing`: the embedding's output is made to require gradients, otherwise a checkpointed frozen
      block cuts the graph (https://github.com/huggingface/transformers/issues/42489).
    - `adapter_dtype`: dtype of the trainable weights on a quantized base. None means bfloat16 where the device
      computes in it (QLoRA, arXiv:2305.14314 section 3) and float32 on CPU. DoRA magnitudes stay as PEFT made them:
      their updates vanish in bfloat16.

    `peft_config` is copied, never changed. Raises `ArgumentError` for a wrapped model or a wrong type, and
    `ModelLoadError` when peft is missing.
    """
    check_peft_config(peft_config, model)
    peft = _import_peft()
    quantized = is_quantized(model)
    config = _with_trainable_tokens(copy.deepcopy(peft_config), added_token_ids, model)
    cast_adapters = not (zero_stage == 3 and not quantized)
    wrapped: Any = _wrapped(peft, model, config, autocast_adapter_dtype=cast_adapters)
    if activation_checkpointing and not _has_input_hook(model):
        wrapped.enable_input_require_grads()
    if quantized:
        _cast_trainable(wrapped, adapter_dtype or _low_bit_adapter_dtype(model))
    return wrapped


def check_peft_config(peft_config: Any, model: Any) -> None:
    """Raises for a `peft_config` that cannot be used with `model`, which may be a name: no weights are read.

    Raises:
        ArgumentError: it is not a `PeftConfig`, or the model has adapters already.
        ModelLoadError: peft is not installed.
    """
    peft = _import_peft()
    if not isinstance(peft_config, peft.PeftConfig):
        raise ArgumentError(
            f"`peft_config` is a {type(peft_config).__name__}; pass a `peft.PeftConfig`, for example "
            "`peft.LoraConfig(task_type='CAUSAL_LM', target_modules='all-linear')`."
        )
    if isinstance(model, nn.Module) and is_peft_model(model):
        raise ArgumentError(
            "`model` already carries PEFT adapters and `peft_config` asks for more. Merge the old ones first "
            "(`model.merge_and_unload()`), or drop `peft_config` to go on training them."
        )


def _wrapped(peft: Any, model: nn.Module, config: Any, **options: Any) -> nn.Module:
    """Returns `model` wrapped by PEFT; raises `ArgumentError` if `target_modules` selects none of its layers."""
    try:
        return peft.get_peft_model(model, config, **options)
    except ValueError as error:
        said = str(error)
        if not any(sign in said for sign in _SIGNS_OF_NO_MATCH):
            raise
        targets = getattr(config, "target_modules", None)
        shown = sorted(targets) if isinstance(targets, (set, list, tuple)) else targets
        problem = "is not set, and PEFT has no default for" if targets is None else f"{shown!r} matches no layer of"
        names = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if _is_linear(module)}
        hint = first_nearest([targets] if isinstance(targets, str) else targets or (), names)
        raise ArgumentError(
            f"`target_modules` {problem} {type(model).__name__}. Its linear layers are {', '.join(sorted(names))}."
            f"{hint} Name some of them, or use 'all-linear'. (PEFT: {one_line(error)})"
        ) from error


# PEFT has a class for this error, but not in all releases.
_SIGNS_OF_NO_MATCH = ("not found in the base model", "No modules were targeted", "Please specify `target_modules`")


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def prepare_quantized(model: nn.Module, *, activation_checkpointing: bool = False) -> nn.Module:
    """Returns a bitsandbytes model made ready for adapters: frozen, and every weight in the dtype it was loaded in.

    Other models, and those that have adapters, are returned as they are. With `activation_checkpointing` the
    embedding's output is made to require gradients; recomputation itself is switched on for the run only
    (`models/activation.py`). `peft.prepare_model_for_kbit_training` would also cast embedding, head and norms to
    float32, which QLoRA does not need and a large vocabulary pays for.
    """
    if not is_quantized(model) or is_peft_model(model):
        return model
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if activation_checkpointing:
        quantized: Any = model
        quantized.enable_input_require_grads()
    return model


def cast_given_adapters(model: nn.Module) -> None:
    """Casts the adapters that a quantized `model` came with as `add_adapters` casts new ones; no other model."""
    if is_peft_model(model) and is_quantized(unwrap_peft(model)):
        _cast_trainable(model, _low_bit_adapter_dtype(model))


def reentrant_checkpointing_kwargs(model: nn.Module, kwargs: dict[str, Any] | None, zero_stage: int) -> dict[str, Any]:
    """Returns the activation-checkpointing arguments that are right for `model`: ZeRO-3 with adapters needs reentrant.

    See https://github.com/huggingface/trl/issues/2514. Raises `ArgumentError` when `use_reentrant=False` or `selective`
    was asked.
    """
    resolved = dict(kwargs or {})
    if not (is_peft_model(model) and zero_stage == 3):
        return resolved
    if resolved.pop("selective", False):
        raise ArgumentError(
            "Adapters under DeepSpeed ZeRO-3 need reentrant checkpointing, which `gradient_checkpointing_kwargs` with "
            "`selective` excludes. Remove `selective`, or use ZeRO-2."
        )
    if resolved.get("use_reentrant") is False:
        raise ArgumentError(
            "Adapters under DeepSpeed ZeRO-3 need reentrant checkpointing, but `gradient_checkpointing_kwargs` says "
            "`use_reentrant=False`. Remove it or set it to true."
        )
    return {**resolved, "use_reentrant": True}


def _has_input_hook(model: nn.Module) -> bool:
    return bool(model.__dict__.get("_require_grads_hooks") or model.__dict__.get("_require_grads_hook"))


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ModelLoadError(
            "Adapters were asked for (`peft_config`) but the package peft is not installed. Install it: "
            "`pip install peft`, or drop `peft_config` to train all weights."
        ) from error
    return peft


def _with_trainable_tokens(config: Any, added_token_ids: Sequence[int], model: nn.Module) -> Any:
    """Returns `config` with new vocabulary rows trainable; as it was if none are or the method has no such field."""
    if not added_token_ids or not hasattr(config, "trainable_token_indices"):
        return config
    new_ids = list(added_token_ids)
    current = config.trainable_token_indices
    if isinstance(current, list):
        config.trainable_token_indices = sorted({*current, *new_ids})
    else:
        current = dict(current or {})
        name = _embedding_name(model)
        current[name] = sorted({*current.get(name, []), *new_ids})
        config.trainable_token_indices = current
    tied = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    if not tied and "lm_head" not in (config.modules_to_save or []):
        config.modules_to_save = [*(config.modules_to_save or []), "lm_head"]
    return config


def _embedding_name(model: Any) -> str:
    embedding = model.get_input_embeddings()
    for name, module in model.named_modules():
        if module is embedding:
            return name.rsplit(".", 1)[-1]
    return "embed_tokens"


def _low_bit_adapter_dtype(model: nn.Module) -> torch.dtype:
    parameter = next(model.parameters())
    return torch.float32 if parameter.device.type == "cpu" else torch.bfloat16


def _cast_trainable(model: nn.Module, dtype: torch.dtype) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_magnitude_vector" not in name:
            parameter.data = parameter.data.to(dtype)
