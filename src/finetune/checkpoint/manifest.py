"""What makes a checkpoint complete: a manifest with the size and hash of every file, or transformers' own coherence."""

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.checkpoint import files, layout
from finetune.errors import CheckpointError
from finetune.files import flush

FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`.

    `committed_at` is in seconds since 1970 and grows with each checkpoint of a folder, also when the clock does not.
    `metric` is the value of `metric_for_best_model` at this step, None without an evaluation. `files` maps names
    relative to the checkpoint to `{"bytes": ..., "sha256": ...}`.
    """

    step: int
    committed_at: float
    world_size: int
    model_only: bool
    metric: float | None
    greater_is_better: bool
    files: Mapping[str, Mapping[str, Any]]

    @property
    def num_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(int(entry["bytes"]) for entry in self.files.values())

    def to_json(self) -> str:
        content = {"format": FORMAT, **self.__dict__, "files": {k: dict(v) for k, v in self.files.items()}}
        content["checksum"] = _checksum(content)
        return json.dumps(content, indent=1, sort_keys=True) + "\n"


def _checksum(content: dict[str, Any]) -> str:
    body = json.dumps({k: v for k, v in content.items() if k != "checksum"}, sort_keys=True)
    return hashlib.sha256(body.encode()).hexdigest()


def describe(
    folder: Path, *, step: int, world_size: int, model_only: bool, metric: float | None, greater_is_better: bool
) -> Manifest:
    """Returns the manifest of the files in `folder`, after each was flushed to the disk and hashed.

    Raises:
        CheckpointError: a file is malformed, so that it would be certified damaged.
    """
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != layout.MANIFEST)
    for path in paths:
        problem = files.structural_problem(path)
        if problem:
            raise CheckpointError(
                f"`{path.name}` {problem} right after it was written to `{folder}`: the disk is full or failing. "
                "Free space, or choose another `output_dir`."
            )

    def entry(path: Path) -> dict[str, Any]:
        flush(path)
        return {"bytes": path.stat().st_size, files.HASH: files.digest(path)}

    entries = files.map_files(entry, paths)
    names = [path.relative_to(folder).as_posix() for path in paths]
    return Manifest(
        step, time.time(), world_size, model_only, metric, greater_is_better, dict(zip(names, entries, strict=True))
    )


def read_manifest(folder: Path) -> Manifest | None:
    """Returns the manifest in `folder`, None when there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        content = json.loads((folder / layout.MANIFEST).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise CheckpointError(f"{layout.MANIFEST} has format {content['format']}, this version reads {FORMAT}")
        if content.pop("checksum") != _checksum(content):
            raise CheckpointError(f"{layout.MANIFEST} is damaged (its own checksum differs)")
        del content["format"]
        return Manifest(**content)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(f"{layout.MANIFEST} is damaged ({type(error).__name__})") from error


_verified: set[tuple[Any, ...]] = set()


def find_problem(folder: Path, deep: bool = True) -> str | None:
    """Returns why `folder` cannot be resumed from, None when it can.

    A folder with a manifest must hold exactly what the manifest says; one without must be a coherent checkpoint of
    transformers. `deep` hashes every file; a folder that did not change since it was hashed is not hashed again.
    """
    if not folder.is_dir():
        return "is not a folder" if folder.exists() else "does not exist"
    try:
        if not any(folder.iterdir()):
            return "is empty"
        if (folder / layout.INCOMPLETE_SENTINEL).exists():
            return f"was never finished (`{layout.INCOMPLETE_SENTINEL}` is in it)"
        manifest = read_manifest(folder)
        if manifest is not None:
            return _manifest_problem(folder, manifest, deep)
        if layout.stateful_files(folder):
            return f"{layout.MANIFEST} is missing"
        return foreign_problem(folder, deep)
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"cannot be read ({error})"


def _manifest_problem(folder: Path, manifest: Manifest, deep: bool) -> str | None:
    named = layout.checkpoint_step(folder)
    if named is not None and named != manifest.step:
        return f"its name says step {named} and its manifest step {manifest.step}"
    stats: list[Any] = [str(folder.resolve())]
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        stat = path.stat()
        if stat.st_size != entry["bytes"]:
            return f"{name} has {stat.st_size} bytes instead of {entry['bytes']} (truncated or replaced)"
        stats.append((name, stat.st_size, stat.st_mtime_ns, stat.st_ino, entry[files.HASH]))
    for path in folder.iterdir():
        if path.name in layout.LOADED_FILES and path.name not in manifest.files:
            return f"{path.name} is not in its manifest: somebody put it there"
    if not deep or tuple(stats) in _verified:
        return None
    names = list(manifest.files)
    for name, found in zip(names, files.map_files(files.digest, [folder / n for n in names]), strict=True):
        if found != manifest.files[name][files.HASH]:
            return f"{name} is damaged (its hash differs from the manifest)"
    _verified.add(tuple(stats))
    return None


def foreign_problem(folder: Path, deep: bool = True) -> str | None:
    """Returns what is incoherent in a checkpoint without a manifest, written by transformers' Trainer; None if nothing.

    Such a checkpoint has no hashes. Found are missing and truncated files, and, when `deep`, damage inside files that
    torch wrote, from their own checksums; a flipped bit inside safetensors cannot be seen.
    """
    if not (folder / layout.TRAINER_STATE).is_file():
        return f"{layout.TRAINER_STATE} is missing"
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != layout.TRAINING_ARGS:
            problem = files.structural_problem(path, read_all=deep)
            if problem:
                return f"{path.relative_to(folder)} {problem}"
    try:
        step = json.loads((folder / layout.TRAINER_STATE).read_text(encoding="utf-8"))["global_step"]
        weights = layout.find_weights(folder)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{layout.TRAINER_STATE} or the index of the weights is damaged ({type(error).__name__})"
    named = layout.checkpoint_step(folder)
    if named is not None and named != step:
        return f"its name says step {named} and {layout.TRAINER_STATE} step {step}"
    if not weights:
        return "no weights are in it"
    lost = [path.name for path in weights.full if not path.is_file()]
    if lost:
        return f"{', '.join(lost)} is missing"
    return _state_files_problem(folder, weights)


def _state_files_problem(folder: Path, weights: layout.WeightFiles) -> str | None:
    if not weights.sharded:
        present = [(folder / name).is_file() for name in (layout.OPTIMIZER, layout.SCHEDULER)]
        if any(present) != all(present):
            return f"{(layout.OPTIMIZER, layout.SCHEDULER)[present.index(False)]} is missing"
        if layout.rng_ranks(folder) and not any(present):
            return f"{layout.OPTIMIZER} and {layout.SCHEDULER} are missing"
    ranks = layout.rng_ranks(folder)
    absent = sorted(set(range(max(ranks, default=-1) + 1)) - set(ranks))
    return f"{layout.rng_name(absent[0], 2)} of process {absent[0]} is missing" if absent else None
