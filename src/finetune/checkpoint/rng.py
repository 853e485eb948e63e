"""The states of all random generators, as tensors and plain numbers, in transformers' `rng_state*.pth`."""

import logging
from pathlib import Path
from typing import Any

import torch

from finetune.checkpoint import files, layout
from finetune.data.loading import randomness
from finetune.errors import CheckpointError

logger = logging.getLogger(__name__)

DEVICES = ("cuda", "xpu", "npu", "hpu", "mlu", "musa", "mps")


def capture_rng(distributed: bool = False) -> dict[str, Any]:
    """Returns the state of `random`, `numpy.random`, torch on the CPU, and each accelerator that is there.

    Keys and structure are those of transformers: accelerators give one tensor, or with `distributed` a list with one
    per device of this machine. Taking the states draws nothing.
    """
    states = randomness.plain(randomness.capture())
    for device, module in _available():
        every = getattr(module, "get_rng_state_all", None)
        states[device] = every() if distributed and every is not None else module.get_rng_state()
    return states


def restore_rng(states: dict[str, Any]) -> None:
    """Sets all generators to `states`, as `capture_rng` or transformers' Trainer wrote them.

    Raises:
        CheckpointError: a state is missing or malformed. Accelerators that are not here are left out with a warning.
    """
    try:
        randomness.restore(states)
        here = dict(_available())
        for device, module in here.items():
            if device in states:
                _restore_device(module, states[device])
            else:
                logger.warning("The checkpoint has no random state of `%s`: dropout will differ.", device)
        for device in set(states) & set(DEVICES) - set(here):
            logger.warning("The checkpoint has a random state of `%s`, which is not here.", device)
    except (LookupError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(
            f"The random state in the checkpoint is malformed ({type(error).__name__}: {error}); pass another "
            "`resume_from_checkpoint`."
        ) from error


def save_rng(folder: str | Path, rank: int, world_size: int, distributed: bool | None = None) -> None:
    """Writes this process's random state into `folder`, under transformers' name."""
    states = capture_rng(world_size > 1 if distributed is None else distributed)
    files.save_plain(states, Path(folder) / layout.rng_name(rank, world_size))


def load_rng(folder: str | Path, rank: int, world_size: int) -> bool:
    """Returns whether this process's random state was in `folder`, and was restored.

    It is not when the checkpoint was saved by another number of processes: a warning says so.
    """
    path = Path(folder) / layout.rng_name(rank, world_size)
    if not path.is_file():
        logger.warning(
            "`%s` has no random state for process %d of %d (it was saved by %d): dropout and shuffling will differ "
            "from an uninterrupted run.",
            folder,
            rank,
            world_size,
            len(layout.rng_ranks(Path(folder))),
        )
        return False
    restore_rng(files.load_plain(path, allow=files.numpy_array_globals()))
    return True


def _available() -> list[tuple[str, Any]]:
    found = []
    for device in DEVICES:
        module = getattr(torch, device, None)
        is_available = getattr(module, "is_available", None) or getattr(
            getattr(torch.backends, device, None), "is_available", None
        )
        if module is not None and is_available is not None and is_available():
            found.append((device, module))
    return found


def _restore_device(module: Any, state: Any) -> None:
    if isinstance(state, (list, tuple)):
        if len(state) == module.device_count():
            module.set_rng_state_all(state)
        else:
            logger.warning("Random states of %d devices were saved, %d are here.", len(state), module.device_count())
            for index, one in enumerate(state[: module.device_count()]):
                module.set_rng_state(one, index)
    else:
        module.set_rng_state(state)
