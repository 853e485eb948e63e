"""Nested tensors from evaluation: padding, concatenation, moving to the host.

Batches of different lengths are padded with -100 on the right in the second dimension, as transformers does:
shapes (2, 5, V) and (2, 7, V) give (4, 7, V).
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

PADDING = -100


def find_batch_size(inputs: Any) -> int | None:
    """Returns the first dimension of the first tensor or array found in nested `inputs`; None without one."""
    if isinstance(inputs, Tensor | np.ndarray):
        return inputs.shape[0] if inputs.ndim else None
    children = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple | list) else ()
    for child in children:
        size = find_batch_size(child)
        if size is not None:
            return size
    return None


def map_tensors(function: Callable[[Any], Any], data: Any) -> Any:
    """Returns `data` with `function` applied to every tensor or array; containers keep their type."""
    if isinstance(data, Mapping):
        return type(data)({key: map_tensors(function, value) for key, value in data.items()})  # pyright: ignore
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(map_tensors(function, value) for value in data))
    if isinstance(data, tuple | list):
        return type(data)(map_tensors(function, value) for value in data)
    return function(data) if isinstance(data, Tensor | np.ndarray) else data


def detach(data: Any) -> Any:
    """Returns nested tensors cut from the autograd graph."""
    return map_tensors(lambda x: x.detach() if isinstance(x, Tensor) else x, data)


def to_numpy(data: Any) -> Any:
    """Returns nested tensors as arrays; bfloat16, which numpy lacks, becomes float32."""

    def convert(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.detach().cpu()
        return (x.float() if x.dtype == torch.bfloat16 else x).numpy()

    return map_tensors(convert, data)


def concatenate(left: Any, right: Any, padding: int = PADDING) -> Any:
    """Returns two nested structures joined along the first dimension, padded in the second.

    Raises:
        TypeError: the structures differ.
    """
    if type(left) is not type(right):
        raise TypeError(f"Cannot join outputs of type {type(left).__name__} and {type(right).__name__}.")
    if isinstance(left, Mapping):
        return type(left)({key: concatenate(value, right[key], padding) for key, value in left.items()})  # pyright: ignore
    if isinstance(left, tuple) and hasattr(left, "_fields"):
        return type(left)(*(concatenate(a, b, padding) for a, b in zip(left, right, strict=True)))
    if isinstance(left, tuple | list):
        return type(left)(concatenate(a, b, padding) for a, b in zip(left, right, strict=True))
    if isinstance(left, Tensor):
        left, right = torch.atleast_1d(left), torch.atleast_1d(right)
        if left.ndim == 1 or left.shape[1] == right.shape[1]:
            return torch.cat((left, right), dim=0)
        width = max(left.shape[1], right.shape[1])
        joined = left.new_full((left.shape[0] + right.shape[0], width, *left.shape[2:]), padding)
    else:
        left, right = np.atleast_1d(left), np.atleast_1d(right)
        if left.ndim == 1 or left.shape[1] == right.shape[1]:
            return np.concatenate((left, right), axis=0)
        width = max(left.shape[1], right.shape[1])
        joined = np.full_like(left, padding, shape=(left.shape[0] + right.shape[0], width, *left.shape[2:]))
    joined[: left.shape[0], : left.shape[1]] = left
    joined[left.shape[0] :, : right.shape[1]] = right
    return joined


def pad_rows(data: Any, size: int) -> Any:
    """Returns nested tensors whose first dimension is filled up to `size` with copies of the last row."""

    def fill(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.ndim == 0 or x.shape[0] >= size:
            return x
        return torch.cat([x, x[-1:].expand(size - x.shape[0], *x.shape[1:])])

    return map_tensors(fill, data)


class Collected:
    """Outputs of successive batches: on the device until `offload`, then as arrays on the host.

    With `concat` False (`eval_do_concat_batches`) the batches stay a list. Pieces are joined once, at the end, so the
    cost is linear in the number of batches.
    """

    def __init__(self, *, concat: bool) -> None:
        self.concat = concat
        self._device: list[Any] = []
        self._host: list[Any] = []

    def add(self, data: Any) -> None:
        self._device.append(data)

    def offload(self) -> None:
        """Moves what is on the device to the host (`eval_accumulation_steps`)."""
        if self._device:
            pieces = [_join(self._device)] if self.concat else self._device
            self._host.extend(to_numpy(piece) for piece in pieces)
            self._device = []

    def arrays(self) -> Any:
        """Returns everything as arrays: one nested structure, a list of them, or None when nothing was added."""
        self.offload()
        if not self._host:
            return None
        return _join(self._host) if self.concat else self._host


def _join(pieces: list[Any]) -> Any:
    """Returns all pieces joined: in one go when the shapes allow, pairwise (halving) otherwise."""
    while len(pieces) > 1:
        if all(isinstance(p, Tensor) for p in pieces) and len({p.shape[1:] for p in pieces}) == 1 and pieces[0].ndim:
            return torch.cat(pieces)
        pairs = zip(pieces[::2], pieces[1::2], strict=False)
        odd = [pieces[-1]] if len(pieces) % 2 else []
        pieces = [concatenate(left, right) for left, right in pairs] + odd
    return pieces[0]
