"""The names of files and folders in a checkpoint: those of transformers, and ours beside them."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

# A report and a program read these names too.
from finetune.files import CHECKPOINT_PREFIX as CHECKPOINT_PREFIX
from finetune.files import checkpoint_name as checkpoint_name
from finetune.files import checkpoint_step as checkpoint_step

# transformers' and PEFT's names: another trainer finds what it looks for.
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
PICKLED_WEIGHTS = "pytorch_model.bin"
PICKLED_WEIGHTS_INDEX = "pytorch_model.bin.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLED_ADAPTER_WEIGHTS = "adapter_model.bin"
OPTIMIZER = "optimizer.pt"
SCHEDULER = "scheduler.pt"
SCALER = "scaler.pt"
TRAINER_STATE = "trainer_state.json"
TRAINING_ARGS = "training_args.bin"
INCOMPLETE_SENTINEL = "checkpoint-is-incomplete.txt"

# Ours.
MANIFEST = "manifest.json"
STAGING = ".staging"
STAGED = ".staged"  # in a staging folder since it was made: a folder that vanished and came back has lost it
LATEST, BEST = "latest", "best"

_RNG = re.compile(r"^rng_state(?:_(\d+))?\.pth$")
_STATEFUL = re.compile(r"^finetune_state(?:_(\d+))?\.pt$")

LOADED_FILES = frozenset(
    {WEIGHTS, WEIGHTS_INDEX, PICKLED_WEIGHTS, PICKLED_WEIGHTS_INDEX, ADAPTER_WEIGHTS, PICKLED_ADAPTER_WEIGHTS}
    | {OPTIMIZER, SCHEDULER, SCALER, TRAINER_STATE, INCOMPLETE_SENTINEL}
)
"""Files that a resume reads by name. One that the manifest does not list makes the checkpoint invalid."""


def rng_name(rank: int, world_size: int) -> str:
    """Returns the file of process `rank`'s random state, as transformers names it."""
    return "rng_state.pth" if world_size <= 1 else f"rng_state_{rank}.pth"


def stateful_name(rank: int, world_size: int) -> str:
    """Returns the file of process `rank`'s other state: data cursor, counters, meters."""
    return "finetune_state.pt" if world_size <= 1 else f"finetune_state_{rank}.pt"


def stateful_files(folder: Path) -> list[Path]:
    """Returns the files written under the names of `stateful_name`, by rank."""
    return [folder / name for _, name in sorted(_ranked(folder, _STATEFUL))]


def rng_ranks(folder: Path) -> list[int]:
    """Returns the ranks whose random state is in `folder`: [0] for a run of one process."""
    return sorted(rank for rank, _ in _ranked(folder, _RNG))


def _ranked(folder: Path, pattern: re.Pattern[str]) -> list[tuple[int, str]]:
    found = ((pattern.match(entry.name), entry.name) for entry in folder.iterdir())
    return [(int(match.group(1) or 0), name) for match, name in found if match]


@dataclass(frozen=True)
class WeightFiles:
    """Which weights a folder holds.

    `full`: files of the whole model (one, or the shards of an index). `adapters`: PEFT adapter name to the folder
    with its `adapter_model.*`; PEFT writes the adapter called `default` into the folder itself. `sharded`: the
    folder has the per-process format of FSDP or DeepSpeed.
    """

    full: tuple[Path, ...]
    adapters: dict[str, Path]
    sharded: bool

    def __bool__(self) -> bool:
        return bool(self.full or self.adapters or self.sharded)


def find_weights(folder: Path) -> WeightFiles:
    """Returns the weights in `folder`. Prefers safetensors; does not read tensors.

    Raises:
        ValueError: an index that is not JSON, or that names files outside `folder`.
    """
    full: tuple[Path, ...] = ()
    for single, index in ((WEIGHTS, WEIGHTS_INDEX), (PICKLED_WEIGHTS, PICKLED_WEIGHTS_INDEX)):
        if (folder / single).is_file():
            full = (folder / single,)
        elif (folder / index).is_file():
            full = _shards(folder / index)
        if full:
            break
    adapters = {"default": folder} if adapter_file(folder) else {}
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and adapter_file(entry):
            adapters[entry.name] = entry
    return WeightFiles(full, adapters, bool(sharded_parts(folder)))


def adapter_file(folder: Path) -> Path | None:
    """Returns the PEFT weights in `folder`, None when there are none."""
    for name in (ADAPTER_WEIGHTS, PICKLED_ADAPTER_WEIGHTS):
        if (folder / name).is_file():
            return folder / name
    return None


def sharded_parts(folder: Path) -> list[Path]:
    """Returns what FSDP (`pytorch_model_fsdp*`) and DeepSpeed (`global_step*`) wrote into `folder`."""
    return sorted(p for pattern in ("pytorch_model_fsdp*", "global_step*") for p in folder.glob(pattern))


def holds_only_shards(folder: Path) -> bool:
    """Returns whether FSDP or DeepSpeed wrote the model into `folder` and no whole weights are beside it."""
    if not sharded_parts(folder):
        return False
    found = find_weights(folder)
    return not (found.full or found.adapters)


def _shards(index: Path) -> tuple[Path, ...]:
    weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"`{index.name}` names `{name}`, which is not a file of its own folder")
    return tuple(index.parent / name for name in names)
