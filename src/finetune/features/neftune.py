"""NEFTune: noise on the embeddings while training (Jain et al., arXiv:2310.05914), scaled per sample.

The paper draws noise from Uniform(-1, 1) and scales it by alpha / sqrt(L d), L being the length of the sample and d the
embedding width. With padded or packed rows the row's length is not the sample's: three samples of 100 tokens packed
into one row of 300 would get noise sqrt(3) times too weak, a sample of 100 padded to 400 half of what it should be.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import ArgumentError
from finetune.wrappers import unwrap_peft


@contextmanager
def neftune(model: nn.Module, alpha: float) -> Iterator[None]:
    """Adds noise to the input embeddings of `model` inside the block, in training mode only; leaves no trace.

    `model` is what the user owns (a PEFT wrapper included, DDP not). Sample lengths come from the arguments of its
    forward pass: `cu_seq_lens_q`, else a 2-D `attention_mask`, else `position_ids` that restart. Without any of them,
    and for rows without padding, noise equals transformers' `neftune_noise_alpha` to the bit. One draw per forward
    pass from the global generator of the device, so a resumed run draws the same.

    Raises `ArgumentError` if `alpha` is negative or the model has no input embedding.
    """
    if alpha < 0:
        raise ArgumentError(f"`neftune_noise_alpha` is {alpha}; it must be 0 or more (5 to 15 in the paper).")
    lengths = _Lengths()
    base = unwrap_peft(model)
    embedding = base.get_input_embeddings() if hasattr(base, "get_input_embeddings") else None
    if not isinstance(embedding, nn.Module):
        raise ArgumentError(
            f"`neftune_noise_alpha` needs a model with input embeddings, and {type(base).__name__} has none. "
            "Set it to None."
        )

    def add_noise(module: nn.Module, _: Any, embedded: Tensor) -> Tensor:
        if not module.training:
            return embedded
        tokens, width = embedded.size(1), embedded.size(2)
        # Rounded like transformers, which divides by a float32 square root.
        bound = float(alpha / torch.sqrt(torch.tensor(tokens * width)))
        noise = torch.zeros_like(embedded).uniform_(-bound, bound)
        per_sample = lengths.of(embedded)
        if per_sample is not None:
            noise = noise * (tokens / per_sample).sqrt().to(noise.dtype).unsqueeze(-1)
        return embedded + noise

    handles = [
        model.register_forward_pre_hook(lengths.remember, with_kwargs=True),
        model.register_forward_hook(lengths.forget, always_call=True),
        embedding.register_forward_hook(add_noise),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def sample_lengths(
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens: Tensor | None = None,
    shape: tuple[int, int],
) -> Tensor | None:
    """Returns the length of the sample each row or token belongs to: (B, 1) or (B, T), float32; None if unknown.

    >>> sample_lengths(position_ids=torch.tensor([[0, 1, 2, 0, 1]]), shape=(1, 5))
    tensor([[3., 3., 3., 2., 2.]])
    >>> sample_lengths(attention_mask=torch.tensor([[1, 1, 0]]), shape=(1, 3))
    tensor([[2.]])

    Nothing here reads the device from the host.
    """
    batch, tokens = shape
    if cu_seq_lens is not None and batch == 1:
        # One slot more than tokens, because the last boundary is the end of the row.
        starts = torch.zeros(1, tokens + 1, dtype=torch.int64, device=cu_seq_lens.device)
        starts[0, cu_seq_lens.long()] = 1
        return _segment_lengths(starts[:, :tokens])
    if attention_mask is not None:
        if attention_mask.ndim != 2 or tuple(attention_mask.shape) != shape:
            return None
        return attention_mask.sum(1, keepdim=True).clamp(min=1).float()
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[1] != tokens:
        return None
    starts = torch.ones_like(position_ids, dtype=torch.int64)
    starts[:, 1:] = (position_ids[:, 1:] - position_ids[:, :-1]).ne(1)
    return _segment_lengths(starts.expand(batch, tokens))


def _segment_lengths(starts: Tensor) -> Tensor:
    """Returns, for each token (B, T), how many tokens lie between the nearest starts around it."""
    segment = starts.cumsum(1) - starts[:, :1]
    counts = torch.zeros(starts.shape, dtype=torch.float32, device=starts.device)
    counts.scatter_add_(1, segment, torch.ones_like(counts))
    return counts.gather(1, segment)


class _Lengths:
    """The arguments of the forward pass under way from which sample lengths are known."""

    def __init__(self) -> None:
        self._arguments: dict[str, Any] = {}

    def remember(self, _: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
        cu_seq_lens = kwargs.get("cu_seq_lens_q", kwargs.get("cu_seq_lens"))
        self._arguments = {
            "attention_mask": kwargs.get("attention_mask"),
            "position_ids": kwargs.get("position_ids"),
            "cu_seq_lens": cu_seq_lens,
        }

    def forget(self, *_: Any) -> None:
        self._arguments = {}

    def of(self, embedded: Tensor) -> Tensor | None:
        return sample_lengths(**self._arguments, shape=(embedded.size(0), embedded.size(1)))
