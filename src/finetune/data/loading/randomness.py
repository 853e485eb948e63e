"""The random generators of this process, and what a batch drew from them when it was fetched.

Collators and datasets may draw random numbers: masks of a masked language model, augmented rows. Loaders fetch one
batch ahead, so the next batch of a checkpoint has been drawn before the checkpoint's own random state was taken.
`FetchRandomness` keeps the state from before each fetch, and a resumed run draws that batch from it again.
"""

from __future__ import annotations

import ctypes
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def capture() -> dict[str, Any]:
    """Returns the states of `random`, `numpy.random` and torch on the CPU, as `restore` takes them. Draws nothing."""
    return {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}


def plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a captured state as a tensor and plain numbers, which a safe load reads."""
    version, internal, gauss = state["python"]
    name, keys, position, has_gauss, cached = state["numpy"]
    return {
        "python": (version, tuple(internal), gauss),
        "numpy": (str(name), [int(key) for key in keys], int(position), int(has_gauss), float(cached)),
        "cpu": state["cpu"],
    }


def restore(state: Mapping[str, Any]) -> None:
    """Sets the generators to a state from `capture` or `plain`. Raises what they raise on a malformed one."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.random.set_rng_state(state["cpu"])


@contextmanager
def fixed() -> Iterator[None]:
    """Seeds the generators with 0 within the context; outside nobody notices the draws."""
    before = capture()
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)
    try:
        yield
    finally:
        restore(before)


class _NumpyState:
    """`numpy.random.get_state()` before each fetch; copied anew only when the generator was used, which takes 30 us.

    The Mersenne Twister's memory tells, unless a second normal number is waiting to be handed out.
    """

    def __init__(self) -> None:
        self._memory: bytes | None = None
        self._state: Any = None

    def get(self) -> Any:
        generator: Any = np.random.get_bit_generator()  # pyright: ignore[reportAttributeAccessIssue]
        if type(generator) is not np.random.MT19937:
            return np.random.get_state()
        memory = ctypes.string_at(generator.ctypes.state_address, 625 * 4)  # 624 words and the place among them
        if memory != self._memory:
            self._state = np.random.get_state()
            has_gauss = self._state[3]
            self._memory = None if has_gauss else memory
        return self._state


class FetchRandomness:
    """The random states from before the last fetches of a loader without workers, by the number of the batch.

    An uninterrupted run that saves behind batch 2 has fetched batch 3 in state A, saves in state B, and fetches
    batch 4 in state B. A resumed run fetches both at once: `replay(3, A, then=<set state B>)` makes it do so in the
    same states.
    """

    def __init__(self, num_kept: int) -> None:
        self.num_kept = num_kept
        self._numpy = _NumpyState()
        self._before: OrderedDict[int, dict[str, Any]] = OrderedDict()
        self._replay: tuple[int, Mapping[str, Any] | None, Callable[[], None]] | None = None

    def start_epoch(self) -> None:
        """Forgets the numbers of the epoch before."""
        self._before.clear()

    def before_fetch(self, number: int) -> None:
        """Must be called right before batch `number` of the epoch is fetched."""
        if self._replay is not None:
            first, state, then = self._replay
            if number == first and state is not None:
                restore(state)
            else:
                self._replay = None
                then()
        self._before[number] = {
            "python": random.getstate(),
            "numpy": self._numpy.get(),
            "cpu": torch.get_rng_state(),
        }
        if len(self._before) > self.num_kept:
            self._before.popitem(last=False)

    def of(self, number: int) -> dict[str, Any] | None:
        """Returns the state in which batch `number` was fetched, in plain values; None when it was not, yet."""
        state = self._before.get(number)
        return None if state is None else plain(state)

    def replay(self, number: int, state: Mapping[str, Any] | None, then: Callable[[], None]) -> None:
        """Lets the next fetch, of batch `number`, draw from `state`, and calls `then` before the one after it.

        Without a state the batch had not been fetched when the checkpoint was written: `then` comes before it.
        """
        self._replay = (number, state, then)
