"""Saves that the file system refuses: a real small file system, a size limit, a vanished or read-only folder."""

import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.checkpoint import manager
from finetune.checkpoint.manifest import find_problem
from finetune.checkpoint.store import CheckpointStore
from finetune.errors import ArgumentError, CheckpointError

SIZE = 256  # KiB; a checkpoint of the tiny run takes about 50


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of `SIZE` KiB, mounted for the test."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def no_preflight(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when others fill the disk during the save."""
    monkeypatch.setattr(CheckpointStore, "require_space", lambda self, num_bytes: None)


def intact(out: Path, *steps: int) -> bool:
    there = sorted(int(p.name.split("-")[1]) for p in out.glob("checkpoint-*"))
    return there == list(steps) and all(find_problem(out / f"checkpoint-{s}") is None for s in steps)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_full_disk(small_disk: Path, no_preflight: None, tiny_run: Any, asynchronous: bool, same: Any) -> None:
    run = tiny_run(small_disk / "run", asynchronous=asynchronous)
    run.train(1).save()
    run.writer.wait()
    with pytest.raises(CheckpointError, match=r"No space left on device.*free there") as caught:
        for _ in range(20):
            run.train(1).save()
            run.writer.wait()
    assert "`output_dir`" in str(caught.value) and "untouched" in str(caught.value)
    failed = run.events.state.global_step
    assert failed > 2, "some saves fitted"
    assert intact(run.out, *range(1, failed)) and not (run.out / ".staging").exists()
    shutil.rmtree(run.out / "checkpoint-1")
    run.save()
    run.writer.wait()
    assert intact(run.out, *range(2, failed + 1)), "there is space again"


@pytest.mark.parametrize("free_kib", [4, 8, 12, 16, 24, 32, 40])
def test_disk_that_fills_up_at_any_file(
    small_disk: Path, no_preflight: None, tiny_run: Any, free_kib: int, same: Any
) -> None:
    run = tiny_run(small_disk / "run").train(1)
    run.save()
    usage = shutil.disk_usage(small_disk)
    (small_disk / "ballast").write_bytes(b"\0" * (usage.free - free_kib * 1024))
    with pytest.raises(CheckpointError, match="No space left on device"):
        run.train(1).save()
    assert intact(run.out, 1)
    resumed = tiny_run(small_disk / "run")
    assert resumed.resume(True) == str(run.out / "checkpoint-1")
    (small_disk / "ballast").unlink()
    assert same(resumed.train(1).everything(), tiny_run(small_disk / "other").train(2).everything())


def test_preflight_refuses_before_writing(small_disk: Path, tiny_run: Any) -> None:
    run = tiny_run(small_disk / "run").train(1)
    with pytest.raises(CheckpointError, match=r"needs about 1\.0 MiB"):
        run.save()
    assert not run.out.exists()


def test_full_disk_and_a_policy_of_going_on(small_disk: Path, no_preflight: None, tiny_run: Any) -> None:
    run = tiny_run(small_disk / "run", on_save_failure="continue")
    reports = [run.train(1).save() for _ in range(20)]
    assert reports[0].error is None and "No space" in str(reports[-1].error)
    good = [report.step for report in reports if report.error is None]
    assert intact(run.out, *good)


def test_a_smaller_limit_keeps_the_disk_from_filling(small_disk: Path, no_preflight: None, tiny_run: Any) -> None:
    run = tiny_run(small_disk / "run", save_total_limit=1)
    for _ in range(20):
        run.train(1).save()
    assert intact(run.out, 20)


def test_read_only_mount(small_disk: Path, tiny_run: Any, no_preflight: None) -> None:
    run = tiny_run(small_disk / "run").train(1)
    run.save()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    try:
        with pytest.raises(CheckpointError, match="Read-only file system"):
            run.train(1).save()
        with pytest.raises(ArgumentError, match=r"`output_dir`.*Read-only"):
            manager.require_writable(run.out)
        assert intact(run.out, 1)
        assert tiny_run(small_disk / "run").resume(True) == str(run.out / "checkpoint-1"), "reading needs no writing"
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)


@pytest.mark.parametrize("call", ["fsync", "replace", "rename"])
def test_file_system_fails_at_the_very_end(tiny_run: Any, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run().train(1)
    run.save()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(*((Path, "rename") if call == "rename" else (os, call)), fail)
        with pytest.raises(CheckpointError, match="Read-only file system"):
            run.train(1).save()
    assert intact(run.out, 1)
    run.save()
    assert intact(run.out, 1, 2) and not (run.out / ".staging").exists()


@pytest.mark.parametrize("limit", [100, 700, 2000, 3000])
def test_file_size_limit(tiny_run: Any, limit: int) -> None:
    """Needs no root: the system cuts every file at `limit` bytes."""
    run = tiny_run().train(1)
    run.save()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"could not be written|right after it was written"):
            run.train(1).save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert intact(run.out, 1)
    run.save()
    assert intact(run.out, 1, 2)


@pytest.mark.parametrize("when", ["save_model", "_save_scaler", "_save_rng_state"])
@pytest.mark.parametrize("what", ["staging", "run"])
def test_folder_vanishes_during_the_save(tiny_run: Any, when: str, what: str, tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "keep" / "run").train(1)
    run.save()
    real = getattr(run, when)

    def vanish(folder: str, *args: Any, **kwargs: Any) -> None:
        shutil.rmtree(folder if what == "staging" else run.out)
        real(folder, *args, **kwargs)

    setattr(run, when, vanish)
    with pytest.raises(CheckpointError, match="could not be written"):
        run.train(1).save()
    assert not (run.out / "checkpoint-2").exists()
    setattr(run, when, real)
    run.save()
    assert find_problem(run.out / "checkpoint-2") is None
    assert what == "run" or intact(run.out, 1, 2)


def test_a_file_where_the_folder_should_be(tiny_run: Any, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(CheckpointError, match=r"Not a directory|File exists"):
        tiny_run().train(1).save()
    assert os.listdir(tmp_path) == ["run"]
