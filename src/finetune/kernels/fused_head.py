"""Makes one causal language model compute its loss without logits, and undoes it.

How: the model's own `forward` runs unchanged. Only its head and its loss function are replaced on the instance while
labels are present. The head, which is called exactly where it always was (so hooks of FSDP, ZeRO-3 and PEFT fire and
its weights are gathered), computes the loss of `kernels/linear_cross_entropy.py` and returns it in the disguise of
logits. What the model then does to those "logits" (Gemma's soft-capping, Cohere's scale) is not executed but written
down, and compared with what the loss assumed: a model with a convention unknown here stops with an error instead of
training on other logits. The replaced loss function hands the loss back and divides it; auxiliary losses of mixtures
of experts are added by the model itself, as ever.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import ArgumentError
from finetune.kernels.linear_cross_entropy import IGNORE_INDEX, HeadLoss, linear_cross_entropy

_REMEDY = "Use the plain loss for this model (`use_fused_loss=False`)."


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


def unsupported_reason(model: nn.Module) -> str | None:
    """Returns why the head of `model` cannot be fused, as the end of a sentence, or None if it can be.

    A reason is no error: LoRA on the head, for one, trains through the plain loss.
    """
    base = _base(model)
    if not hasattr(base, "get_output_embeddings") or not hasattr(type(base), "loss_function"):
        return f"{type(base).__name__} is no causal language model of transformers"
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        return "the labels of an encoder-decoder are not shifted"
    head = _head(base)
    if head is None:
        return f"{type(base).__name__} has no output head"
    if type(head).forward is not nn.Linear.forward:
        return f"its head is a {type(head).__module__}.{type(head).__name__}, not a plain nn.Linear"
    if not head.weight.is_floating_point():
        return "the weights of its head are quantized"
    if "forward" in head.__dict__:
        return "the forward of its head is replaced already (by `device_map` hooks or another fused head)"
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    # A model without a loss type (GPT-2) falls back to the causal loss.
    if LOSS_MAPPING.get(getattr(base, "loss_type", None) or "ForCausalLM") is not ForCausalLMLoss:
        return f"its loss is {base.loss_type!r}, not the causal one"
    if getattr(base.forward, "__module__", "").startswith("liger_kernel"):
        return "Liger's `fused_linear_cross_entropy` owns its head already"
    if "_loss_function" in base.__dict__:
        return "its loss function was replaced by the user"
    try:
        source = inspect.getsource(inspect.unwrap(type(base).forward))
    except (OSError, TypeError):
        return None
    return None if "loss_function" in source else f"{type(base).__name__}.forward computes its loss by itself"


class FusedHead:
    """The handle of one fused model. `remove()` makes the model what it was, to the bit.

    `last` holds the sums of the most recent forward pass with labels (`HeadLoss`: count, nll, correct, entropy), on
    the device and without gradient. A context manager: leaving the block removes.
    """

    def __init__(self, model: Any, transform: LogitTransform, options: dict[str, Any]) -> None:
        self.last: HeadLoss | None = None
        self.transform = transform
        self._model, self._head, self._options = model, _head(model), options
        self._active, self._call = True, None
        self._had_forward = model.__dict__.get("forward")
        self._forward, self._head_forward = model.forward, self._head.forward
        self._wrapper = self._wrap_forward()
        model.forward = self._wrapper
        self._head.forward = self._project
        model._loss_function = self._loss

    def remove(self) -> None:
        """Restores the model. If something wrapped our `forward` meanwhile (accelerate does), ours passes through."""
        if not self._active:
            return
        self._active, self._call = False, None
        if self._model.__dict__.get("forward") is self._wrapper:
            if self._had_forward is None:
                del self._model.forward
            else:
                self._model.forward = self._had_forward
        del self._head.forward
        self._model.__dict__.pop("_loss_function", None)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Inside the block the model returns logits as ever: for `compute_metrics`, `return_outputs` and debugging."""
        before, self._active = self._active, False
        self._model.__dict__.pop("_loss_function", None)
        try:
            yield
        finally:
            self._active = before
            if before:
                self._model._loss_function = self._loss

    def __enter__(self) -> FusedHead:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _wrap_forward(self) -> Any:
        original = self._forward

        # A bound method like the one it replaces: accelerate treats other callables differently.
        @functools.wraps(getattr(original, "__func__", original))
        def forward(_model: Any, *args: Any, **kwargs: Any) -> Any:
            weights = kwargs.pop("token_weights", None)
            labels, shifted = kwargs.get("labels"), kwargs.get("shift_labels")
            if not self._active or (labels is None and shifted is None):
                return original(*args, **kwargs)
            if labels is None:
                kwargs["labels"] = shifted
            self._call = _Call.of(labels, shifted, weights)
            try:
                outputs = original(*args, **kwargs)
            finally:
                self._call = None
            return _without_logits(outputs)

        return types.MethodType(forward, self._model)

    def _project(self, hidden: Tensor) -> Tensor:
        """Stands for the head: the loss, disguised as logits, while a call with labels is under way."""
        call = self._call
        if call is None or call.loss is not None:
            return self._head_forward(hidden)
        if hidden.shape[:-1] != call.targets.shape:
            raise ArgumentError(
                f"the head was given hidden states of shape {tuple(hidden.shape)} for labels of shape "
                f"{tuple(call.targets.shape)}; `logits_to_keep` cannot be combined with labels here. {_REMEDY}"
            )
        head = self._head
        call.sums = linear_cross_entropy(
            hidden,
            _whole(head.weight),
            call.targets,
            bias=None if head.bias is None else _whole(head.bias),
            positions=call.positions,
            token_weights=call.weights,
            scale=self.transform.scale,
            softcap=self.transform.softcap,
            **self._options,
        )
        call.loss = call.sums.loss
        disguised = call.loss.as_subclass(_DisguisedLoss)
        disguised.recorder = call.recorder
        return disguised

    def _loss(self, logits: Any = None, labels: Any = None, *_: Any, **kwargs: Any) -> Tensor:
        """Stands for the model's loss function: divides the sum by `num_items_in_batch`, or by this batch's count."""
        call = self._call
        if call is None or call.sums is None:
            from transformers.loss.loss_utils import ForCausalLMLoss

            return ForCausalLMLoss(logits, labels, *_, **kwargs)
        applied = call.recorder.transform()
        if not applied.agrees_with(self.transform):
            raise ArgumentError(
                f"{type(self._model).__name__} applies {applied} to its logits, but its config says {self.transform}. "
                f"{_REMEDY} Or pass `transform=` to `fuse_head`."
            )
        sums = call.sums
        self.last = HeadLoss(sums.loss.detach(), sums.count, sums.nll, sums.correct, sums.entropy)
        items = kwargs.get("num_items_in_batch")
        if items is None:
            return sums.loss / sums.count
        return sums.loss / (items.to(sums.loss.device) if isinstance(items, Tensor) else items)


def fuse_head(
    model: nn.Module,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    dft: bool = False,
    entropy: bool = False,
    chunk_tokens: int | None = None,
    transform: LogitTransform | None = None,
) -> FusedHead:
    """Replaces head and loss of `model` (or of the model inside a PEFT wrapper) and returns the handle that undoes it.

    Afterwards `model(input_ids=..., labels=...)` returns the loss that it would have returned, in training and in
    evaluation, with `logits` absent; without labels nothing changes, so `generate` works. The loss is divided by
    `num_items_in_batch` if that is passed, else by the supervised tokens of the batch. `token_weights` (shaped as the
    labels) may be passed to `forward` too. Install before `accelerator.prepare`, on a model that is not
    `nn.DataParallel`. Options are those of `linear_cross_entropy`.

    Raises:
        ArgumentError: with the reason of `unsupported_reason`.
    """
    reason = unsupported_reason(model)
    if reason is not None:
        raise ArgumentError(f"the fused loss does not fit this model: {reason}. {_REMEDY}")
    base = _base(model)
    options = {
        "label_smoothing": label_smoothing, "z_loss": z_loss, "dft": dft, "entropy": entropy,
        "chunk_tokens": chunk_tokens,
    }  # fmt: skip
    return FusedHead(base, transform or logit_transform(base), options)


@dataclass
class _Call:
    """One forward pass with labels: what the head has to know, and what it found."""

    targets: Tensor
    positions: Tensor
    weights: Tensor | None
    recorder: _Recorder
    loss: Tensor | None = None
    sums: HeadLoss | None = None

    @classmethod
    def of(cls, labels: Tensor | None, shifted: Tensor | None, weights: Tensor | None) -> _Call:
        targets = _shift(labels, IGNORE_INDEX) if shifted is None else shifted
        assert targets is not None
        # Looked up here, before the backbone: on a GPU the host waits for the number of supervised tokens, and at
        # this point the queue of kernels is as short as it gets.
        positions = targets.reshape(-1).ne(IGNORE_INDEX).nonzero().squeeze(1)
        if weights is not None and shifted is None:
            weights = _shift(weights, 0)
        return cls(targets, positions, weights, _Recorder())


class _Recorder:
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


class _DisguisedLoss(Tensor):
    """A 0-d loss that a model takes for logits. Scaling and tanh are recorded, anything else is refused.

    It carries the gradient, because FSDP and ZeRO-3 hang their backward hooks on what a module returns.
    """

    recorder: _Recorder

    _SAME = frozenset({"float", "to", "type", "contiguous", "type_as", "double", "bfloat16", "half"})
    _MULTIPLY = frozenset({"mul", "__mul__", "__rmul__", "mul_", "multiply", "__imul__"})
    _DIVIDE = frozenset({"div", "__truediv__", "div_", "true_divide", "divide", "__itruediv__", "__div__"})

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if name in ("__get__", "__set__", "dim", "size", "backward", "numel", "__repr__", "view_as", "detach"):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        disguised = next(each for each in args if isinstance(each, cls))
        recorder = getattr(disguised, "recorder", None)
        factor = next((each for each in args if each is not disguised), None)
        if isinstance(factor, Tensor) and factor.numel() == 1 and not factor.requires_grad:
            factor = float(factor)
        if recorder is not None:
            if name in cls._SAME:
                return disguised
            if name in ("tanh", "tanh_") and not recorder.capped:
                recorder.capped = True
                return disguised
            if name in cls._MULTIPLY | cls._DIVIDE and isinstance(factor, int | float):
                recorder.multiply(float(factor) if name in cls._MULTIPLY else 1.0 / factor)
                return disguised
        raise ArgumentError(
            f"the forward of this model applies `{name}` to its logits before the loss, which the fused loss cannot "
            f"follow. {_REMEDY}"
        )


def _shift(values: Tensor | None, fill: int) -> Tensor | None:
    return None if values is None else nn.functional.pad(values[..., 1:], (0, 1), value=fill)


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _head(base: Any) -> Any:
    """Returns the module whose `forward` projects: the head, or PEFT's trainable copy of it (`modules_to_save`)."""
    head = base.get_output_embeddings()
    copies = getattr(head, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict):
        active = getattr(head, "active_adapter", "default")
        return copies[active[0] if isinstance(active, list | tuple) else active]
    return head


def _whole(parameter: Any) -> Tensor:
    """Returns a parameter that FSDP2 left sharded as a whole tensor; gradients flow back to the shards."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def _without_logits(outputs: Any) -> Any:
    if isinstance(outputs, tuple):
        return tuple(each for each in outputs if not isinstance(each, _DisguisedLoss))
    kept = {name: value for name, value in outputs.items() if not isinstance(value, _DisguisedLoss)}
    return type(outputs)(**kept)


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-6 * max(abs(a), abs(b), 1e-12)
