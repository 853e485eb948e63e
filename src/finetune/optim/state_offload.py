"""Optimizer state in host memory between steps: forward and backward have the device to themselves.

The peak of a step becomes the larger of the two parts, activations or state, in place of their sum; the price is one
copy of the state in each direction per step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from finetune.errors import ArgumentError
from finetune.optim.fused_backward import works_in_backward
from finetune.wrappers import unwrap_optimizer

Move = Callable[[Tensor, torch.device], Tensor]
_installed: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def offload_state(optimizer: Any, *, park: Move | None = None, fetch: Move | None = None) -> None:
    """Keeps the state of `optimizer` in pinned host memory except inside its `step`. A second call changes nothing.

    `park` and `fetch` move one tensor from and to the device of its parameter. Scalars stay where they are. Bits do not
    change, checkpoints are those of the ordinary run, and a loaded state is parked after the first step.

    Raises:
        ArgumentError: the optimizer is not one of torch's, works inside backward, is sharded, or its parameters are in
            host memory already.
    """
    inner = unwrap_optimizer(optimizer)
    if not isinstance(inner, Optimizer):
        raise ArgumentError(
            f"`offload_optimizer_state` needs one of torch's optimizers, not {type(inner).__name__} (DeepSpeed has "
            "`offload_optimizer` in its own configuration). Set `offload_optimizer_state=False`."
        )
    if inner in _installed:
        return
    if works_in_backward(inner):
        raise ArgumentError(
            f"`offload_optimizer_state=True` keeps the state away while backward runs, and this {type(inner).__name__} "
            "works with it there. Set `offload_optimizer_state=False`, or use `optim` without `_layerwise`."
        )
    parameters = [p for group in inner.param_groups for p in group["params"]]
    if any(getattr(p, "device_mesh", None) is not None for p in parameters):
        raise ArgumentError(
            "`offload_optimizer_state` does not work with FSDP, which has `fsdp_offload_params` for this. Set it to "
            "False."
        )
    if park is None and all(p.device.type == "cpu" for p in parameters):
        raise ArgumentError(
            "`offload_optimizer_state=True` on a CPU run moves nothing: the state is in host memory. Set it to False."
        )
    _installed.add(inner)
    to_host, to_device = park or _to_host, fetch or _to_device

    def fetch_all(owner: Optimizer, *_: Any) -> None:
        _move_all(owner, to_device)

    def park_all(owner: Optimizer, *_: Any) -> None:
        _move_all(owner, to_host)

    inner.register_step_pre_hook(fetch_all)
    inner.register_step_post_hook(park_all)


def _move_all(optimizer: Optimizer, move: Move) -> None:
    for parameter, state in optimizer.state.items():
        for name, value in state.items() if isinstance(state, dict) else ():
            if isinstance(value, Tensor) and value.dim() > 0:
                state[name] = move(value, parameter.device)
    if torch.accelerator.is_available():
        # Pinned copies are asynchronous: nobody may read or free one before it is done.
        torch.accelerator.synchronize()


def _to_host(tensor: Tensor, _: torch.device) -> Tensor:
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True)
