"""What is inside the wrappers that PEFT and accelerate put around a model and an optimizer."""

import sys
from typing import Any


def is_peft_model(model: object) -> bool:
    """Returns whether `model` is a PEFT wrapper, without importing peft: if nobody imported it, nothing is wrapped."""
    peft: Any = sys.modules.get("peft")
    classes = tuple(
        found for name in ("PeftModel", "PeftMixedModel") if isinstance(found := getattr(peft, name, None), type)
    )
    return bool(classes) and isinstance(model, classes)


def unwrap_peft(model: Any) -> Any:
    """Returns the model inside a PEFT wrapper (its layers may hold adapters), or `model` itself.

    A PEFT wrapper inside those of `torch.compile` and FSDP1 is looked through too. A model of the user that happens to
    have a method `get_base_model` is left alone.
    """
    inner: Any = model
    while (inside := _wrapped(inner)) is not None:
        inner = inside
    if not is_peft_model(inner):
        return model
    if hasattr(inner, "get_base_model"):
        return inner.get_base_model()
    return inner.base_model.model  # PeftMixedModel offers no accessor


def _wrapped(model: Any) -> Any:
    modules = getattr(model, "_modules", {})
    return modules.get("_orig_mod", modules.get("_fsdp_wrapped_module"))


def unwrap_optimizer(optimizer: Any) -> Any:
    """Returns the optimizer inside the wrappers of accelerate and DeepSpeed, or `optimizer` itself."""
    inner = getattr(optimizer, "optimizer", None)
    return unwrap_optimizer(inner) if inner is not None else optimizer


def clips_its_own_gradients(optimizer: Any) -> bool:
    """Returns whether the optimizer owns its gradients and has a `clip_grad_norm` (layerwise GaLore's projections)."""
    return callable(getattr(unwrap_optimizer(optimizer), "clip_grad_norm", None))
