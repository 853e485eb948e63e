"""What a model does to its logits between head and loss: read from its config, and watched while it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import ArgumentError

REMEDY = "Use the plain loss for this model: pass `compute_loss_func`, which gets its logits, to the trainer."


class UnknownOperation(ArgumentError):
    """A model did something to its logits that the fused loss cannot follow."""

    def __init__(self, operation: str) -> None:
        super().__init__(
            f"the forward of this model applies `{operation}` to its logits before the loss, which the fused loss "
            f"cannot follow. {REMEDY}"
        )
        self.operation = operation


@dataclass(frozen=True)
class LogitTransform:
    """What a model does between its head and its loss: `softcap * tanh(scale * x / softcap)`, or `scale * x`."""

    scale: float = 1.0
    softcap: float | None = None

    def agrees_with(self, other: LogitTransform) -> bool:
        return _close(self.scale, other.scale) and _close(self.softcap or 0.0, other.softcap or 0.0)


def logit_transform(model: nn.Module) -> LogitTransform:
    """Returns the scale and soft cap that `model` says it applies to its logits.

    Known spellings: `logit_scale` (Cohere), `output_multiplier`, `lm_head_multiplier` (Falcon-H1), `logits_scaling`
    (Granite divides, HyperCLOVA X multiplies); `final_logit_softcapping` (Gemma 2 and later), `logits_soft_cap`
    (RecurrentGemma), `output_logit_soft_cap` (xLSTM).
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        value = getattr(text, name, None)
        if isinstance(value, int | float):
            scale = float(value)
            break
    else:
        divisor = getattr(text, "logits_scaling", None)
        if isinstance(divisor, int | float):
            scale = float(divisor) if getattr(text, "model_type", "") == "hyperclovax" else 1.0 / divisor
    caps = (
        getattr(text, name, None) for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    )
    return LogitTransform(scale, next((float(cap) for cap in caps if cap is not None), None))


class Recorder:
    """Writes down the elementwise operations a model applies to its logits."""

    def __init__(self) -> None:
        self.before, self.after, self.capped = 1.0, 1.0, False

    def multiply(self, factor: float) -> None:
        if self.capped:
            self.after *= factor
        else:
            self.before *= factor

    def transform(self) -> LogitTransform:
        """Returns the transform in normal form: `after * tanh(before * x)` has cap `after` and scale their product."""
        return LogitTransform(self.before * self.after, self.after) if self.capped else LogitTransform(self.before)


class DisguisedLoss(Tensor):
    """A 0-d loss that a model takes for logits. Scaling and tanh are recorded, anything else is refused.

    It carries the gradient, because FSDP and ZeRO-3 hang their backward hooks on what a module returns.
    """

    recorder: Recorder

    # What hooks of FSDP, ZeRO-3 and DDP do with a module's outputs; executed for real.
    _SAME_TENSOR = frozenset({"detach", "view_as", "alias", "clone"})
    _PLUMBING = _SAME_TENSOR | {
        *(
            "__get__",
            "__set__",
            "dim",
            "size",
            "numel",
            "backward",
            "register_hook",
            "as_subclass",
            "is_floating_point",
        ),
        *("__repr__", "__hash__", "is_complex", "data_ptr", "untyped_storage", "requires_grad_", "element_size"),
    }
    _UNCHANGED = frozenset({"float", "to", "type", "contiguous", "type_as", "double", "bfloat16", "half"})
    _MULTIPLY = frozenset({"mul", "__mul__", "__rmul__", "mul_", "multiply", "__imul__"})
    _DIVIDE = frozenset({"div", "__truediv__", "div_", "true_divide", "divide", "__itruediv__", "__div__"})

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        disguised = next((each for each in args if isinstance(each, cls)), None)
        recorder: Recorder | None = getattr(disguised, "recorder", None)
        if name in cls._PLUMBING:
            with torch._C.DisableTorchFunctionSubclass():
                result = func(*args, **(kwargs or {}))
            if name in cls._SAME_TENSOR and recorder is not None:
                result = result.as_subclass(cls)
                result.recorder = recorder
            return result
        factor = next((each for each in args if each is not disguised), None)
        if isinstance(factor, Tensor) and factor.numel() == 1 and not factor.requires_grad:
            factor = float(factor)
        if recorder is not None:
            if name in cls._UNCHANGED:
                return disguised
            if name in ("tanh", "tanh_") and not recorder.capped:
                recorder.capped = True
                return disguised
            if name in cls._MULTIPLY | cls._DIVIDE and isinstance(factor, int | float):
                recorder.multiply(float(factor) if name in cls._MULTIPLY else 1.0 / factor)
                return disguised
        raise UnknownOperation(name)


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-6 * max(abs(a), abs(b), 1e-12)
