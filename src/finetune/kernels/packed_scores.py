"""Scores and values of packed rows, sample by sample: what transformers' attention layers call.

On CPU, samples of similar length share a padded bucket (`packed_buckets.py`); on CUDA a row goes to
`torch.nn.attention.varlen` or flash-attn as it is.

Legend: N tokens, H heads, K key-value heads, D head width.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import ArgumentError
from finetune.kernels.packed_buckets import Scores, attend_by_buckets, written_out

REMEDY = (
    "Set `padding_free=False` and `packing=False` (padded batches are always right), or load the model with "
    "`attn_implementation='flash_attention_2'` on a GPU."
)


class RowsUnderWay:
    """How many backbones are running on packed rows: told to the mask function, which does not see the arguments."""

    count = 0


class _Unsaid:
    """Stands for an argument that the caller does not pass."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | type[_Unsaid] | None = _Unsaid,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Returns (1, N, H, D) and no weights: the function that transformers' attention layers call.

    `query` (1, H, N, D), `key` and `value` (1, K, N, D). `sliding_window` counts the token itself; it is looked up for
    layers that do not pass it. `softcap` caps the scores (Gemma 2); `s_aux` (H) are attention sinks (gpt-oss). Raises
    `ArgumentError` for what it cannot honour.
    """
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    is_packed = cu_seq_lens_q is not None and attention_mask is None
    if isinstance(sliding_window, type):
        sliding_window = _window_of(module) if is_packed else None
    options = Scores(scale, sliding_window, softcap, s_aux, causal, dropout)
    if cu_seq_lens_q is None or attention_mask is not None:
        if RowsUnderWay.count and attention_mask is None:
            raise ArgumentError(
                f"{type(module).__name__} does not receive `cu_seq_lens_q`, so it cannot tell samples apart. {REMEDY}"
            )
        return _ordinary(module, (query, key, value), attention_mask, options, is_causal, kwargs)
    if kwargs.get("position_bias") is not None:
        raise ArgumentError(f"{type(module).__name__} adds a position bias, which packed rows do not have. {REMEDY}")
    query, key, value = (each[0].transpose(0, 1) for each in _autocast((query, key, value)))  # (N, heads, D)
    backend = choose_backend(query, value, options)
    if backend == "buckets":
        return Buckets.attend(query, key, value, cu_seq_lens_q, options)[None], None
    longest = max_length_q if max_length_q is not None else int(cu_seq_lens_q.diff().max())
    return (_flash if backend == "flash" else _varlen)(query, key, value, cu_seq_lens_q, longest, options)[None], None


def _window_of(module: nn.Module) -> int | None:
    """Returns the window of a layer that is not told it, because its model says it in the mask alone (Qwen2-MoE).

    A packed row has no mask, so the window comes from the config: for the layers that `layer_types` names, or for all
    of them (PhiMoE) if the modeling code makes such masks.
    """
    config = getattr(module, "config", None)
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if not window:
        return None
    if kinds is None:
        codes = (sys.modules.get(each.__module__) for each in type(module).__mro__)
        return window if any(hasattr(code, "create_sliding_window_causal_mask") for code in codes) else None
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise ArgumentError(
            f"{type(module).__name__} does not say which layer it is, so whether it has a window is not known. {REMEDY}"
        )
    return window if kinds[layer] == "sliding_attention" else None


def _autocast(tensors: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Returns query, key and value in the dtype of autocast, which the kernels need.

    Rotary embedding leaves queries and keys in float32 beside values in half precision. A CPU has no such kernel, and
    computes short samples in float32 anyway.
    """
    device = tensors[0].device.type
    if device == "cpu" or not torch.is_autocast_enabled(device) or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(each.to(torch.get_autocast_dtype(device)) for each in tensors)


def choose_backend(query: Tensor, value: Tensor, scores: Scores) -> str:
    """Returns "varlen" (torch's CUDA kernel), "flash" (flash-attn) or "buckets" (any device, any option)."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    if query.device.type != "cuda" or not half or scores.sinks is not None or query.shape[-1] != value.shape[-1]:
        return "buckets"
    if query.shape[-1] > 256 or torch.cuda.get_device_capability(query.device) < (8, 0):
        return "buckets"
    if _flash_function() is not None:
        return "flash"
    fits = scores.softcap is None and scores.dropout == 0.0 and (scores.causal or not scores.window)
    fits = fits and query.shape[-1] % 8 == 0  # flash-attn pads other widths by itself
    return "varlen" if fits and _varlen_function() is not None else "buckets"


def _by_buckets(query: Tensor, key: Tensor, value: Tensor, cu_seq_lens: Tensor, scores: Scores) -> Tensor:
    return attend_by_buckets(query, key, value, _boundaries(cu_seq_lens), scores)


class Buckets:
    """How packed rows attend where no kernel takes them: `attend(query, key, value, cu_seq_lens, scores)`."""

    attend: Callable[..., Tensor] = _by_buckets

    @classmethod
    @functools.cache
    def hide_from_compilers(cls) -> None:
        """Keeps `attend` out of compiled code: buckets are other Python numbers in every batch, and a compiler would
        compile each layer again for each of them.

        Not a decorator of the function: that would import torch's compiler, three seconds of an import of this package.
        """
        reason = "the buckets of a packed row differ from batch to batch"
        cls.attend = torch.compiler.disable(_by_buckets, reason=reason)  # pyright: ignore[reportAttributeAccessIssue]


def _boundaries(cu_seq_lens: Tensor) -> tuple[int, ...]:
    """Returns the boundaries as numbers; read from the device once per batch, not once per layer."""
    cached = getattr(cu_seq_lens, "_boundaries", None)
    if cached is None:
        cached = cu_seq_lens._boundaries = tuple(cu_seq_lens.tolist())  # pyright: ignore[reportAttributeAccessIssue]
    return cached


def _varlen(query: Tensor, key: Tensor, value: Tensor, cu: Tensor, longest: int, scores: Scores) -> Tensor:
    function = _varlen_function()
    assert function is not None
    groups = query.shape[1] // key.shape[1]
    grouped = "enable_gqa" in inspect.signature(function).parameters
    if groups > 1 and not grouped:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    window = ((scores.window or 0) - 1, 0) if scores.causal else (-1, -1)
    extra = {"enable_gqa": groups > 1} if grouped else {}
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    return function(query, key, value, cu, cu, longest, longest, scale=scores.scale, window_size=window, **extra)


def _flash(query: Tensor, key: Tensor, value: Tensor, cu: Tensor, longest: int, scores: Scores) -> Tensor:
    function = _flash_function()
    assert function is not None
    near = (scores.window or 0) - 1
    return function(
        query, key, value, cu, cu, longest, longest,
        dropout_p=scores.dropout, softmax_scale=scores.scale, causal=scores.causal,
        window_size=(near, near), softcap=scores.softcap or 0.0,
    )  # fmt: skip


@functools.cache
def _varlen_function() -> Any:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # torch < 2.10
        return None
    return varlen_attn if "window_size" in inspect.signature(varlen_attn).parameters else None


@functools.cache
def _flash_function() -> Any:
    try:
        from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return flash_attn_varlen_func


def _ordinary(
    module: nn.Module,
    tokens: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    scores: Scores,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    """Attention of a call that is not packed: transformers' SDPA, or scores written out where SDPA has no argument."""
    if scores.is_plain:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        options = {"dropout": scores.dropout, "scaling": scores.scale, "is_causal": is_causal}
        return sdpa_attention_forward(module, *tokens, mask, **options, **kwargs)
    query, key, value = tokens
    if mask is None and scores.causal and query.shape[2] > 1:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    return written_out(query, key, value, mask, scores).transpose(1, 2).contiguous(), None
