"""Copies of the state for a save in the background, and the memory they lie in."""

import itertools
from typing import Any

import torch
from torch import Tensor

from finetune.errors import CheckpointError


class CopyPool:
    """Memory for the copies of one checkpoint after another, and the copying that may wait.

    Fresh memory costs a page fault for every 4 KiB, more than the copy itself. Ask for `renew` when nothing reads the
    last copies any more; those that the next snapshot does not take are freed by `trim`.

    Tensors whose memory is in `steady` (addresses of storages) are copied by `complete`, which must be called before
    anything changes them. Until then their copies have no content.
    """

    def __init__(self) -> None:
        self.steady: frozenset[int] = frozenset()
        self._free: dict[Any, list[Tensor]] = {}
        self._given: list[Tensor] = []
        self._pending: list[tuple[Tensor, Tensor, int]] = []

    def copy(self, tensor: Tensor) -> Tensor:
        """Returns a copy of `tensor` on the CPU, in memory of the last snapshot if some has its shape and dtype."""
        version, tensor = tensor._version, tensor.detach()
        if type(tensor) is not Tensor or tensor.layout != torch.strided:
            return tensor.to("cpu", copy=True)
        spare = self._free.get((tensor.dtype, tensor.shape, tensor.stride()))
        target = spare.pop() if spare else torch.empty_like(tensor, device="cpu")
        if tensor.untyped_storage().data_ptr() in self.steady:
            self._pending.append((target, tensor, version))
        else:
            target.copy_(tensor)
        self._given.append(target)
        return target

    def complete(self) -> None:
        """Copies what was left for later.

        Raises `CheckpointError` when something changed a tensor meanwhile: the copies would be of no one moment.
        """
        pending, self._pending = self._pending, []
        for target, tensor, version in pending:
            target.copy_(tensor)
            if tensor._version != version:
                raise CheckpointError(
                    "Weights or optimizer state changed outside the optimizer's step while a checkpoint was being "
                    "copied in the background. Set `async_save=False`."
                )

    @property
    def num_bytes(self) -> int:
        """What the pool holds."""
        return sum(tensor.nbytes for tensor in (*self._given, *itertools.chain(*self._free.values())))

    def renew(self) -> None:
        """Makes the memory of all copies given so far available again."""
        given, self._given, self._pending = self._given, [], []
        for tensor in given:
            self._free.setdefault((tensor.dtype, tensor.shape, tensor.stride()), []).append(tensor)

    def trim(self) -> None:
        """Frees what is available."""
        self._free.clear()


def snapshot(value: Any, memo: dict[Any, tuple[Tensor, Tensor]] | None = None, pool: CopyPool | None = None) -> Any:
    """Returns `value` with every tensor copied to the CPU; tensors that were one memory stay one memory.

    Tied weights must stay recognisable: what writes a model finds them by their address.
    """
    memo = {} if memo is None else memo
    pool = CopyPool() if pool is None else pool
    if isinstance(value, Tensor):
        key = (value.data_ptr(), value.device, value.dtype, value.storage_offset(), tuple(value.shape), value.stride())
        if value.data_ptr() == 0 or key not in memo:
            # The source is kept too: its address must not be given to another tensor meanwhile.
            memo[key] = (value, pool.copy(value))
        return memo[key][1]
    if isinstance(value, dict):
        return {k: snapshot(v, memo, pool) for k, v in value.items()}
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        items = [snapshot(item, memo, pool) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value
