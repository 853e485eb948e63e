"""Whether the head of one model can be fused with its loss: read from the model, and tried without running its layers.

The trial runs the model's own top-level `forward` with a stand-in for the layers and one for the head, so it costs
nothing and needs no weights: what the model does to its logits between head and loss is written down.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import one_line
from finetune.kernels.logit_transform import (
    DisguisedLoss,
    LogitTransform,
    Recorder,
    UnknownOperation,
    logit_transform,
)
from finetune.wrappers import unwrap_peft

logger = logging.getLogger(__name__)

LIGER_OWNS_HEAD = "Liger's `fused_linear_cross_entropy` owns its head already"
LIGER_OWNS_LOSS = "Liger's `cross_entropy` computes its loss"


def unsupported_reason(model: nn.Module, transform: LogitTransform | None = None) -> str | None:
    """Returns why the head of `model` cannot be fused, as the end of a sentence, or None if it can be.

    A reason is no error: LoRA on the head, for one, trains through the plain loss. `transform` is what the model does
    to its logits, if that is not what `transform_of` finds.
    """
    base = unwrap_peft(model)
    if not hasattr(base, "get_output_embeddings") or not hasattr(type(base), "loss_function"):
        return f"{type(base).__name__} is not a causal language model of transformers"
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        return "the labels of an encoder-decoder are not shifted"
    head = head_of(base)
    if head is None:
        return f"{type(base).__name__} has no output head"
    if type(head).forward is not nn.Linear.forward:
        return f"its head is a {type(head).__module__}.{type(head).__name__}, not a plain nn.Linear"
    if not head.weight.is_floating_point():
        return "the weights of its head are quantized"
    if "forward" in head.__dict__:
        return "the forward of its head is replaced already (by `device_map` hooks or another fused head)"
    return _reason_of_its_loss(base) or _reason_of_its_logits(base, head, transform)


def _reason_of_its_loss(base: Any) -> str | None:
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    # A model without a loss type (GPT-2) falls back to the causal loss.
    if LOSS_MAPPING.get(getattr(base, "loss_type", None) or "ForCausalLM") is not ForCausalLMLoss:
        return f"its loss is {base.loss_type!r}, not the causal one"
    if getattr(base.forward, "__module__", "").startswith("liger_kernel"):
        return LIGER_OWNS_HEAD
    if getattr(nn.functional.cross_entropy, "__module__", "").startswith("liger_kernel"):
        return LIGER_OWNS_LOSS
    if "_loss_function" in base.__dict__:
        return "its loss function was replaced by the user"
    try:
        source = inspect.getsource(inspect.unwrap(type(base).forward))
    except (OSError, TypeError):
        return None
    return None if "loss_function" in source else f"{type(base).__name__}.forward computes its loss by itself"


def head_of(base: Any) -> Any:
    """Returns the module whose `forward` projects: the head, or PEFT's trainable copy of it (`modules_to_save`)."""
    head = base.get_output_embeddings()
    copies = getattr(head, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict):
        active = getattr(head, "active_adapter", "default")
        return copies[active[0] if isinstance(active, list | tuple) else active]
    return head


# ---- The trial ----


@dataclass(frozen=True)
class _Trial:
    """What a trial found: a reason not to fuse, or what was done to the logits; neither if it failed before the head.

    Such a failure says nothing, as the stand-ins are no real layers: then the first batch shows it.
    """

    reason: str | None = None
    transform: LogitTransform | None = None


def transform_of(base: Any) -> LogitTransform:
    """Returns what the forward of `base` does to its logits, as a trial shows it; what its config says if none can."""
    return _try(base, head_of(base), training=True).transform or logit_transform(base)


def _reason_of_its_logits(base: Any, head: nn.Linear, transform: LogitTransform | None) -> str | None:
    """Returns what `base` does to its logits, in training or in evaluation, that the fused loss cannot follow."""
    expected, source = transform, "`transform` says"
    for training in (True, False):
        trial = _try(base, head, training=training)
        if trial.reason is not None:
            return trial.reason
        if trial.transform is None:
            continue
        if expected is None:
            expected, source = trial.transform, "in training"
        if not trial.transform.agrees_with(expected):
            return f"its forward applies {trial.transform} to its logits, and {source} {expected}"
    return None


def _try(base: Any, head: nn.Linear, *, training: bool) -> _Trial:
    recorder, applied, projected = Recorder(), [], []

    def loss(logits: Any = None, *_: Any, **__: Any) -> Tensor:
        applied.append(recorder.transform() if isinstance(logits, DisguisedLoss) else None)
        return torch.zeros(())

    def project(hidden: Tensor) -> Tensor:
        disguised = torch.zeros((), device=hidden.device).as_subclass(DisguisedLoss)
        disguised.recorder = recorder
        projected.append(True)  # not above: fake tensors cannot be disguised, which says nothing of the model
        return disguised

    tokens = torch.zeros((1, 2), dtype=torch.long, device=head.weight.device)
    before, base.training = base.training, training  # of this module alone: no other one runs
    try:
        with torch.no_grad(), _stand_ins(base, head, project, loss):
            base.forward(input_ids=tokens, labels=tokens)
    except UnknownOperation as unknown:
        return _Trial(f"its forward applies `{unknown.operation}` to its logits, which the fused loss cannot follow")
    except Exception as problem:  # whatever the code of a model does with a stand-in
        logger.debug("The trial of the head of %s failed: %s", type(base).__name__, problem)
        if projected and not applied:
            return _Trial(f"its forward needs real logits before its loss ({one_line(problem, 100)})")
    finally:
        base.training = before
    return _Trial(transform=applied[0] if applied else None)


@contextmanager
def _stand_ins(base: Any, head: nn.Linear, project: Any, loss: Any) -> Iterator[None]:
    """Context manager: the layers of `base` give zeros, its head is `project` and its loss function `loss`.

    The modules are replaced, not their `forward`, so that no hook of theirs (of ZeRO-3, of FSDP) runs.
    """

    def layers(*_: Any, **__: Any) -> _Outputs:
        hidden: Any = head.weight.new_zeros(1, 2, head.in_features)
        return _Outputs(last_hidden_state=hidden)

    places = [(base._modules, base.base_model_prefix, base._modules[base.base_model_prefix], layers)]
    for owner in base.modules():
        places += [(owner._modules, name, child, project) for name, child in owner._modules.items() if child is head]
    for owned, name, real, compute in places:
        owned[name] = _StandIn(real, compute)
    base.__dict__["_loss_function"] = loss
    try:
        yield
    finally:
        del base.__dict__["_loss_function"]
        for owned, name, real, _ in places:
            owned[name] = real


class _StandIn(nn.Module):
    """Stands for a module, and for any module inside it that is called in its place."""

    def __init__(self, real: nn.Module, compute: Any) -> None:
        super().__init__()
        self.__dict__.update(_real=real, _compute=compute)  # not as a child that something may find

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.__dict__["_real"], name)
        return self if isinstance(found, nn.Module) else found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_compute"](*args, **kwargs)


class _Outputs(dict[str, Any]):
    """Hidden states by name and by place, and None for whatever else the outputs of some layers have."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.get(name)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else [*self.values()][key]
