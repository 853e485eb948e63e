"""A hash of rows or batches, to tell whether the data is still what it was."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from finetune.data.loading import randomness


def digest(value: Any) -> str:
    """Returns a SHA-256 over the contents of nested mappings, lists, tensors, arrays, numbers and strings.

    Lists and arrays of the same integers agree; objects of other kinds count by their type only.
    """
    hasher = hashlib.sha256()
    _feed(hasher, value)
    return hasher.hexdigest()


def rows_digest(dataset: Any, indices: list[int]) -> str:
    """Returns a hash of rows and their indices.

    Rows with random augmentation come out the same each time, and training does not notice the draws, if they draw
    from the global generators. Those that draw from one of their own give another hash each time.
    """
    with randomness.fixed():
        return digest({"indices": indices, "rows": [dataset[i] for i in indices]})


def _feed(hasher: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            hasher.update(f"{key}:".encode())
            _feed(hasher, value[key])
    elif isinstance(value, torch.Tensor):
        raw = value.detach().cpu().contiguous()
        _feed(hasher, raw.numpy() if raw.dtype != torch.bfloat16 else raw.view(torch.int16).numpy())
    elif isinstance(value, (np.ndarray, np.generic)) and value.dtype != object:
        array = np.asarray(value)
        if array.dtype.kind in "iub":
            array = array.astype(np.int64)
        hasher.update(f"{array.shape}".encode() + array.tobytes())
    elif isinstance(value, (list, tuple)):
        if value and all(type(item) is int for item in value):
            _feed(hasher, np.array(value, dtype=np.int64))
        else:
            hasher.update(f"[{len(value)}".encode())
            for item in value:
                _feed(hasher, item)
    elif isinstance(value, (str, int, float, bytes, bool)) or value is None:
        hasher.update(f"{type(value).__name__}{value!r};".encode())
    else:
        hasher.update(f"<{type(value).__qualname__}>".encode())
