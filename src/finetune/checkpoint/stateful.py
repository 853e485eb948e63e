"""Everything else that belongs into a checkpoint: data cursor, counters, meters."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from finetune.checkpoint import backends, files, layout
from finetune.errors import CheckpointError


@runtime_checkable
class Stateful(Protocol):
    """Anything whose state belongs into a checkpoint. States are tensors and plain values, one per process.

    An object whose state can be re-divided over another number of processes also has
    `load_state_dicts(states: list[dict])`, which gets the states of all processes, by rank.
    """

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def save_stateful(folder: Path, stateful: Mapping[str, Stateful], *, rank: int, world_size: int) -> None:
    """Writes this process's states of `stateful` into `folder`. The file is written also when there are none."""
    content = {"format": 1, "world_size": world_size, "states": {n: item.state_dict() for n, item in stateful.items()}}
    files.save_plain(content, folder / layout.stateful_name(rank, world_size))


def load_stateful(checkpoint: str | Path, stateful: Mapping[str, Stateful], *, rank: int, world_size: int) -> list[str]:
    """Restores `stateful` from `checkpoint`. Returns the names that were in it; the others keep their state.

    transformers' checkpoints have none. With another number of processes than before, an object gets all states if it
    takes them (`load_state_dicts`), and its state if it was the same on all.

    Raises:
        CheckpointError: a state cannot be re-divided over the processes of this run.
    """
    folder = Path(checkpoint)
    own = folder / layout.stateful_name(rank, world_size)
    with backends.restoring(folder):
        content: dict[str, Any] = files.load_plain(own) if own.is_file() else {"world_size": 0}
        if content["world_size"] == world_size:
            return _load_own(dict(content["states"]), stateful)
        contents = [files.load_plain(path) for path in layout.stateful_files(folder)]
        states = [dict(content["states"]) for content in contents]
    restored: list[str] = []
    for name, item in stateful.items():
        found = [state[name] for state in states if name in state]
        if not found:
            continue
        with backends.restoring(folder):
            if hasattr(item, "load_state_dicts"):
                item.load_state_dicts(found)  # pyright: ignore[reportAttributeAccessIssue]
            elif all(_equal(found[0], other) for other in found[1:]):
                item.load_state_dict(found[0])
            else:
                raise CheckpointError(
                    f"The checkpoint was saved by {len(states)} processes, and the state of `{name}` cannot be divided "
                    f"over {world_size}. Resume with {len(states)} processes."
                )
        restored.append(name)
    return restored


def _load_own(states: dict[str, Any], stateful: Mapping[str, Stateful]) -> list[str]:
    present = [name for name in stateful if name in states]
    for name in present:
        stateful[name].load_state_dict(states[name])
    return present


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return isinstance(left, Tensor) and isinstance(right, Tensor) and files.same_bits(left, right)
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_equal(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(map(_equal, left, right))
    return bool(left == right)
