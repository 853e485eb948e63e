"""Liger's Triton kernels on one model, by name, through a handle that takes them off again.

Liger replaces methods on the instance and also names in transformers' modeling module (rotary embedding, class names)
and, for `cross_entropy`, in `torch.nn.functional`. The handle notes every replacement and undoes each.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import ArgumentError, nearest
from finetune.wrappers import unwrap_peft

_MISSING = object()
_INSTALL = "Install it: `pip install liger-kernel`, or set `use_liger_kernel=False`."


class LigerHandle:
    """What was replaced, and how to undo it. `kernels` are the names that were switched on."""

    def __init__(self, kernels: tuple[str, ...], changes: list[tuple[Any, str, Any, Any]]) -> None:
        self.kernels = kernels
        self.active = True
        self._changes = changes

    @property
    def owns_head(self) -> bool:
        """Whether Liger computes the loss from hidden states, so that no other fused loss may."""
        return "fused_linear_cross_entropy" in self.kernels

    def remove(self) -> None:
        """Puts back every replaced attribute that still is Liger's. Safe to call twice."""
        self.active = False
        changes, self._changes = self._changes, []
        for owner, name, old, new in reversed(changes):
            if vars(owner).get(name, _MISSING) is not new:
                continue
            _put(owner, name, old)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Inside the block the model computes as it would without Liger."""
        # What was wrapped since stays in place; a wrapped forward finds out by `active`.
        changes = [each for each in self._changes if vars(each[0]).get(each[1], _MISSING) is each[3]]
        self.active = False
        for owner, name, old, _ in reversed(changes):
            _put(owner, name, old)
        try:
            yield
        finally:
            self.active = True
            for owner, name, _, new in changes:
                _put(owner, name, new)

    def share_forward(self, base: Any) -> None:
        """Puts a switch where Liger replaced the forward of `base`: later wrappers hold on to what they found there."""
        for number, (owner, name, old, new) in enumerate(self._changes):
            if owner is base and name == "forward":
                plain = types.MethodType(type(base).forward, base) if old is _MISSING else old

                @functools.wraps(getattr(new, "__func__", new))
                def forward(_: Any, *args: Any, _new: Any = new, _plain: Any = plain, **kwargs: Any) -> Any:
                    if not self.active:
                        return _plain(*args, **kwargs)
                    if self.owns_head:
                        _gather_head(base)
                    return _new(*args, **kwargs)

                switch = types.MethodType(forward, base)
                base.__dict__["forward"] = switch
                self._changes[number] = (owner, name, old, switch)

    def __enter__(self) -> LigerHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _gather_head(base: Any) -> None:
    """Makes the weights of the output layer whole: Liger reads them without calling the layer, which FSDP2 waits for.

    FSDP2 divides them again after the backward pass.
    """
    head: Any = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if hasattr(head, "unshard") and any(_is_sharded(p) for p in head.parameters()):
        head.unshard()


def _put(owner: Any, name: str, value: Any) -> None:
    """Sets an attribute to `value`, or removes it for `_MISSING`; on a module without its own bookkeeping."""
    if isinstance(owner, nn.Module):
        if value is _MISSING:
            owner.__dict__.pop(name, None)
        else:
            owner.__dict__[name] = value
    elif value is not _MISSING:
        setattr(owner, name, value)
    elif name in vars(owner):
        delattr(owner, name)


def apply_liger(model: nn.Module, config: Mapping[str, bool] | None = None) -> LigerHandle:
    """Switches on the kernels that `config` names for `model` (a PEFT wrapper is looked through); returns the handle.

    `config` is `args.liger_kernel_config`, for example `{"rope": True, "rms_norm": False}`; kernels it does not name
    follow Liger's defaults for the architecture. `cross_entropy=True` turns off Liger's fused head, because the two
    exclude each other.

    Raises:
        ArgumentError: Liger is not installed, there is no GPU, it has no kernels for this architecture, or `config`
            names a kernel that the architecture does not have.
    """
    functions = _functions()
    base = unwrap_peft(model)
    model_type = str(getattr(getattr(base, "config", None), "model_type", None))
    if model_type not in functions:
        raise ArgumentError(
            f"`use_liger_kernel` is set, but Liger has no kernels for {type(base).__name__} (model type "
            f"{model_type!r}).{nearest(model_type, functions)} Set `use_liger_kernel=False`; the fused loss and "
            "packed attention of this package need no kernels."
        )
    _check_device()
    apply = functions[model_type]
    kernels = resolve_kernels(apply, config, model_type)
    watched = list(_watched(base))
    before = [(owner, dict(vars(owner))) for owner in watched]
    try:
        apply(model=base, **kernels)
    finally:
        changes = [
            (owner, name, old.get(name, _MISSING), value)
            for owner, old in before
            for name, value in vars(owner).items()
            if old.get(name, _MISSING) is not value
        ]
        handle = LigerHandle(tuple(name for name, on in kernels.items() if on), changes)
        handle.share_forward(base)
        if sys.exc_info()[0] is not None:
            handle.remove()
    return handle


@contextmanager
def liger_parity(model: nn.Module, handle: LigerHandle, *, mixed: bool = False) -> Iterator[None]:
    """Compares, before the first training batch in the block, the loss with Liger's kernels and without.

    Both are taken of the first row's first `PARITY_TOKENS` tokens, without gradients and from the same random state,
    which is left as it was. Not under FSDP and ZeRO-3, whose modules cannot be called out of turn.

    Raises:
        ArgumentError: they differ by more than rounding explains (`PARITY`, relative): a little in float32, more in 16
            bits, which `mixed` says of mixed precision.
    """
    base = unwrap_peft(model)
    hooks: list[Any] = []

    def check(module: nn.Module, _: Any, kwargs: dict[str, Any]) -> None:
        ids, labels = kwargs.get("input_ids"), kwargs.get("labels")
        if not module.training or not isinstance(ids, Tensor) or not isinstance(labels, Tensor):
            return
        hooks.pop().remove()
        if not any(_is_sharded(p) for p in module.parameters()):
            _compare(module, handle, ids[:1, :PARITY_TOKENS], labels[:1, :PARITY_TOKENS], mixed)

    hooks.append(base.register_forward_pre_hook(check, with_kwargs=True))
    try:
        yield
    finally:
        while hooks:
            hooks.pop().remove()


PARITY_TOKENS = 512
# Measured differences are 5e-7 in float32 and under 1e-3 in bfloat16; a wrong kernel is off by much more.
PARITY = {"float32": 1e-3, "low": 2e-2}


def _is_sharded(parameter: Any) -> bool:
    return hasattr(parameter, "device_mesh") or hasattr(parameter, "ds_id")


def _compare(module: nn.Module, handle: LigerHandle, ids: Tensor, labels: Tensor, mixed: bool) -> None:
    if not bool((labels[:, 1:] != -100).any()):
        labels = ids
    device = ids.device
    low = mixed or next(module.parameters()).dtype in (torch.bfloat16, torch.float16)

    def loss() -> float:
        with torch.no_grad(), torch.random.fork_rng([device.index or 0] if device.type == "cuda" else []):
            return float(module(input_ids=ids, labels=labels, use_cache=False).loss)

    fused = loss()
    with handle.suspended():
        plain = loss()
    limit = PARITY["low" if low else "float32"]
    if not abs(fused - plain) <= limit * abs(plain):
        raise ArgumentError(
            f"Liger's kernels ({', '.join(handle.kernels)}) give a loss of {fused:.6g} on the first batch, and the "
            f"same model without them {plain:.6g}: more than the {limit:g} that rounding explains. Switch the wrong "
            "kernel off with `liger_kernel_config`, or set `use_liger_kernel=False`."
        )


def resolve_kernels(apply: Any, config: Mapping[str, bool] | None, model_type: str) -> dict[str, bool]:
    """Returns every kernel of one architecture with whether it is on: Liger's default, overridden by `config`.

    Raises `ArgumentError` for a name that the architecture does not have, with the names it has.
    """
    parameters = inspect.signature(apply).parameters
    defaults = {name: bool(p.default) for name, p in parameters.items() if isinstance(p.default, bool)}
    given = dict(config or {})
    unknown = [name for name in given if name not in defaults]
    if unknown:
        raise ArgumentError(
            f"`liger_kernel_config` names {unknown[0]!r}, which Liger does not have for {model_type!r}."
            f"{nearest(unknown[0], defaults)} Allowed: {', '.join(sorted(defaults))}."
        )
    if given.get("cross_entropy") and given.get("fused_linear_cross_entropy"):
        raise ArgumentError(
            "`liger_kernel_config` asks for `cross_entropy` and `fused_linear_cross_entropy`, which replace the same "
            "loss. Keep one."
        )
    kernels = {**defaults, **given}
    if kernels.get("cross_entropy") and kernels.get("fused_linear_cross_entropy"):
        kernels["cross_entropy" if given.get("fused_linear_cross_entropy") else "fused_linear_cross_entropy"] = False
    return kernels


def require_liger() -> None:
    """Raises `ArgumentError` if Liger is not installed or its kernels cannot run here. No model is needed."""
    _functions()
    _check_device()


def _functions() -> Mapping[str, Any]:
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise ArgumentError(
            f"`use_liger_kernel` is set but the package liger-kernel cannot be imported: {error}. {_INSTALL}"
        ) from error
    return MODEL_TYPE_TO_APPLY_LIGER_FN


def _check_device() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    kind = getattr(torch.accelerator.current_accelerator(), "type", None) if torch.accelerator.is_available() else None
    if kind in (None, "mps"):
        raise ArgumentError(
            "`use_liger_kernel` is set, but Liger's Triton kernels need a GPU and there is none here. Set "
            "`use_liger_kernel=False` (or TRITON_INTERPRET=1 to test their arithmetic, very slowly)."
        )


def _watched(base: nn.Module) -> Iterator[Any]:
    """Yields everything in which Liger may replace an attribute: the instance's modules, modeling code, functions."""
    yield from base.modules()
    for name, module in list(sys.modules.items()):
        if name.startswith("transformers.models.") and ".modeling_" in name:
            yield module
            yield from (value for value in vars(module).values() if _is_own_class(value, name))
    yield torch.nn.functional
    yield sys.modules["transformers.loss.loss_utils"]


def _is_own_class(value: Any, module_name: str) -> bool:
    return isinstance(value, type) and value.__module__ == module_name
