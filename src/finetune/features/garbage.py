"""Python's cycle collector during training: rare, instead of in the middle of any step."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

# Container allocations between two collections of the youngest generation; Python's default is 700 to 2,000.
_YOUNG = 50_000


@contextmanager
def garbage_control(empty_cache_steps: int | None = None) -> Iterator[None]:
    """Collects seldom inside the block; the collector's settings return afterwards.

    What survives the first full collection in the block (model, tokenizer, dataset: millions of objects) is set aside,
    so that no later one walks over it, and ranks do not pause one after the other. With `empty_cache_steps`
    (`args.torch_empty_cache_steps`) the user is short of device memory: then nothing is changed, because emptying the
    cache frees only tensors that were collected.
    """
    if empty_cache_steps is not None or not gc.isenabled():
        yield
        return
    before = gc.get_threshold()
    frozen = gc.get_freeze_count()

    def set_aside(phase: str, info: dict[str, int]) -> None:
        # Not at the start: what nobody holds any more would be kept, unless it were collected first, which takes 0.3 s.
        if phase == "stop" and info["generation"] == 2:
            gc.freeze()

    gc.callbacks.append(set_aside)
    gc.set_threshold(_YOUNG, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(set_aside)
        # `unfreeze` is all or nothing: objects that the user had frozen before stay frozen, with ours.
        if frozen == 0:
            gc.unfreeze()
