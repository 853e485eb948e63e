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

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finetune.errors import ArgumentError

IGNORE_INDEX = -100

# Bytes of one chunk of logits. Larger chunks read the head's weight fewer times, smaller ones need less memory.
_CHUNK_BYTES = {"cpu": 128 * 2**20, "default": 512 * 2**20}
# Bytes of the rows of a chunk that softmax takes at a time, in float32: what a CPU's cache holds, or bounded memory.
_BLOCK_BYTES = {"cpu": 4 * 2**20, "default": 256 * 2**20}
# fp16 flushes below 6e-8: gradients are lifted by this much between softmax and matmul, and lowered in float32.
_FP16_LIFT = 1024.0


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


@dataclass(frozen=True)
class _Options:
    scale: float
    softcap: float | None
    smoothing: float
    z_loss: float
    dft: bool
    entropy: bool
    chunk_tokens: int | None
    repeatable: bool


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
    flat_hidden, flat_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    flat_labels = flat_labels.to(hidden.device)
    if positions is None:
        positions = flat_labels.ne(ignore_index).nonzero().squeeze(1)
    targets = flat_labels.index_select(0, positions)
    weights = None
    if token_weights is not None:
        weights = token_weights.to(hidden.device).reshape(-1).index_select(0, positions)
    options = _Options(scale, softcap, label_smoothing, z_loss, dft, entropy, chunk_tokens, repeatable_backward)
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
        options: _Options,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        needs = tuple(grad_enabled and each for each in ctx.needs_input_grad[:3])
        dtype = _compute_dtype(hidden, weight)  # asks autocast, so before it is switched off
        with torch.autocast(hidden.device.type, enabled=False):
            work = _Pass(hidden, weight, bias, options, dtype, needs)
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


class _Pass:
    """One walk over the supervised tokens: sums of the loss and, if needed, its gradients."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        options: _Options,
        dtype: torch.dtype,
        needs: tuple[bool, ...],
    ) -> None:
        self.hidden, self.weight, self.options, self.dtype = hidden, weight.to(dtype), options, dtype
        self.bias = None if bias is None else bias.to(dtype)
        self.sum_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.needs_hidden, self.needs_weight, self.needs_bias = needs
        self.needs_grad = any(needs)
        self.lift = _FP16_LIFT if dtype == torch.float16 else 1.0
        zero = torch.zeros((), dtype=self.sum_dtype, device=hidden.device)
        self.loss, self.nll, self.entropy = zero.clone(), zero.clone(), zero.clone()
        self.correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        self.d_hidden: Tensor | None = None
        sums = {"dtype": self.sum_dtype, "device": hidden.device}
        # The first chunk overwrites it.
        self.d_weight = torch.empty(weight.shape, **sums) if self.needs_weight else None
        self.d_bias = torch.zeros(weight.shape[0], **sums) if self.needs_bias else None

    def run(self, targets: Tensor, positions: Tensor, token_weights: Tensor | None) -> None:
        """Fills the sums and gradients from all tokens, one chunk after the other in the same two buffers."""
        total, (vocabulary, width) = targets.shape[0], self.weight.shape
        if self.needs_hidden:
            self.d_hidden = torch.empty(total, width, dtype=self.sum_dtype, device=self.hidden.device)
        if total == 0:
            if self.d_weight is not None:
                self.d_weight.zero_()
            return
        rows = self.options.chunk_tokens or _rows(vocabulary, self.hidden.device.type, self.dtype)
        rows = math.ceil(total / math.ceil(total / rows))
        block = min(rows, max(1, _block_bytes(self.hidden) // (vocabulary * self.sum_dtype.itemsize)))
        # What the products write and read: logits, then their gradients. Wide copies exist of one block at a time.
        logits = torch.empty(rows, vocabulary, dtype=self.dtype, device=self.hidden.device)
        is_wide, shape = self.dtype == self.sum_dtype, {"dtype": self.sum_dtype, "device": self.hidden.device}
        wide = None if is_wide else torch.empty(block, vocabulary, **shape)
        # Probabilities overwrite the logits unless something still needs the logits afterwards.
        keeps_logits = self.options.entropy or (self.options.softcap is not None and self.needs_grad)
        probabilities = torch.empty(block, vocabulary, **shape) if keeps_logits else None
        for start in range(0, total, rows):
            stop = min(start + rows, total)
            chunk = self.hidden.index_select(0, positions[start:stop]).to(self.dtype)  # (C, D)
            self._project(chunk, logits[: stop - start])
            for low in range(start, stop, block):
                high = min(low + block, stop)
                part = logits[low - start : high - start]
                values = part if wide is None else self._widened(part, wide[: high - low])
                probs = values if probabilities is None else probabilities[: high - low]
                weights = None if token_weights is None else token_weights[low:high].to(self.sum_dtype)
                self._softmax_and_gradient(values, probs, targets[low:high], weights)
                if self.needs_grad and probs is not part:
                    part.copy_(probs)
            if self.needs_grad:
                self._accumulate(chunk, logits[: stop - start], start, stop)

    def _project(self, chunk: Tensor, logits: Tensor) -> None:
        """Writes `chunk @ weight.T + bias` into `logits` (C, V), scaled already if they are wide."""
        scale = self.options.scale if self.dtype == self.sum_dtype else 1.0
        if self.bias is None:
            torch.addmm(logits, chunk, self.weight.t(), beta=0, alpha=scale, out=logits)
        else:
            torch.addmm(self.bias, chunk, self.weight.t(), beta=scale, alpha=scale, out=logits)  # pyright: ignore

    def _widened(self, logits: Tensor, wide: Tensor) -> Tensor:
        """Returns one block in float32. The product was rounded, as by the model's own head; the rest is not."""
        wide.copy_(logits)
        return wide.mul_(self.options.scale) if self.options.scale != 1.0 else wide

    def _softmax_and_gradient(self, logits: Tensor, probs: Tensor, targets: Tensor, weights: Tensor | None) -> None:
        """Adds one block's sums; leaves d loss / d (logits before scaling) in `probs` if gradients are needed."""
        options, column = self.options, targets[:, None]
        if options.softcap is not None:
            logits.div_(options.softcap).tanh_().mul_(options.softcap)
        peak = logits.amax(-1, keepdim=True)  # (C, 1)
        at_label = logits.gather(1, column)
        self.correct += at_label.eq(peak).sum()
        mean_logit = logits.mean(-1, keepdim=True) if options.smoothing else None
        shifted = logits.sub_(peak)
        torch.exp(shifted, out=probs)
        total = probs.sum(-1, keepdim=True)
        log_total = total.log()
        lse = log_total + peak
        nll = lse - at_label
        self.nll += nll.sum()
        if options.entropy:
            expected = torch.bmm(probs[:, None, :], shifted[:, :, None]).squeeze(-1) / total
            self.entropy += (log_total - expected).sum()
        factor = nll.neg().exp() if options.dft else torch.ones_like(nll)
        if weights is not None:
            factor = factor * weights[:, None]
        loss = nll if mean_logit is None else lse - (1 - options.smoothing) * at_label - options.smoothing * mean_logit
        loss = factor * loss
        if options.z_loss:
            loss = loss + options.z_loss * lse.square()
        self.loss += loss.sum()
        if not self.needs_grad:
            return
        weight_of_p = factor + 2 * options.z_loss * lse if options.z_loss else factor
        probs.mul_(weight_of_p / total)
        if options.smoothing:
            probs.sub_(factor * (options.smoothing / logits.shape[1]))
        probs.scatter_add_(1, column, factor * (options.smoothing - 1))
        if options.softcap is not None:
            # d tanh: 1 - (l / cap)^2, with l = shifted + peak.
            slope = shifted.add_(peak).div_(options.softcap).square_().neg_().add_(1)
            probs.mul_(slope)
        if options.scale * self.lift != 1.0:
            probs.mul_(options.scale * self.lift)

    def _accumulate(self, chunk: Tensor, d_logits: Tensor, start: int, stop: int) -> None:
        """Adds one chunk to the gradients; the head's in float32 whatever the products run in."""
        if self.d_bias is not None:
            self.d_bias.add_(d_logits.sum(0, dtype=self.sum_dtype), alpha=1 / self.lift)
        if self.d_hidden is not None:
            if self.dtype == self.sum_dtype:
                torch.mm(d_logits, self.weight, out=self.d_hidden[start:stop])
            else:
                self.d_hidden[start:stop] = d_logits @ self.weight
                if self.lift != 1.0:
                    self.d_hidden[start:stop] /= self.lift
        if self.d_weight is None:
            return
        first = start == 0
        if self.dtype == self.sum_dtype:
            torch.addmm(self.d_weight, d_logits.t(), chunk, beta=0 if first else 1, out=self.d_weight)
            return
        # A block of the vocabulary at a time: the product stays in the cache until it is added.
        width = max(1, _block_bytes(chunk) // (chunk.shape[1] * chunk.element_size()))
        for low in range(0, d_logits.shape[1], width):
            part = d_logits[:, low : low + width].t() @ chunk
            target = self.d_weight[low : low + width]
            target.copy_(part).div_(self.lift) if first else target.add_(part, alpha=1 / self.lift)


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


def _block_bytes(tensor: Tensor) -> int:
    return _BLOCK_BYTES.get(tensor.device.type, _BLOCK_BYTES["default"])


def _rows(vocabulary: int, device_type: str, dtype: torch.dtype) -> int:
    return max(16, _CHUNK_BYTES.get(device_type, _CHUNK_BYTES["default"]) // (vocabulary * dtype.itemsize))
