"""Activation offloading: what the backward pass will need waits in host memory instead of on the device."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class OffloadStatistics:
    """What was moved since the block was entered: tensors kept for backward, and their bytes."""

    tensors: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class _Parked:
    """A saved tensor that waits on the host, and where it has to go back to."""

    tensor: Tensor
    device: torch.device


@contextmanager
def offload_activations(
    model: nn.Module, *, min_bytes: int = 64 * 1024, device_types: Collection[str] = ("cuda", "xpu")
) -> Iterator[OffloadStatistics]:
    """Moves tensors that autograd saves inside the block to pinned host memory, and back when backward asks for them.

    For the time of a run: forward passes of evaluation save nothing, so they are not slowed. Parameters stay (moving
    them would free nothing), so do tensors below `min_bytes` and everything not on `device_types`: on CPU nothing
    happens. Copies run on the device's current stream, in order with its kernels, so results do not change by a bit;
    the price is the time of two copies per activation. Not together with torch.compile, whose graphs save their own.
    """
    statistics = OffloadStatistics()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()} - {0}

    def park(tensor: Tensor) -> Tensor | _Parked:
        stays = (
            tensor.device.type not in device_types
            or tensor.numel() * tensor.element_size() < min_bytes
            or (tensor.is_leaf and tensor.requires_grad)
            or tensor.layout != torch.strided
            or tensor.untyped_storage().data_ptr() in own
        )
        if stays:
            return tensor
        statistics.tensors += 1
        statistics.bytes += tensor.numel() * tensor.element_size()
        pinned = tensor.device.type != "cpu"
        host = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
        host.copy_(tensor, non_blocking=pinned)
        return _Parked(host, tensor.device)

    def fetch(saved: Tensor | _Parked) -> Tensor:
        if not isinstance(saved, _Parked):
            return saved
        if saved.device.type == "cpu":
            return saved.tensor
        return saved.tensor.to(saved.device, non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(park, fetch):
        yield statistics
