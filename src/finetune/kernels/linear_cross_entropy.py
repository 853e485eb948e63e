"""Output projection and cross-entropy in one pass over the supervised tokens, on any device, in plain torch.

The ordinary path computes logits for every position (tokens x vocabulary), then log-probabilities of the same size,
then gradients of the same size. Here only supervised positions are projected, a chunk of them at a time, and each
chunk's gradients are taken before its logits are overwritten by the next chunk's. Peak memory is one chunk of logits
plus the gradient of the head; accuracy and entropy come from the same pass.

Legend: T positions, N supervised ones among them, C tokens of a chunk, D hidden size, V vocabulary size.

For a supervised token with hidden state h (D) and label y, with l = softcap(scale * (W h + b)), p = softmax(l):

    nll = logsumexp(l) - l[y]
    loss = weight * dft * ((1 - s) * nll + s * mean_v(-log p[v])) + z * logsumexp(l)^2,   dft = p[y] or 1
    dloss/dl = weight * dft * (p - (1 - s) * onehot(y) - s / V) + 2 z logsumexp(l) * p

Sources: chunked head and loss as in Wijmans et al., "Cut Your Losses" (arXiv:2411.09009) and Hsu et al., "Liger
Kernel" (arXiv:2410.10989); z-loss as in PaLM (arXiv:2204.02311); DFT as in Wu et al. (arXiv:2508.05629).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finetune.errors import ArgumentError
from finetune.kernels.head_pass import HeadOptions, HeadPass, compute_dtype

IGNORE_INDEX = -100


@dataclass(frozen=True)
class HeadLoss:
    """Sums over the supervised tokens of one batch, as 0-d tensors on its device.

    `loss` carries the gradient. The others are for logging and carry none: `count` (int64), `nll` (negative
    log-likelihood, which is `loss` without smoothing, DFT, weights or z-loss), `correct` (int64: tokens whose label has
    the highest logit, ties included) and `entropy` (of the predicted distributions, 0 unless asked for). Divide
    by `count`, or by the count of the global batch.
    """

    loss: Tensor
    count: Tensor
    nll: Tensor
    correct: Tensor
    entropy: Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    dft: bool = False,
    token_weights: Tensor | None = None,
    entropy: bool = True,
    ignore_index: int = IGNORE_INDEX,
    positions: Tensor | None = None,
    chunk_tokens: int | None = None,
    repeatable_backward: bool = False,
) -> HeadLoss:
    """Returns the summed loss of the head `weight` on `hidden` without building the logits of more than one chunk.

    Labels are aligned with `hidden`: label i is what position i predicts (shift before calling). For
    `labels = [-100, 7, -100, 3]` two rows of `hidden` are projected and `count` is 2.

    Args:
        hidden: (..., D), floating point.
        weight: (V, D). May be tied to the embedding. No gradient is computed for it if it requires none (LoRA).
        labels: (...), int64; `ignore_index` where untrained.
        bias: (V), added before scaling.
        scale: multiplies the logits (Cohere's `logit_scale`; for Granite 1 / `logits_scaling`).
        softcap: logits become `softcap * tanh(logits / softcap)` after scaling (Gemma 2).
        label_smoothing: share in [0, 1) that goes to the uniform distribution over the vocabulary.
        z_loss: coefficient of logsumexp(logits)^2, which keeps logits from drifting.
        dft: weighs each token by its own probability, without gradient through the weight.
        token_weights: (...), per-token factor of the loss (not of the z-loss); default 1.
        entropy: also sum the entropies, at the price of one more pass over each chunk.
        positions: (N,), indices of the supervised tokens in flattened `labels`, if known; saves looking for them.
        chunk_tokens: tokens per chunk; by default as many as fit in a fixed number of bytes.
        repeatable_backward: keep the gradients intact in `backward`, so that it can run twice on one graph; costs
            one more copy of the head's gradient while it runs.

    Under autocast the products run in its dtype, as the model's own head would; softmax and sums are float32
    (float64 for float64 inputs), and the head's gradient accumulates in float32. Gradients are first-order.

    Raises:
        ArgumentError: shapes or options that do not fit together.
    """
    _check(hidden, weight, labels, label_smoothing, dft, softcap)
    flat_hidden, flat_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).to(hidden.device)
    if positions is None:
        positions = flat_labels.ne(ignore_index).nonzero().squeeze(1)
    targets = flat_labels.index_select(0, positions)
    weights = None
    if token_weights is not None:
        weights = token_weights.to(hidden.device).reshape(-1).index_select(0, positions)
    options = HeadOptions(scale, softcap, label_smoothing, z_loss, dft, entropy, chunk_tokens, repeatable_backward)
    loss, nll, correct, entropies = _LinearCrossEntropy.apply(
        flat_hidden, weight, bias, targets, positions, weights, options, torch.is_grad_enabled()
    )  # pyright: ignore[reportGeneralTypeIssues]
    count = torch.full((), targets.shape[0], dtype=torch.int64, device=hidden.device)
    return HeadLoss(loss, count, nll, correct, entropies)


def reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    dft: bool = False,
    token_weights: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> HeadLoss:
    """Returns what `linear_cross_entropy` returns, from full logits and by autograd: the definition to meet."""
    kept = labels.reshape(-1).ne(ignore_index)
    logits = torch.nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), weight, bias)[kept]
    logits = logits.double() if hidden.dtype == torch.float64 else logits.float()
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    targets = labels.reshape(-1)[kept]
    log_p = logits.log_softmax(-1)
    nll = -log_p.gather(1, targets[:, None]).squeeze(1)
    loss = (1 - label_smoothing) * nll - label_smoothing * log_p.mean(-1)
    if dft:
        loss = loss * nll.detach().neg().exp()
    if token_weights is not None:
        loss = loss * token_weights.reshape(-1)[kept]
    loss = loss + z_loss * logits.logsumexp(-1).square()
    correct = (
        logits.detach().gather(1, targets[:, None]).squeeze(1).eq(logits.detach().amax(-1))
        if len(targets)
        else kept[:0]
    )
    entropies = -(log_p.exp() * log_p).sum(-1)
    return HeadLoss(loss.sum(), kept.sum(), nll.sum().detach(), correct.sum(), entropies.sum().detach())


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float, dft: bool, softcap: float | None) -> None:
    if hidden.shape[:-1] != labels.shape:
        raise ArgumentError(
            f"`labels` have shape {tuple(labels.shape)} and `hidden` {tuple(hidden.shape)}; expected one label per "
            f"position, {tuple(hidden.shape[:-1])}."
        )
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ArgumentError(
            f"`weight` has shape {tuple(weight.shape)}; expected (vocabulary, {hidden.shape[-1]}) for `hidden` of "
            f"shape {tuple(hidden.shape)}. A sharded weight has to be gathered first."
        )
    if not 0.0 <= smoothing < 1.0:
        raise ArgumentError(f"`label_smoothing` is {smoothing}; allowed are 0 <= label_smoothing < 1.")
    if dft and smoothing:
        raise ArgumentError("`dft` weighs by the label's own probability, which smoothing blurs. Use one of the two.")
    if softcap is not None and softcap <= 0:
        raise ArgumentError(f"`softcap` is {softcap}; it must be positive, or None for no capping.")


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are computed in `forward` for an incoming gradient of 1; `backward` multiplies them by the real one."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        positions: Tensor,
        token_weights: Tensor | None,
        options: HeadOptions,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        needs = tuple(grad_enabled and each for each in ctx.needs_input_grad[:3])
        dtype = compute_dtype(hidden, weight)  # asks autocast, so before it is switched off
        with torch.autocast(hidden.device.type, enabled=False):
            work = HeadPass(hidden, weight, bias, options, dtype, needs)
            work.run(targets, positions, token_weights)
        ctx.options, ctx.hidden_shape, ctx.hidden_dtype = options, hidden.shape, hidden.dtype
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        ctx.positions, ctx.gradients, ctx.spent = positions, (work.d_hidden, work.d_weight, work.d_bias), False
        outputs = work.loss, work.nll, work.correct, work.entropy
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        if ctx.spent:
            raise RuntimeError(
                "backward ran a second time through one fused loss, whose gradients the first run consumed. Call "
                "`linear_cross_entropy(..., repeatable_backward=True)` if the graph has to be kept."
            )
        keep, grad = ctx.options.repeatable, grads[0]
        d_hidden, d_weight, d_bias = ctx.gradients
        if not keep:
            ctx.spent, ctx.gradients = True, None
        full = None
        if d_hidden is not None:
            rows = (d_hidden * grad).to(ctx.hidden_dtype)
            if rows.shape[0] == ctx.hidden_shape[0]:
                full = rows
            else:
                full = rows.new_zeros(ctx.hidden_shape).index_copy_(0, ctx.positions, rows)
        scaled = [None if each is None else each * grad if keep else each.mul_(grad) for each in (d_weight, d_bias)]
        d_weight, d_bias = (None if s is None else s.to(t) for s, t in zip(scaled, ctx.dtypes, strict=True))
        return full, d_weight, d_bias, None, None, None, None, None
