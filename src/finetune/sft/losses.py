"""The SFT losses from full logits: the plain path, for heads that cannot be fused and for callers that want logits.

`kernels/linear_cross_entropy.py` computes the same sums without the logits, and says what they are.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finetune.data.rows import IGNORE_INDEX


@dataclass(frozen=True)
class TokenSums:
    """Sums over the supervised tokens of one batch, on the device: `loss` (with gradient), `count`, `correct`,
    `entropy` (nats; None where nobody computed it)."""

    loss: Tensor
    count: Tensor
    correct: Tensor
    entropy: Tensor | None


def token_sums(
    logits: Tensor,
    labels: Tensor,
    *,
    dft: bool = False,
    label_smoothing: float = 0.0,
    token_weights: Tensor | None = None,
) -> TokenSums:
    """Returns the summed loss of `logits` (B, T, V) against unshifted `labels` (B, T): position i predicts label i + 1.

    With `dft` each token's loss is weighted by its own probability, without gradient through the weight
    (arXiv:2508.05629). `token_weights` (B, T), unshifted as well, multiply the loss of the token they stand at; `count`
    counts tokens, whatever their weights. Logits of virtual tokens before a row (prompt tuning) are left out.
    `labels = [[-100, 7, 3]]` has two supervised tokens, predicted at positions 0 and 1.
    """
    logits = logits[:, logits.shape[1] - labels.shape[1] :]
    kept = labels[:, 1:].ne(IGNORE_INDEX)
    targets = labels[:, 1:][kept]
    scores = logits[:, :-1][kept]  # (N, V), the only ones that are copied
    scores = scores if scores.dtype == torch.float64 else scores.float()
    log_probs = torch.log_softmax(scores, dim=-1)
    nll = -log_probs.gather(1, targets[:, None]).squeeze(1)
    losses = nll
    if label_smoothing:
        losses = (1 - label_smoothing) * nll - label_smoothing * log_probs.mean(dim=-1)
    if dft:
        losses = losses * torch.exp(-nll).detach()
    if token_weights is not None:
        losses = losses * token_weights[:, 1:][kept].to(losses.dtype)
    with torch.no_grad():
        correct = scores.argmax(dim=-1).eq(targets).sum()
        entropy = -log_probs.exp().mul_(log_probs).sum()
    return TokenSums(losses.sum(), kept.sum(), correct, entropy)


def output_sums(outputs: Any, labels: Tensor) -> TokenSums | None:
    """Returns the sums of a model's outputs without gradient: from its logits, else from what Liger's head counted.

    Liger gives the share of right tokens and no entropy; of outputs with neither, nothing is known.
    """
    logits, accuracy = outputs.get("logits"), outputs.get("token_accuracy")
    if logits is not None:
        return token_sums(logits.detach(), labels)
    if accuracy is None:
        return None
    count = labels[:, 1:].ne(IGNORE_INDEX).sum()
    # The share of no tokens at all is not a number.
    correct = torch.where(count > 0, accuracy.detach() * count, 0.0)
    return TokenSums(outputs["loss"].detach(), count, correct, None)
