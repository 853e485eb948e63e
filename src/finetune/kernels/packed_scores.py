"""Scores and values of packed rows, sample by sample: what transformers' attention layers call.

On CPU, samples of similar length share a padded bucket (one gather in, one out); on CUDA a row goes to
`torch.nn.attention.varlen` or flash-attn as it is. Soft-capped scores and attention sinks are written out per bucket.

Legend: N tokens, S samples, B samples of a bucket, L its longest sample, H heads, K key-value heads, D head width.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import ArgumentError

REMEDY = (
    "Set `padding_free=False` and `packing=False` (padded batches are always right), or load the model with "
    "`attn_implementation='flash_attention_2'` on a GPU."
)
# A bucket may hold samples down to this share of its longest, so padding costs little and calls are few.
_BUCKET_SHARE = 0.8
_ALWAYS_TOGETHER = 32
# Up to this length a CPU computes bfloat16 attention faster, and better, in float32: 6.9 against 11.7 ms for 8 samples
# of 96 tokens and 6 heads, forward and backward, 8.5 against 9.5 ms for 3 of 200; from 450 on there is no difference.
_WIDE_ON_CPU = 256


class RowsUnderWay:
    """How many backbones are running on packed rows: told to the mask function, which does not see the arguments."""

    count = 0


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Returns (1, N, H, D) and no weights: the function that transformers' attention layers call.

    `query` (1, H, N, D), `key` and `value` (1, K, N, D). `sliding_window` counts the token itself; `softcap` caps the
    scores (Gemma 2); `s_aux` (H) are attention sinks (gpt-oss). Raises `ArgumentError` for what it cannot honour.
    """
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    options = _Scores(scale, sliding_window, softcap, s_aux, causal, dropout)
    if cu_seq_lens_q is None or attention_mask is not None:
        if RowsUnderWay.count and attention_mask is None:
            raise ArgumentError(
                f"{type(module).__name__} does not receive `cu_seq_lens_q`, so it cannot tell samples apart. {REMEDY}"
            )
        return _ordinary(module, (query, key, value), attention_mask, options, is_causal, kwargs)
    if kwargs.get("position_bias") is not None:
        raise ArgumentError(f"{type(module).__name__} adds a position bias, which packed rows do not have. {REMEDY}")
    query, key, value = (each[0].transpose(0, 1) for each in (query, key, value))  # (N, heads, D)
    backend = choose_backend(query, value, options)
    if backend == "buckets":
        return _by_buckets(query, key, value, _boundaries(cu_seq_lens_q), options)[None], None
    longest = max_length_q if max_length_q is not None else int(cu_seq_lens_q.diff().max())
    return (_flash if backend == "flash" else _varlen)(query, key, value, cu_seq_lens_q, longest, options)[None], None


@dataclass(frozen=True)
class _Scores:
    """How scores are made: scaled, capped, windowed, with sinks."""

    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None
    causal: bool
    dropout: float

    @property
    def is_plain(self) -> bool:
        return self.softcap is None and self.sinks is None


def choose_backend(query: Tensor, value: Tensor, scores: _Scores) -> str:
    """Returns "varlen" (torch's CUDA kernel), "flash" (flash-attn) or "buckets" (any device, any option)."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    if query.device.type != "cuda" or not half or scores.sinks is not None or query.shape[-1] != value.shape[-1]:
        return "buckets"
    if query.shape[-1] > 256 or torch.cuda.get_device_capability(query.device) < (8, 0):
        return "buckets"
    if _flash_function() is not None:
        return "flash"
    fits = scores.softcap is None and scores.dropout == 0.0 and (scores.causal or scores.window is None)
    return "varlen" if fits and _varlen_function() is not None else "buckets"


def _by_buckets(query: Tensor, key: Tensor, value: Tensor, boundaries: tuple[int, ...], scores: _Scores) -> Tensor:
    """Returns (N, H, D). Tokens are gathered once into buckets, padded at the end, and scattered back once.

    Padding sits behind the real tokens, where causal attention never looks; without causality the keys are masked.
    """
    plan = _plan(boundaries)
    gather, scatter = plan.gather.to(query.device), plan.scatter.to(query.device)
    parts = [each.index_select(0, gather).split(plan.sizes) for each in (query, key, value)]
    outputs: list[Tensor] = []
    for bucket, (q, k, v) in zip(plan.buckets, zip(*parts, strict=True), strict=True):
        rows, length = len(bucket), bucket[0]
        q, k, v = (each.view(rows, length, *each.shape[1:]).transpose(1, 2) for each in (q, k, v))
        attended = _attend_wide(q, k, v, bucket, scores) if _is_wide(q, length) else _attend(q, k, v, bucket, scores)
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, scatter)


def _is_wide(query: Tensor, length: int) -> bool:
    """Returns whether samples of `length` tokens are computed in float32 although bfloat16 was asked for."""
    if query.device.type != "cpu" or length > _WIDE_ON_CPU:
        return False
    asked = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    return asked == torch.bfloat16


def _attend_wide(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scores: _Scores) -> Tensor:
    """As `_attend`, in float32 inside; returns bfloat16."""
    with torch.autocast("cpu", enabled=False):
        return _attend(query.float(), key.float(), value.float(), lengths, scores).bfloat16()


def _attend(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scores: _Scores) -> Tensor:
    """Returns (B, H, L, D) for one bucket of samples, the longest first."""
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    mask = _mask(lengths, scores, query.device)
    if scores.is_plain:
        return nn.functional.scaled_dot_product_attention(
            query,
            key if groups == 1 else key.repeat_interleave(groups, 1),
            value if groups == 1 else value.repeat_interleave(groups, 1),
            attn_mask=mask,
            dropout_p=scores.dropout,
            is_causal=scores.causal and mask is None and length > 1,
            scale=scores.scale,
        )
    if scores.causal and mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    return _written_out(query, key, value, mask, scores)


def _written_out(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scores: _Scores) -> Tensor:
    """Returns (B, H, Lq, D) from explicit scores (B, H, Lq, Lk), for what SDPA has no argument for: caps and sinks."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    weights = (query @ key.transpose(2, 3)) * scores.scale
    if scores.softcap is not None:
        weights = scores.softcap * torch.tanh(weights / scores.softcap)
    if mask is not None:
        weights = weights.masked_fill(~mask, torch.finfo(weights.dtype).min)
    weights = weights.float() if weights.dtype != torch.float64 else weights
    if scores.sinks is not None:
        sinks = scores.sinks.to(weights.dtype).view(1, -1, 1, 1).expand(*weights.shape[:3], 1)
        weights = torch.cat([weights, sinks], -1).softmax(-1)[..., :-1]
    else:
        weights = weights.softmax(-1)
    return nn.functional.dropout(weights.to(query.dtype), scores.dropout, training=scores.dropout > 0) @ value


def _mask(lengths: Sequence[int], scores: _Scores, device: torch.device) -> Tensor | None:
    """Returns what may be attended, True, broadcastable to (B, H, L, L); None if causality or nothing says it all."""
    length = lengths[0]
    position = torch.arange(length, device=device)
    distance = position[:, None] - position  # query - key
    if scores.causal:
        return (distance >= 0) & (distance < scores.window) if scores.window and length > scores.window else None
    mask = None
    if lengths[-1] != length:
        mask = (position < torch.tensor(lengths, device=device)[:, None])[:, None, None, :]
    if scores.window and length > scores.window:
        near = distance.abs() < scores.window
        # A padded query far behind its sample would see nothing and turn into NaN: let each query see itself.
        mask = near if mask is None else (near & mask) | (distance == 0)
    return mask


@dataclass(frozen=True)
class _Plan:
    """Where each token goes: `gather` (sum of B x L) into padded buckets, `scatter` (N) back."""

    buckets: tuple[tuple[int, ...], ...]  # lengths of the samples of each bucket, the longest first
    sizes: list[int]
    gather: Tensor
    scatter: Tensor


@functools.lru_cache(maxsize=32)
def _plan(boundaries: tuple[int, ...]) -> _Plan:
    """Returns the buckets of one row.

    boundaries (0, 3, 4, 6), lengths 3, 1, 2: one bucket, padded to 3 each, longest first: tokens 0 1 2 | 4 5 5 | 3 3 3.
    `gather` = [0, 1, 2, 4, 5, 5, 3, 3, 3]; `scatter` = [0, 1, 2, 6, 3, 4].
    """
    samples = [(start, stop) for start, stop in itertools.pairwise(boundaries) if start < stop]
    groups: list[list[tuple[int, int]]] = []
    for start, stop in sorted(samples, key=lambda each: each[0] - each[1]):
        longest = groups[-1][0][1] - groups[-1][0][0] if groups else 0
        if groups and (stop - start >= _BUCKET_SHARE * longest or longest <= _ALWAYS_TOGETHER):
            groups[-1].append((start, stop))
        else:
            groups.append([(start, stop)])
    gather: list[Tensor] = []
    scatter = torch.empty(boundaries[-1], dtype=torch.int64)
    offset = 0
    for group in groups:
        length = group[0][1] - group[0][0]
        for start, stop in group:
            gather.append(torch.arange(start, start + length).clamp(max=stop - 1))
            scatter[start:stop] = torch.arange(offset, offset + stop - start)
            offset += length
    buckets = tuple(tuple(stop - start for start, stop in group) for group in groups)
    return _Plan(buckets, [len(b) * b[0] for b in buckets], torch.cat(gather), scatter)


def _boundaries(cu_seq_lens: Tensor) -> tuple[int, ...]:
    """Returns the boundaries as numbers; read from the device once per batch, not once per layer."""
    cached = getattr(cu_seq_lens, "_boundaries", None)
    if cached is None:
        cached = cu_seq_lens._boundaries = tuple(cu_seq_lens.tolist())  # pyright: ignore[reportAttributeAccessIssue]
    return cached


def _varlen(query: Tensor, key: Tensor, value: Tensor, cu: Tensor, longest: int, scores: _Scores) -> Tensor:
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


def _flash(query: Tensor, key: Tensor, value: Tensor, cu: Tensor, longest: int, scores: _Scores) -> Tensor:
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
    scores: _Scores,
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
    return _written_out(query, key, value, mask, scores).transpose(1, 2).contiguous(), None
