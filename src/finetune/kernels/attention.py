"""Attention within the samples of a packed row, without FlashAttention and without a row-by-row mask.

A padding-free batch is one row of N tokens holding S samples; `cu_seq_lens_q = [0, 3, 5]` says that tokens 0-2 are one
sample and 3-4 another. transformers' SDPA path builds an N x N mask for it, and a cache or an all-ones mask silently
switches even that off, so that samples attend to each other. Here one function, registered with transformers under the
name `finetune_packed`, computes each sample for itself: work and memory grow with the sum of squared lengths, not with
the square of the sum. Calls without `cu_seq_lens_q` (padded batches, generation) take the ordinary SDPA path.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from finetune.errors import ArgumentError
from finetune.kernels.packed_scores import REMEDY, Buckets, RowsUnderWay, packed_attention
from finetune.wrappers import unwrap_peft

ATTENTION_NAME = "finetune_packed"
# Same scores by other kernels, so packed attention may stand for them. Whatever else a user registers it may not.
_REPLACEABLE = frozenset({"eager", "sdpa", "flex_attention", ATTENTION_NAME})


class PackedAttention:
    """The handle of one model with packed attention: `remove()` gives it back its own attention."""

    def __init__(self, model: nn.Module, backbone: nn.Module, configs: list[Any]) -> None:
        self._before = [(config, config._attn_implementation) for config in configs]
        for config in configs:
            config._attn_implementation = ATTENTION_NAME
        self._entered = False
        self._hooks = [
            backbone.register_forward_pre_hook(self._enter, with_kwargs=True),
            backbone.register_forward_hook(self._leave, always_call=True),
        ]

    def remove(self) -> None:
        """Restores the attention implementation, also in the middle of a forward pass. Safe to call twice."""
        self._leave()
        hooks, self._hooks = self._hooks, []
        before, self._before = self._before, []
        for hook in hooks:
            hook.remove()
        # The outer configuration first: setting it sets those inside it too.
        for config, implementation in before:
            config._attn_implementation = implementation

    def __enter__(self) -> PackedAttention:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _enter(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        self._leave()
        if kwargs.get("cu_seq_lens_q") is None:
            return None
        for name in ("attention_mask", "past_key_values"):
            if kwargs.get(name) is not None:
                raise ArgumentError(
                    f"a packed row (`cu_seq_lens_q`) came with `{name}`, and only one of them can say what attends to "
                    f"what. Leave `{name}` out of padding-free batches."
                )
        self._entered = True
        RowsUnderWay.count += 1
        return args, {**kwargs, "use_cache": False}

    def _leave(self, *_: Any) -> None:
        # Ctrl-C skips all hooks after a forward pass, so the next pass and `remove` call this too.
        if self._entered:
            self._entered = False
            RowsUnderWay.count -= 1


def use_packed_attention(model: nn.Module) -> PackedAttention:
    """Switches `model` (a PEFT wrapper is looked through) to packed attention; returns the handle that undoes it.

    Raises `ArgumentError` with the reason of `packed_unsupported_reason`. Whether the model keeps samples apart
    everywhere else too (convolutions, recurrences, remote code) is what `probe_isolation` is for.
    """
    reason = packed_unsupported_reason(model)
    if reason is not None:
        raise ArgumentError(f"samples of a packed row cannot be kept apart in this model: {reason}. {REMEDY}")
    register_packed_attention()
    base = unwrap_peft(model)
    return PackedAttention(base, backbone_of(base), configs_of(base))


def packed_unsupported_reason(model: nn.Module) -> str | None:
    """Returns why packed attention cannot serve `model`, as the end of a sentence, or None."""
    base = unwrap_peft(model)
    name = type(base).__name__
    if not hasattr(base, "config") or not hasattr(base, "base_model_prefix"):
        return f"{name} is not a transformers model"
    if getattr(base.config, "is_encoder_decoder", False):
        return f"{name} is an encoder-decoder"
    implementations = {getattr(config, "_attn_implementation", None) or "eager" for config in configs_of(base)}
    own = {each for each in implementations - _REPLACEABLE if "flash" not in each}
    if own:
        return f"its attention is {', '.join(map(repr, sorted(own)))}, which packed attention would replace"
    kinds = {kind for config in configs_of(base) for kind in getattr(config, "layer_types", None) or ()}
    other = kinds - {"full_attention", "sliding_attention", "attention"}
    if other:
        return f"it has layers of the kind {', '.join(sorted(other))}, whose state runs through the whole row"
    if not getattr(base, "_supports_attention_backend", False):
        return f"{name} does not take its attention function from transformers' AttentionInterface"
    parameters = inspect.signature(type(backbone_of(base)).forward).parameters.values()
    if inspect.Parameter.VAR_KEYWORD not in {each.kind for each in parameters}:
        return f"the forward of {type(backbone_of(base)).__name__} does not hand `cu_seq_lens_q` on to its attention"
    return None


def _packed_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' mask function for this attention: none for a packed row, SDPA's (always explicit) otherwise."""
    if RowsUnderWay.count:
        return None
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(*args, **kwargs)


def register_packed_attention() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    Buckets.hide_from_compilers()
    AttentionInterface.register(ATTENTION_NAME, packed_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, _packed_mask)


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Context manager: puts all modules of `model` into one mode; afterwards each is in its own again."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def backbone_of(base: Any) -> Any:
    return base.base_model


def configs_of(base: nn.Module) -> list[Any]:
    """Returns the config objects that the attention layers of `base` read their implementation from."""
    found = {id(m.config): m.config for m in base.modules() if hasattr(getattr(m, "config", None), "model_type")}
    return list(found.values())
