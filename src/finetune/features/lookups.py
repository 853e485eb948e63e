"""Answers that cannot change during a run, asked once instead of at every step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def settled_lookups() -> Iterator[None]:
    """Inside the block, accelerate's optimizer knows whether LOMO is installed; afterwards it looks again.

    Its `step` searches the import path for the package twice per call, about a millisecond, as much as everything else
    that a trainer does around a small model.
    """
    import accelerate.optimizer

    module: Any = accelerate.optimizer
    look = getattr(module, "is_lomo_available", None)
    if look is None:
        yield
        return
    found = look()
    module.is_lomo_available = lambda: found
    try:
        yield
    finally:
        module.is_lomo_available = look
