"""`torch.compile` block by block: the decoder layers of a model, in place, for the time of a run.

Equal layers share one compiled graph, so a model of thirty layers compiles as fast as one of one layer, and embedding,
head and loss stay as they are. `Module.compile` wraps the call and not the module: no name in a state dict changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from finetune.errors import ArgumentError, nearest

_CALL = "_compiled_call_impl"
_MARK = "_dynamo_static_input_type"  # what Dynamo writes on the parameters of a module it compiles


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Returns the members of the outermost module lists of `model`: the layers of a transformer."""
    lists: list[str] = []
    blocks: list[nn.Module] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists.append(name)
            blocks += list(module)
    return blocks


class GraphCount:
    """How many graphs were compiled since the block was entered. More than a few: shapes change too often."""

    def __init__(self) -> None:
        self._before = _unique_graphs()

    def logs(self) -> dict[str, float]:
        """Returns the count under the name it has in the log."""
        return {"compiled_graphs": float(_unique_graphs() - self._before)}


def _unique_graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


@contextmanager
def compiled_blocks(model: nn.Module, *, backend: str, mode: str | None = None) -> Iterator[GraphCount]:
    """Compiles the repeated blocks of `model` inside the block, or the whole model if it has none.

    A second sequence length makes torch compile once more, for any length; see `length_bucket` for what is left.
    Afterwards every module is called as before. Compilation happens at the first call of a module.

    Raises `ArgumentError` for a backend that torch does not know.
    """
    _check_backend(backend)
    targets = repeated_blocks(model) or [model]
    before = [module.__dict__.get(_CALL) for module in targets]
    unmarked = [p for p in model.parameters() if _MARK not in vars(p)]
    count = GraphCount()
    try:
        for module in targets:
            module.compile(backend=backend, mode=mode)
        yield count
    finally:
        for module, call in zip(targets, before, strict=True):
            if call is None:
                module.__dict__.pop(_CALL, None)
            else:
                module.__dict__[_CALL] = call
        for parameter in unmarked:
            vars(parameter).pop(_MARK, None)


def _check_backend(backend: str) -> None:
    from torch._dynamo.exc import InvalidBackend

    try:
        torch._dynamo.lookup_backend(backend)
    except InvalidBackend as error:
        known = torch._dynamo.list_backends(exclude_tags=())
        raise ArgumentError(
            f"`torch_compile_backend` is {backend!r}, which torch does not know.{nearest(backend, known)} Known: "
            f"{', '.join(sorted(known))}."
        ) from error


def length_bucket(max_length: int | None, positions: int | None = None) -> int:
    """Returns the multiple that compiled batches are padded to: at most eight lengths up to `max_length`.

    Smaller where padding the longest row would need more than `positions`, the most that the model has.

    >>> length_bucket(4096), length_bucket(192), length_bucket(None), length_bucket(100, 120)
    (512, 64, 64, 16)
    """
    bucket = 64
    while max_length is not None and bucket * 8 < max_length:
        bucket *= 2
    longest = max_length or positions or 0
    while positions is not None and bucket > 1 and -(-longest // bucket) * bucket > max(positions, longest):
        bucket //= 2
    return bucket
