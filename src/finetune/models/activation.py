"""Activation checkpointing and the key-value cache as scoped settings: both return to what they were."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from finetune.errors import ArgumentError
from finetune.models.adapters import unwrap

_FLAG = "gradient_checkpointing"
_FUNCTION = "_gradient_checkpointing_func"
_HOOKS = ("_require_grads_hooks", "_require_grads_hook")
# Operators of attention, by parts of their names: torch's, its varlen kernel, and the packages that bring flash-attn.
_ATTENTION = ("aten._scaled_dot_product_", "flash_attn", "_varlen_attn")
_MISSING = object()


@contextmanager
def activation_checkpointing(
    model: nn.Module, enabled: bool = True, kwargs: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Recomputes activations in the backward pass inside the block; afterwards the model is as it was before.

    `kwargs` are `args.activation_checkpointing_kwargs`: `every_n_layers` and `offload` choose where it applies
    (transformers >= 5.22), `selective` keeps what attention returned (TRL's key), the rest goes to
    `torch.utils.checkpoint.checkpoint`. With `enabled=False` nothing happens (a model on which the user switched it on
    himself keeps it). Raises `ArgumentError` for a model without support, or keys that exclude each other.
    """
    if not enabled:
        yield
        return
    target: Any = unwrap(model, keep_adapters=True)
    checkpointed = [module for module in target.modules() if hasattr(module, _FLAG)]
    hooked = [target] if unwrap(target) is target else [target, unwrap(target)]
    before = [(module, _own(module, _FLAG, _FUNCTION)) for module in checkpointed]
    hooks_before = [(module, _own(module, *_HOOKS)) for module in hooked]
    try:
        _enable(target, dict(kwargs or {}))
        yield
    finally:
        for module, attributes in before:
            _put_back(module, attributes)
        for module, attributes in hooks_before:
            kept = {id(hook) for hook in _input_hooks(attributes)}
            for hook in _input_hooks(_own(module, *_HOOKS)):
                if id(hook) not in kept:
                    hook.remove()
            _put_back(module, attributes)


@contextmanager
def use_cache(model: nn.Module, value: bool) -> Iterator[None]:
    """Sets `config.use_cache` inside the block and puts the old value back.

    A cache in training is waste, and in packed rows it is wrong: transformers stops looking for sample boundaries as
    soon as a cache exists, so samples attend to each other without a word.
    """
    config: Any = getattr(unwrap(model), "config", None)
    configs: list[Any] = []
    if config is not None:
        text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
        configs = [config] if text_config is config else [config, text_config]
    before = [getattr(each, "use_cache", _MISSING) for each in configs]
    for each in configs:
        each.use_cache = value
    try:
        yield
    finally:
        for each, old in zip(configs, before, strict=True):
            if old is not _MISSING:
                each.use_cache = old
            elif "use_cache" in each.__dict__:
                delattr(each, "use_cache")


def _enable(target: Any, kwargs: dict[str, Any]) -> None:
    placement = {name: kwargs.pop(name) for name in ("every_n_layers", "offload") if name in kwargs}
    checkpoint_kwargs = _with_selection(kwargs) or None
    try:
        if hasattr(target, "activation_checkpointing_enable"):
            target.activation_checkpointing_enable(activation_checkpointing_kwargs=checkpoint_kwargs, **placement)
        elif hasattr(target, "gradient_checkpointing_enable"):
            target.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpoint_kwargs, **placement)
        else:
            raise ValueError("it has no method `gradient_checkpointing_enable`")
    except (ValueError, TypeError) as error:
        raise ArgumentError(
            f"`activation_checkpointing` was asked for, but {type(target).__name__} refuses it: {error} Set "
            "`activation_checkpointing=False` (`gradient_checkpointing` is the same argument), or correct "
            "`activation_checkpointing_kwargs`."
        ) from error


def _with_selection(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of torch's checkpoint, with `selective` written out.

    Attention is the part of a layer that takes longest to compute again, above all in long rows, and what it returns is
    one hidden state per layer.
    """
    rest = {name: value for name, value in kwargs.items() if name != "selective"}
    if not kwargs.get("selective"):
        return rest
    if rest.get("use_reentrant") or "context_fn" in rest:
        other = "use_reentrant=True" if rest.get("use_reentrant") else "context_fn"
        raise ArgumentError(
            f"`gradient_checkpointing_kwargs` has `selective` and `{other}`, which exclude each other: `selective` is "
            "a `context_fn` of checkpointing that is not reentrant. Drop one of them."
        )
    return {
        **rest,
        "use_reentrant": False,
        "context_fn": partial(create_selective_checkpoint_contexts, _keep_attention),
    }


def _keep_attention(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    name = str(operator)
    is_attention = any(part in name for part in _ATTENTION) and "backward" not in name
    return CheckpointPolicy.MUST_SAVE if is_attention else CheckpointPolicy.PREFER_RECOMPUTE


def _own(module: nn.Module, *names: str) -> dict[str, Any]:
    """Returns what the instance itself, not its class, holds under `names`; `_MISSING` for nothing."""
    return {name: module.__dict__.get(name, _MISSING) for name in names}


def _put_back(module: nn.Module, attributes: dict[str, Any]) -> None:
    for name, value in attributes.items():
        if value is not _MISSING:
            setattr(module, name, value)
        elif name in module.__dict__:
            delattr(module, name)


def _input_hooks(attributes: dict[str, Any]) -> list[Any]:
    many, single = attributes["_require_grads_hooks"], attributes["_require_grads_hook"]
    return list(many) if many is not _MISSING else [] if single is _MISSING else [single]
