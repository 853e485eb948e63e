"""Attention of a packed row in buckets: samples of similar length are padded together, and computed as one batch.

One gather in and one out per call; any device, any kind of score. Soft-capped scores and attention sinks are written
out, because SDPA has no argument for them.

Legend: N tokens, B samples of a bucket, L its longest sample, H heads, D head width.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

# A bucket may hold samples down to this share of its longest, so padding costs little and calls are few.
_BUCKET_SHARE = 0.8
_ALWAYS_TOGETHER = 32
# Up to this length a CPU computes bfloat16 attention faster, and better, in float32: 6.9 against 11.7 ms for 8 samples
# of 96 tokens and 6 heads, forward and backward, 8.5 against 9.5 ms for 3 of 200; from 450 on there is no difference.
_WIDE_ON_CPU = 256


@dataclass(frozen=True)
class Scores:
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


def attend_by_buckets(query: Tensor, key: Tensor, value: Tensor, boundaries: tuple[int, ...], scores: Scores) -> Tensor:
    """Returns (N, H, D). Tokens are gathered once into buckets, padded at the end, and scattered back once.

    Padding sits behind the real tokens, where causal attention never looks; without causality the keys are masked.
    """
    plan = plan_of(boundaries)
    gather, scatter = plan.on(query.device)
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


def _attend_wide(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scores: Scores) -> Tensor:
    """As `_attend`, in float32 inside; returns bfloat16."""
    with torch.autocast("cpu", enabled=False):
        return _attend(query.float(), key.float(), value.float(), lengths, scores).bfloat16()


def _attend(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scores: Scores) -> Tensor:
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
    return written_out(query, key, value, mask, scores)


def written_out(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scores: Scores) -> Tensor:
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


def _mask(lengths: Sequence[int], scores: Scores, device: torch.device) -> Tensor | None:
    """Returns what may be attended, True, broadcastable to (B, H, L, L); None if causality or nothing says it all."""
    length = lengths[0]
    position = torch.arange(length, device=device)
    distance = position[:, None] - position  # query - key
    if scores.causal:
        return (distance >= 0) & (distance < scores.window) if scores.window and length > scores.window else None
    mask = None
    if lengths[-1] != length:
        mask = (position < _lengths_on(tuple(lengths), device)[:, None])[:, None, None, :]
    if scores.window and length > scores.window:
        near = distance.abs() < scores.window
        # A padded query far behind its sample would see nothing and turn into NaN: let each query see itself.
        mask = near if mask is None else (near & mask) | (distance == 0)
    return mask


@functools.lru_cache(maxsize=256)
def _lengths_on(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(lengths, device=device)


@dataclass(frozen=True)
class Plan:
    """Where each token goes: `gather` (sum of B x L) into padded buckets, `scatter` (N) back."""

    buckets: tuple[tuple[int, ...], ...]  # lengths of the samples of each bucket, the longest first
    sizes: list[int]
    gather: Tensor
    scatter: Tensor
    _copies: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns `gather` and `scatter` on `device`: copied once a row, not once a layer, because a copy waits."""
        if device not in self._copies:
            with torch.inference_mode(False):  # a training step may come next, and save them for its backward pass
                self._copies[device] = (self.gather.to(device, copy=True), self.scatter.to(device, copy=True))
        return self._copies[device]


@functools.lru_cache(maxsize=32)
def plan_of(boundaries: tuple[int, ...]) -> Plan:
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
    return Plan(buckets, [len(b) * b[0] for b in buckets], torch.cat(gather), scatter)
