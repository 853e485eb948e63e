"""Who divides a loss by the items of the whole batch: found out from the first batch, because signatures lie."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from finetune.distributed import ranks


def at_least_one(num_items: Any) -> Any:
    """Returns what to divide a sum over `num_items` by: the number, or 1 for no items, whose sum is 0.

    >>> at_least_one(torch.tensor(0)), at_least_one(3)
    (tensor(1), 3)
    """
    return num_items + (num_items == 0)


class LossDivisor:
    """Whether a model divides its loss by `num_items_in_batch`, found out from the first training batch.

    Many models take the argument and drop it: every `...ForSequenceClassification`, BERT, and most hand-written ones
    with `**kwargs` average over their own micro-batch. transformers believes the signature, so with accumulation over
    A micro-batches their gradients are A times too large. Here the count is passed as a tensor that asks for a
    gradient: if the loss does not depend on it, the model averaged, and the mean is weighted by hand.

    FSDP and DeepSpeed (`sharded`) take every backward pass, and inputs that ask for a gradient, for their own. There
    the loss of the first batch is computed twice more, without gradients and from one random state: for the count and
    for its double.
    """

    def __init__(self, *, sharded: bool = False) -> None:
        self.model_divides: bool | None = None
        self._sharded = sharded

    def probe(self, num_items: Any, loss_for: Callable[[Any], Tensor]) -> Any:
        """Returns what to pass to the model: the count, traceable while the answer is unknown.

        `loss_for` returns the model's loss for a count. A collective for sharded models.
        """
        if self.model_divides is not None or not torch.is_grad_enabled():
            return num_items
        if not self._sharded:
            return torch.as_tensor(num_items).float().requires_grad_()
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        losses = []
        with torch.no_grad():
            for factor in (1, 2):
                with torch.random.fork_rng(devices):
                    losses.append(loss_for(num_items * factor).detach())
        # A batch without labels has the loss 0 or 0/0, which tells nothing: 0 unknown, 1 averages, 2 divides.
        telling = torch.isfinite(losses[0]) & (losses[0] != 0)
        answer = int(ranks.highest(telling * (1 + (losses[0] != losses[1]).int())))
        self.model_divides = None if answer == 0 else answer == 2
        return num_items

    def correct(self, loss: Tensor, passed: Any, num_items: Any, local_items: Callable[[], Any]) -> Tensor:
        """Returns `loss` as a share of the global batch: unchanged, or a mean times `local_items / num_items`.

        The mean over no items is 0/0, and its share 0.
        """
        if self.model_divides is None and isinstance(passed, Tensor) and passed.requires_grad:
            depends = torch.autograd.grad(loss, passed, retain_graph=True, allow_unused=True)[0]
            self.model_divides = depends is not None
        if self.model_divides is False and torch.is_grad_enabled():
            items = torch.as_tensor(local_items(), device=loss.device)
            return torch.where(items > 0, loss * (items / num_items), 0.0)
        return loss


class DivisionCheck:
    """Says so, once, when an overridden `compute_loss` ignores `num_items_in_batch` although that decides its scale.

    transformers takes such a loss for one that was divided by the whole batch's count: over A micro-batches its
    gradients are A times too large. So it is here, because an override may well have divided by A itself.

    Models of FSDP and DeepSpeed are not checked: these take every backward pass for their own.
    """

    def __init__(self, *, sharded: bool = False) -> None:
        self.done = sharded

    def pass_on(self, num_items: Any) -> Any:
        """Returns the count to pass to `compute_loss`, traceable the first time."""
        return num_items if self.done or num_items is None else torch.as_tensor(num_items).float().requires_grad_()

    def look_at(self, loss: Tensor, num_items: Any, accumulation: int, owner: str) -> None:
        """Warns if `loss` does not depend on `num_items`, as returned by `pass_on`."""
        if self.done or num_items is None:
            return
        self.done = True
        if torch.autograd.grad(loss, num_items, retain_graph=True, allow_unused=True)[0] is None:
            warnings.warn(
                f"`{owner}.compute_loss` does not use `num_items_in_batch`. If it returns a mean over the micro-batch, "
                f"its gradients are {accumulation} times too large under `gradient_accumulation_steps={accumulation}`: "
                f"set `loss_is_scaled_for_ga = False` on `{owner}`. Set it to True if the loss is divided already.",
                UserWarning,
                stacklevel=2,
            )
