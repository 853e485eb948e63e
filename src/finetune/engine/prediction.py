"""The default `prediction_step`: loss, logits and labels of one evaluation batch."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from finetune.engine.divisor import at_least_one
from finetune.engine.gather import detach
from finetune.engine.step import count_items


class PredictionHooks(Protocol):
    """What `predict_batch` may ask of the trainer."""

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]: ...

    def compute_loss_context_manager(self) -> Any: ...

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any: ...


def predict_batch(
    hooks: PredictionHooks,
    model: nn.Module,
    inputs: dict[str, Any],
    *,
    loss_only: bool,
    ignore_keys: list[str] | None,
    label_names: list[str],
    can_return_loss: bool,
    shifts_labels: bool,
    pass_num_items: bool,
) -> tuple[Tensor | None, Any, Any]:
    """Returns (loss, logits, labels), each None where there is none; logits and labels are None with `loss_only`.

    The loss is the mean over this process's items: `compute_loss` is told the count of this batch alone.
    """
    has_labels = bool(label_names) and all(inputs.get(name) is not None for name in label_names)
    return_loss = inputs.get("return_loss")
    wants_loss = has_labels or (not label_names and (can_return_loss if return_loss is None else bool(return_loss)))
    inputs = hooks._prepare_inputs(inputs)
    # Taken first: label smoothing and `compute_loss_func` remove the labels from the inputs.
    labels = detach(tuple(inputs.get(name) for name in label_names)) if wants_loss else None
    if labels is not None and len(labels) == 1:
        labels = labels[0]

    loss = None
    with torch.no_grad(), hooks.compute_loss_context_manager():
        if wants_loss:
            extra: dict[str, Any] = {}
            if pass_num_items:
                count = count_items([inputs], shifts_labels=shifts_labels)
                extra["num_items_in_batch"] = None if count is None else at_least_one(count)
            loss, outputs = hooks.compute_loss(model, inputs, return_outputs=True, **extra)
            loss = loss.detach().mean()
        else:
            outputs = model(**inputs)
    if loss_only:
        return loss, None, None

    dropped = {*(ignore_keys or ()), *(["loss"] if wants_loss else [])}
    if isinstance(outputs, Mapping):
        logits: Any = tuple(value for key, value in outputs.items() if key not in dropped)
    else:
        logits = outputs[1:] if wants_loss else outputs
    logits = detach(logits)
    if isinstance(logits, tuple | list) and len(logits) == 1:
        logits = logits[0]
    return loss, logits, labels
