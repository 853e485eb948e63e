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
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from finetune.errors import ArgumentError
from finetune.kernels.head_support import head_of, transform_of, unsupported_reason
from finetune.kernels.linear_cross_entropy import IGNORE_INDEX, HeadLoss, linear_cross_entropy
from finetune.kernels.logit_transform import REMEDY, DisguisedLoss, LogitTransform, Recorder
from finetune.wrappers import unwrap_peft


class FusedHead:
    """The handle of one fused model. `remove()` makes the model what it was, to the bit.

    `last` holds the sums of the most recent forward pass with labels (`HeadLoss`: count, nll, correct, entropy), on
    the device and without gradient. A context manager: leaving the block removes.
    """

    def __init__(self, model: Any, transform: LogitTransform, options: dict[str, Any]) -> None:
        self.last: HeadLoss | None = None
        self.transform = transform
        self._model, self._head, self._options = model, head_of(model), options
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
        with self._switched(on=False):
            yield

    @contextmanager
    def resumed(self) -> Iterator[None]:
        """Inside the block, within one of `suspended`, the model computes its loss without logits again."""
        with self._switched(on=True):
            yield

    @contextmanager
    def _switched(self, *, on: bool) -> Iterator[None]:
        before = self._active
        self._switch(on)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, on: bool) -> None:
        self._active = on
        if on:
            self._model._loss_function = self._loss
        else:
            self._model.__dict__.pop("_loss_function", None)

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
                f"{tuple(call.targets.shape)}; `logits_to_keep` cannot be combined with labels here. {REMEDY}"
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
        if torch.compiler.is_compiling() or isinstance(hidden, FakeTensor):
            # A compiler cannot follow the disguise, and a fake tensor (memory plans) cannot wear it. Logits of no width
            # cost nothing, whatever is done to them.
            return hidden.new_empty(*hidden.shape[:-1], 0)
        disguised = call.loss.as_subclass(DisguisedLoss)
        disguised.recorder = call.recorder
        return disguised

    def _loss(self, logits: Any = None, labels: Any = None, *_: Any, **kwargs: Any) -> Tensor:
        """Stands for the model's loss function: divides the sum by `num_items_in_batch`, or by this batch's count."""
        call = self._call
        if call is None or call.sums is None:
            from transformers.loss.loss_utils import ForCausalLMLoss

            return ForCausalLMLoss(logits, labels, *_, **kwargs)
        sums, loss = call.sums, call.sums.loss
        if isinstance(logits, DisguisedLoss):
            applied = call.recorder.transform()
            if not applied.agrees_with(self.transform):
                raise ArgumentError(
                    f"{type(self._model).__name__} applies {applied} to its logits, but {self.transform} "
                    f"was expected. {REMEDY} Or pass `transform=` to `fuse_head`."
                )
            # The tensor that came back, not the one that was handed out: backward hooks hang on it.
            loss = logits.as_subclass(Tensor)
        self.last = HeadLoss(sums.loss.detach(), sums.count, sums.nll, sums.correct, sums.entropy)
        items = kwargs.get("num_items_in_batch")
        if items is None:
            return loss / sums.count.clamp(min=1)
        return loss / (items.to(loss.device) if isinstance(items, Tensor) else items)


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
    reason = unsupported_reason(model, transform)
    if reason is not None:
        raise ArgumentError(f"the fused loss does not fit this model: {reason}. {REMEDY}")
    base = unwrap_peft(model)
    options = {
        "label_smoothing": label_smoothing, "z_loss": z_loss, "dft": dft, "entropy": entropy,
        "chunk_tokens": chunk_tokens,
    }  # fmt: skip
    return FusedHead(base, transform or transform_of(base), options)


@dataclass
class _Call:
    """One forward pass with labels: what the head has to know, and what it found."""

    targets: Tensor
    positions: Tensor
    weights: Tensor | None
    recorder: Recorder
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
            virtual = targets.shape[-1] - weights.shape[-1]  # labels that PEFT put before those of each row
            weights = _shift(nn.functional.pad(weights, (virtual, 0)), 0)
        return cls(targets, positions, weights, Recorder())


def _shift(values: Tensor | None, fill: int) -> Tensor | None:
    return None if values is None else nn.functional.pad(values[..., 1:], (0, 1), value=fill)


def _whole(parameter: Any) -> Tensor:
    """Returns a parameter that FSDP2 left sharded as a whole tensor; gradients flow back to the shards."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def _without_logits(outputs: Any) -> Any:
    if isinstance(outputs, tuple):
        return tuple(each for each in outputs if not _is_placeholder(each))
    return type(outputs)(**{name: value for name, value in outputs.items() if name != "logits"})


def _is_placeholder(value: Any) -> bool:
    return isinstance(value, DisguisedLoss) or (isinstance(value, Tensor) and value.shape[-1:] == (0,))
