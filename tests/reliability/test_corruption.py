"""Damage to every file of a checkpoint: never a wrong resume, never an error without a clear message.

Each case damages one file of the newest of two checkpoints. Resuming by `True` must skip it, name it, and end bit for
bit as an uninterrupted run; resuming by its path must be a `CheckpointError` that names the file. With the manifest
taken away (a checkpoint as transformers writes them) and nothing verified, the loaders themselves must either refuse
or load what was saved; only there a flipped bit inside safetensors is out of reach.
"""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import CheckpointError

FILES = (
    "finetune_state.pt", "manifest.json", "model.safetensors", "optimizer.pt", "optimizer_layout.json", "rng_state.pth",
    "scheduler.pt", "trainer_state.json", "training_args.bin",
)  # fmt: skip


def truncate(part: float) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, min(int(path.stat().st_size * part), path.stat().st_size - 1))


def flip(seed: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        rng = random.Random(f"{seed}{path.name}")
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)

    return damage


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def noise(path: Path) -> None:
    path.write_bytes(random.Random(path.name).randbytes(path.stat().st_size))


def of_the_other_checkpoint(path: Path) -> None:
    other = path.parent.parent / "checkpoint-2" / path.name
    assert other.read_bytes() != path.read_bytes() or path.name in ("training_args.bin", "optimizer_layout.json")
    shutil.copyfile(other, path)


def of_the_next_file(path: Path) -> None:
    shutil.copyfile(path.parent / FILES[(FILES.index(path.name) + 1) % len(FILES)], path)


def a_folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "delete": Path.unlink,
    "empty": truncate(0),
    "half": truncate(0.5),
    "last-byte": truncate(1),
    **{f"flip-{seed}": flip(seed) for seed in range(10)},
    "append": append,
    "noise": noise,
    "of-the-other-checkpoint": of_the_other_checkpoint,
    "of-the-next-file": of_the_next_file,
    "folder": a_folder_instead,
}
# The same content in both checkpoints, and a line feed at the end.
HARMLESS = {("training_args.bin", "of-the-other-checkpoint"), ("optimizer_layout.json", "of-the-other-checkpoint")}
HARMLESS.add(("manifest.json", "last-byte"))
CASES = [(name, damage) for name in FILES for damage in DAMAGES if (name, damage) not in HARMLESS]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, run_class: Any) -> Path:
    """Two checkpoints, after 2 and 4 steps."""
    run = run_class(tmp_path_factory.mktemp("saved") / "run")
    run.train(2).save(), run.train(2).save()
    assert tuple(sorted(p.name for p in (run.out / "checkpoint-4").iterdir())) == FILES
    return run.out


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, run_class: Any) -> Any:
    """The end of a run of 5 steps that nothing interrupted."""
    return run_class(tmp_path_factory.mktemp("whole")).train(5).everything()


def test_there_are_enough_cases() -> None:
    assert 2 * len(CASES) >= 200


@pytest.mark.parametrize(("name", "damage"), CASES)
def test_damaged_file(
    name: str, damage: str, saved: Path, expected: Any, tmp_path: Path, tiny_run: Any, same: Any, caplog: Any
) -> None:
    out = tmp_path / "run"
    shutil.copytree(saved, out)
    DAMAGES[damage](out / "checkpoint-4" / name)
    run = tiny_run(out)
    with pytest.raises(CheckpointError, match=name.split(".")[0]):
        run.resume(str(out / "checkpoint-4"))
    assert run.resume(True) == str(out / "checkpoint-2")
    skipped = next(record.message for record in caplog.records if "Not resuming from `checkpoint-4`" in record.message)
    assert name.split(".")[0] in skipped
    assert same(run.train(3).everything(), expected)


@pytest.mark.parametrize(("name", "damage"), [case for case in CASES if case[0] not in ("manifest.json",)])
def test_damaged_file_without_any_verification(
    name: str, damage: str, saved: Path, expected: Any, tmp_path: Path, tiny_run: Any, same: Any
) -> None:
    folder = tmp_path / "run" / "checkpoint-4"
    shutil.copytree(saved, folder.parent)
    DAMAGES[damage](folder / name)
    (folder / "manifest.json").unlink()
    run = tiny_run(tmp_path / "run")
    try:
        run.load(str(folder), verify=False)
    except CheckpointError as error:
        assert str(folder) in str(error) or "random state" in str(error)
        return
    if damage in ("empty", "half", "of-the-next-file"):  # damage that shows without hashes
        assert same(run.train(1).everything(), expected), "the file is not needed"


def test_undamaged_resumes(saved: Path, expected: Any, tmp_path: Path, tiny_run: Any, same: Any) -> None:
    shutil.copytree(saved, tmp_path / "run")
    run = tiny_run()
    assert run.resume(True) == str(tmp_path / "run" / "checkpoint-4")
    assert same(run.train(1).everything(), expected)


@pytest.mark.parametrize("what", ["swap-folders", "swap-file", "empty-folder", "extra-weights", "empty-newest", "file"])
def test_damaged_folder(what: str, saved: Path, tmp_path: Path, tiny_run: Any) -> None:
    out = tmp_path / "run"
    shutil.copytree(saved, out)
    old, new = out / "checkpoint-2", out / "checkpoint-4"
    good: str | None = str(new)
    if what == "swap-folders":
        old.rename(out / "x"), new.rename(old), (out / "x").rename(new)
        good = None
    elif what == "swap-file":
        for name in ("x", "y"):
            shutil.copyfile((old if name == "x" else new) / "optimizer.pt", out / name)
        shutil.copyfile(out / "x", new / "optimizer.pt"), shutil.copyfile(out / "y", old / "optimizer.pt")
        good = None
    elif what == "empty-folder":
        (out / "checkpoint-999").mkdir()
    elif what == "empty-newest":
        shutil.rmtree(new), new.mkdir()
        good = str(old)
    elif what == "extra-weights":
        shutil.copyfile(old / "model.safetensors", new / "adapter_model.safetensors")
        good = str(old)
    elif what == "file":
        shutil.rmtree(new), new.write_text("not a folder")
        good = str(old)
    if good is None:
        with pytest.raises(CheckpointError, match="no valid checkpoint"):
            tiny_run(out).resume(True)
    else:
        assert tiny_run(out).resume(True) == good
