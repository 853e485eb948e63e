"""One walk over the supervised tokens of a batch: the fused head's loss and gradients, a chunk of logits at a time.

The formulas and the legend (N supervised tokens, C of a chunk, D hidden size, V vocabulary) are those of
`linear_cross_entropy.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

# Bytes of one chunk of logits. Larger chunks read the head's weight fewer times, smaller ones need less memory.
_CHUNK_BYTES = {"cpu": 128 * 2**20, "default": 512 * 2**20}
# Bytes of the rows of a chunk that softmax takes at a time, in float32: what a CPU's cache holds, or bounded memory.
_BLOCK_BYTES = {"cpu": 4 * 2**20, "default": 256 * 2**20}
# fp16 flushes below 6e-8: gradients are lifted by this much between softmax and matmul, and lowered in float32.
_FP16_LIFT = 1024.0


@dataclass(frozen=True)
class HeadOptions:
    """Options of `linear_cross_entropy`, checked."""

    scale: float
    softcap: float | None
    smoothing: float
    z_loss: float
    dft: bool
    entropy: bool
    chunk_tokens: int | None
    repeatable: bool


class HeadPass:
    """One walk over the supervised tokens: sums of the loss and, if needed, its gradients."""

    skips_repeats = False  # see `repeats_skipped`

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        options: HeadOptions,
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
        for start, stop in self._parts(0, total, rows):
            chunk = self.hidden.index_select(0, positions[start:stop]).to(self.dtype)  # (C, D)
            self._project(chunk, logits[: stop - start])
            for low, high in self._parts(start, stop, block):
                part = logits[low - start : high - start]
                values = part if wide is None else self._widened(part, wide[: high - low])
                probs = values if probabilities is None else probabilities[: high - low]
                weights = None if token_weights is None else token_weights[low:high].to(self.sum_dtype)
                self._softmax_and_gradient(values, probs, targets[low:high], weights)
                if self.needs_grad and probs is not part:
                    part.copy_(probs)
            if self.needs_grad:
                self._accumulate(chunk, logits[: stop - start], start, stop)

    def _parts(self, start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
        """Yields the borders of the parts of `size` tokens, in order; the last one may be shorter."""
        starts = range(start, stop, size)
        if self.skips_repeats and len(starts) > 3:
            starts = (starts[0], starts[1], starts[-1])
        for low in starts:
            yield low, min(low + size, stop)

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
        itemsize = 4 if self.dtype == torch.float16 else chunk.element_size()
        width = max(1, _block_bytes(chunk) // (chunk.shape[1] * itemsize))
        for low, high in self._parts(0, d_logits.shape[1], width):
            part = self._product(d_logits[:, low:high].t(), chunk)
            target = self.d_weight[low:high]
            target.copy_(part).div_(self.lift) if first else target.add_(part, alpha=1 / self.lift)

    def _product(self, d_logits: Tensor, chunk: Tensor) -> Tensor:
        """Returns `d_logits` (V, C) times `chunk` (C, D): in float32 for fp16, which ends at 65504.

        The sum over the tokens of lifted gradients passes that as soon as the gradient itself is 64, and no loss scale
        can help, because it comes later.
        """
        if self.dtype != torch.float16:
            return d_logits @ chunk
        if d_logits.device.type == "cuda" and torch.version.hip is None:
            return torch.mm(d_logits, chunk, out_dtype=torch.float32)  # without copies of the operands; AMD has none
        return d_logits.float() @ chunk.float()


@contextmanager
def repeats_skipped() -> Iterator[None]:
    """Context manager for memory traces: of many equal chunks only the first, the second and the last are run.

    The values are wrong then. Memory is not: the first chunk starts the sums, the second one frees what the first one
    left behind, and all others up to the last, which may be shorter, repeat the second.
    """
    before, HeadPass.skips_repeats = HeadPass.skips_repeats, True
    try:
        yield
    finally:
        HeadPass.skips_repeats = before


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


def _block_bytes(tensor: Tensor) -> int:
    return _BLOCK_BYTES.get(tensor.device.type, _BLOCK_BYTES["default"])


def _rows(vocabulary: int, device_type: str, dtype: torch.dtype) -> int:
    return max(16, _CHUNK_BYTES.get(device_type, _CHUNK_BYTES["default"]) // (vocabulary * dtype.itemsize))
