"""Weights that ZeRO-3 divides over the processes while a model is loaded, before there is an engine to gather them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def whole_where_used(model: nn.Module) -> Iterator[None]:
    """Context manager: each module gathers the weights that ZeRO-3 divided while it computes with them.

    One module at a time, as DeepSpeed itself does later: the whole model may not fit into one device. All processes
    must run the same modules in the same order.
    """
    own = {module: [*module.parameters(recurse=False)] for module in model.modules()}
    divided = {module: each for module, each in own.items() if any(hasattr(p, "ds_id") for p in each)}
    if not divided:
        yield
        return
    import deepspeed

    gathered: list[Any] = []

    def gather(module: nn.Module, *_: Any) -> None:
        gathered.append(deepspeed.zero.GatheredParameters(divided[module]))
        gathered[-1].__enter__()

    def release(*_: Any) -> None:
        gathered.pop().__exit__(None, None, None)

    hooks = [each.register_forward_pre_hook(gather) for each in divided]
    hooks += [each.register_forward_hook(release, always_call=True) for each in divided]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
