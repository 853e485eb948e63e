"""The load-balancing loss of mixtures of experts: asked for, weighted and divided as the rest of the loss is.

A mixture-of-experts model adds `its own weight * load-balancing loss` to what it returns, in every micro-batch. Added
up over 4 micro-batches of an optimizer step and multiplied by the processes, as token sums are, that would be 4 times
too much and more. So the model's own weight is 0 while the trainer computes losses, and the trainer adds

    coefficient * auxiliary loss / micro-batches of the step

Gradients are averaged over processes already, so this is the mean over all micro-batches of the step, as in TRL.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

from torch import Tensor, nn

from finetune.errors import ArgumentError
from finetune.models.adapters import unwrap

_WEIGHT = "router_aux_loss_coef"
_ROUTER_OUTPUTS = ("aux_loss", "router_logits")


def router_coefficient(model: nn.Module, given: float | None) -> float | None:
    """Returns the weight of the auxiliary loss: `given`, else the model's own; None for a model without experts.

    Raises:
        ArgumentError: `given` is not 0, and the model has no auxiliary loss whose weight could be set.
    """
    places = _own_weights(model)
    if places:
        owner, name = places[0]
        return float(getattr(owner, name) if given is None else given)
    if given:
        raise ArgumentError(
            f"`router_aux_loss_coef` is {given}, but {type(unwrap(model)).__name__} has no load-balancing loss whose "
            "weight can be set. Drop it: it is for mixtures of experts (Mixtral, Qwen-MoE, OLMoE, ...)."
        )
    return None


@contextmanager
def own_weight_is_zero(model: nn.Module) -> Iterator[None]:
    """Context manager: the model adds nothing to its loss; afterwards it weighs its auxiliary loss as it did."""
    base: Any = unwrap(model)
    before = [(owner, name, getattr(owner, name)) for owner, name in _own_weights(model)]
    for owner, name, value in before:
        # A checkpoint may be written at any time, by another thread, and has to hold the config's own value.
        setattr(owner, name, 0.0 if owner is base else _SavedAs(value))
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


class _SavedAs(float):
    """A 0 whose copies are the number it stands for: a config is copied to be written."""

    saved: float

    def __new__(cls, saved: float) -> "_SavedAs":
        zero = super().__new__(cls, 0.0)
        zero.saved = saved
        return zero

    def __reduce__(self) -> tuple[type, tuple[float]]:
        return float, (self.saved,)


def _own_weights(model: nn.Module) -> list[tuple[Any, str]]:
    """Returns where the forward of `model` reads its weight, as (owner, attribute); [] for a model without experts.

    An attribute of the model, which JetMoE calls otherwise, or the config of the text part (Qwen3-VL-MoE, GLM-4.5V).
    """
    base: Any = unwrap(model)
    config = getattr(base, "config", None)
    text_config = config.get_text_config() if config is not None else None
    if not hasattr(text_config, "output_router_logits"):
        return []
    own = [(base, name) for name in (_WEIGHT, "aux_loss_coef") if hasattr(base, name)]
    if own or not hasattr(text_config, _WEIGHT):
        return own
    return [(text_config, _WEIGHT)] if "output_router_logits" in signature(base.forward).parameters else []


def auxiliary_loss(outputs: Any) -> Tensor | None:
    """Returns the auxiliary loss among a model's outputs, with its gradient."""
    found = outputs.get("aux_loss") if hasattr(outputs, "get") else None
    return found if isinstance(found, Tensor) else None


def without_router_outputs(outputs: Any) -> Any:
    """Returns the outputs as they would be had nobody asked for the routers': predictions are logits alone."""
    return type(outputs)(**{name: value for name, value in outputs.items() if name not in _ROUTER_OUTPUTS})
