import json
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune.checkpoint import files, layout
from finetune.checkpoint.lock import FolderLock, folder_lock
from finetune.checkpoint.manifest import find_problem, read_manifest
from finetune.checkpoint.retention import Checkpoint, Retention
from finetune.checkpoint.store import CheckpointStore, require_writable
from finetune.errors import ArgumentError, CheckpointError


def commit(store: CheckpointStore, step: int, **facts: Any) -> Path:
    staging = store.stage(step)
    (staging / layout.TRAINER_STATE).write_text(json.dumps({"global_step": step}))
    (staging / "notes").mkdir()
    (staging / "notes" / "deep.txt").write_text(f"step {step}")
    return store.commit(staging, **facts).path


def names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


def test_a_checkpoint_appears_at_once_and_leaves_nothing_else(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    staging = store.stage(4)
    assert not (tmp_path / "checkpoint-4").exists() and staging.name == "checkpoint-4"
    (staging / layout.TRAINER_STATE).write_text("{}")
    store.commit(staging)
    assert names(tmp_path) == ["checkpoint-4", "latest"]
    assert (tmp_path / "latest").read_text() == "checkpoint-4\n"
    manifest = read_manifest(tmp_path / "checkpoint-4")
    assert manifest is not None and manifest.step == 4 and list(manifest.files) == [layout.TRAINER_STATE]


def test_discarded_staging_leaves_nothing(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.discard(store.stage(4))
    assert names(tmp_path) == []
    commit(store, 5)


def test_a_malformed_file_is_not_certified(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    staging = store.stage(1)
    (staging / "model.safetensors").write_bytes(b"\x05")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        store.commit(staging)
    assert names(tmp_path) == []


def test_newest_is_by_commit_time_not_by_step(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    commit(store, 20)
    commit(store, 10)  # a run that resumed from before step 10
    assert [c.step for c in store.checkpoints()] == [20, 10]
    assert store.newest_valid() == (tmp_path / "checkpoint-10", [])


def test_commit_times_grow_when_the_clock_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path)
    commit(store, 1)
    monkeypatch.setattr("finetune.checkpoint.manifest.time.time", lambda: 5.0)
    commit(store, 2)
    assert [c.step for c in store.checkpoints()] == [1, 2]


def test_skipped_checkpoints_are_named_with_the_reason(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (1, 2, 3, 4, 5):
        commit(store, step)
    (tmp_path / "checkpoint-5" / "notes" / "deep.txt").unlink()
    path = tmp_path / "checkpoint-4" / "notes" / "deep.txt"
    path.write_text("step 9")
    os.truncate(tmp_path / "checkpoint-3" / layout.MANIFEST, 40)
    (tmp_path / "checkpoint-2" / layout.OPTIMIZER).write_text("smuggled")
    (tmp_path / "checkpoint-999").mkdir()
    newest, skipped = store.newest_valid()
    assert newest == tmp_path / "checkpoint-1"
    text = "\n".join(skipped)
    assert "`checkpoint-5`: notes/deep.txt is missing" in text
    assert "`checkpoint-4`: notes/deep.txt is damaged" in text
    assert "`checkpoint-3`: manifest.json is damaged" in text
    assert "`checkpoint-2`: optimizer.pt is not in its manifest" in text
    assert "`checkpoint-999`: is empty" in text


def test_a_renamed_checkpoint_is_not_another_step(tmp_path: Path) -> None:
    path = commit(CheckpointStore(tmp_path), 3)
    path.rename(tmp_path / "checkpoint-7")
    assert "step 7" in str(find_problem(tmp_path / "checkpoint-7"))
    (tmp_path / "checkpoint-7").rename(tmp_path / "backup")
    assert find_problem(tmp_path / "backup") is None


def test_verified_content_is_hashed_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = commit(CheckpointStore(tmp_path), 3)
    assert find_problem(path) is None
    hashed: list[Path] = []
    digest = files.digest
    monkeypatch.setattr(files, "digest", lambda p: hashed.append(p) or digest(p))
    assert find_problem(path) is None and not hashed
    (path / "notes" / "deep.txt").write_text("step 4")
    assert "damaged" in str(find_problem(path)) and hashed


def test_same_step_again_replaces(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    commit(store, 3, metric=1.0)
    commit(store, 3, metric=2.0)
    manifest = read_manifest(tmp_path / "checkpoint-3")
    assert manifest is not None and manifest.metric == 2.0
    assert names(tmp_path) == ["checkpoint-3", "latest"]


def test_files_of_callbacks_under_the_final_name_survive(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "extra.txt").write_text("of a callback")
    path = commit(CheckpointStore(tmp_path), 3)
    assert (path / "extra.txt").read_text() == "of a callback" and find_problem(path) is None


class TestRetention:
    """Which of steps 1..6 stay, oldest first, with these metrics (smaller is better) and this best step."""

    METRICS = {1: 0.5, 2: 0.1, 3: 0.9, 4: 0.2, 5: None, 6: 0.8}

    @pytest.mark.parametrize(
        ("limits", "best", "kept"),
        [
            ({}, 2, [1, 2, 3, 4, 5, 6]),
            ({"total_limit": 0}, None, [1, 2, 3, 4, 5, 6]),
            ({"total_limit": 1}, None, [6]),
            ({"total_limit": 1}, 2, [2, 6]),  # transformers keeps both too
            ({"total_limit": 2}, 2, [2, 6]),
            ({"total_limit": 3}, 2, [2, 5, 6]),
            ({"total_limit": 3}, None, [4, 5, 6]),
            ({"total_limit": 9}, 2, [1, 2, 3, 4, 5, 6]),
            ({"keep_last": 1}, None, [6]),
            ({"keep_last": 2}, 1, [1, 5, 6]),
            ({"keep_best": 1}, 2, [2, 6]),
            ({"keep_best": 2}, 2, [2, 4, 6]),
            ({"keep_last": 2, "keep_best": 3}, 2, [1, 2, 4, 5, 6]),
            ({"keep_last": 1, "keep_best": 1}, 6, [2, 6]),
        ],
    )
    def test_matrix(self, tmp_path: Path, limits: dict[str, int], best: int | None, kept: list[int]) -> None:
        store = CheckpointStore(tmp_path)
        for step, metric in self.METRICS.items():
            commit(store, step, metric=metric, greater_is_better=False)
        store.rotate(Retention(**limits), None if best is None else str(tmp_path / f"checkpoint-{best}"))
        assert sorted(c.step for c in store.checkpoints()) == kept
        assert set(names(tmp_path)) == {f"checkpoint-{step}" for step in kept} | {"latest"}

    def test_greater_is_better(self, tmp_path: Path) -> None:
        store = CheckpointStore(tmp_path)
        for step, metric in self.METRICS.items():
            commit(store, step, metric=metric, greater_is_better=True)
        store.rotate(Retention(keep_best=2), None)
        assert sorted(c.step for c in store.checkpoints()) == [3, 6]

    def test_what_is_no_number_is_not_among_the_best(self, tmp_path: Path) -> None:
        for greater in (False, True):
            store = CheckpointStore(tmp_path / str(greater))
            for step, metric in {1: 0.5, 2: float("nan"), 3: 0.1, 4: float("inf"), 5: 0.7}.items():
                commit(store, step, metric=metric, greater_is_better=not greater)  # of another run's arguments
            store.rotate(Retention(keep_best=2, greater_is_better=greater), None)
            assert sorted(c.step for c in store.checkpoints()) == ([1, 5] if greater else [1, 3, 5])

    def test_only_the_best_of_one_stays_at_the_end(self, tmp_path: Path) -> None:
        store = CheckpointStore(tmp_path)
        for step in (1, 2, 3):
            commit(store, step)
        store.rotate(Retention(total_limit=1), "checkpoint-9", only_best=True)
        assert [c.step for c in store.checkpoints()] == [3], "one that is not there does not count"
        commit(store, 4)
        store.rotate(Retention(total_limit=1), str(tmp_path / "checkpoint-3"), only_best=True)
        assert [c.step for c in store.checkpoints()] == [3]
        assert (tmp_path / "latest").read_text() == "checkpoint-3\n"

    def test_agrees_with_transformers(self, tmp_path: Path) -> None:
        from transformers.trainer_utils import rotate_checkpoints

        for limit in (1, 2, 3, 4):
            for best in (None, 1, 3, 6):
                theirs, ours = tmp_path / f"t{limit}{best}", tmp_path / f"o{limit}{best}"
                for step in range(1, 7):
                    (theirs / f"checkpoint-{step}").mkdir(parents=True)
                rotate_checkpoints(str(theirs), limit, None if best is None else str(theirs / f"checkpoint-{best}"))
                checkpoints = [Checkpoint(ours / f"checkpoint-{step}", step, None) for step in range(1, 7)]
                gone = Retention(limit).to_delete(checkpoints, best and f"checkpoint-{best}")
                assert {c.path.name for c in checkpoints} - {c.path.name for c in gone} == set(names(theirs))

    def test_damaged_and_foreign_folders_are_neither_counted_nor_deleted(self, tmp_path: Path) -> None:
        store = CheckpointStore(tmp_path)
        for step in (1, 2, 3):
            commit(store, step)
        (tmp_path / "checkpoint-2" / "notes" / "deep.txt").unlink()
        (tmp_path / "checkpoint-best").mkdir()
        (tmp_path / "checkpoint-77").mkdir()
        store.rotate(Retention(total_limit=1), None)
        assert names(tmp_path) == ["checkpoint-2", "checkpoint-3", "checkpoint-77", "checkpoint-best", "latest"]

    def test_two_policies_at_once_are_refused(self) -> None:
        with pytest.raises(ArgumentError, match="save_total_limit"):
            Retention(total_limit=2, keep_last=1)


class TestRecovery:
    def test_unfinished_staging_is_removed(self, tmp_path: Path) -> None:
        (tmp_path / ".staging" / "checkpoint-9").mkdir(parents=True)
        (tmp_path / ".staging" / "checkpoint-9" / "model.safetensors").write_text("half")
        (tmp_path / ".staging" / "checkpoint-9.rank1").write_text("")
        CheckpointStore(tmp_path).recover()
        assert names(tmp_path) == []

    def test_certified_staging_is_moved_into_place(self, tmp_path: Path) -> None:
        path = commit(CheckpointStore(tmp_path), 9)
        (tmp_path / ".staging").mkdir()
        path.rename(tmp_path / ".staging" / "checkpoint-9")
        (tmp_path / "latest").write_text("checkpoint-8\n")
        CheckpointStore(tmp_path).recover()
        assert (tmp_path / "latest").read_text() == "checkpoint-9\n"
        assert find_problem(tmp_path / "checkpoint-9") is None and names(tmp_path) == ["checkpoint-9", "latest"]

    @pytest.mark.parametrize("new_is_good", [True, False])
    def test_crash_between_the_two_renames_of_a_replacement(self, tmp_path: Path, new_is_good: bool) -> None:
        store = CheckpointStore(tmp_path)
        old = commit(store, 9, metric=1.0)
        (tmp_path / ".staging").mkdir()
        old.rename(tmp_path / ".staging" / "replaced-checkpoint-9")
        other = commit(CheckpointStore(tmp_path / "elsewhere"), 9, metric=2.0)
        shutil.move(other, tmp_path / ".staging" / "checkpoint-9")
        if not new_is_good:
            (tmp_path / ".staging" / "checkpoint-9" / "notes" / "deep.txt").write_text("broken")
        store.recover()
        manifest = read_manifest(tmp_path / "checkpoint-9")
        assert manifest is not None and manifest.metric == (2.0 if new_is_good else 1.0)
        assert find_problem(tmp_path / "checkpoint-9") is None

    def test_a_save_clears_what_the_crashed_one_of_its_step_left(self, tmp_path: Path) -> None:
        (tmp_path / ".staging" / "checkpoint-9").mkdir(parents=True)
        (tmp_path / ".staging" / "checkpoint-9" / "old.pt").write_text("half")
        path = commit(CheckpointStore(tmp_path), 9)
        assert not (path / "old.pt").exists() and names(tmp_path) == ["checkpoint-9", "latest"]

    def test_half_deleted_checkpoint_is_removed(self, tmp_path: Path) -> None:
        (tmp_path / ".staging" / "deleted-checkpoint-1").mkdir(parents=True)
        CheckpointStore(tmp_path).recover()
        assert names(tmp_path) == []


def _hold(root: str, ready: Any, done: Any) -> None:
    CheckpointStore(root).stage(1)
    ready.set()
    done.wait(30)
    os._exit(9)  # as if killed: no cleaning up


def test_a_living_writer_is_left_alone_and_a_dead_one_cleaned_up(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(str(tmp_path), ready, done))
    other.start()
    assert ready.wait(60)
    CheckpointStore(tmp_path).recover()
    assert (tmp_path / ".staging" / "checkpoint-1").is_dir()
    with pytest.raises(CheckpointError, match="Another process"):
        folder_lock(tmp_path).acquire(timeout_seconds=0.2)
    done.set()
    other.join()
    CheckpointStore(tmp_path).recover()
    assert names(tmp_path) == []


def test_lock_is_taken_by_one_at_a_time_and_survives_removal_of_its_folder(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    lock.acquire()
    with pytest.raises(CheckpointError):
        lock.acquire(timeout_seconds=0.05)
    lock.release()
    lock.release()
    lock.acquire(timeout_seconds=0)
    shutil.rmtree(tmp_path / ".staging")
    lock.release()
    assert folder_lock(tmp_path) is folder_lock(tmp_path)


class TestPermissions:
    def test_output_dir_below_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(ArgumentError, match="`output_dir`"):
            require_writable(tmp_path / "file" / "run")

    def test_writable_leaves_no_trace(self, tmp_path: Path) -> None:
        require_writable(tmp_path / "a" / "b")
        assert names(tmp_path) == []

    def test_refused_by_the_system(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr(Path, "mkdir", refuse)
        with pytest.raises(ArgumentError, match="Permission denied"):
            require_writable(tmp_path)
        with pytest.raises(CheckpointError, match="Permission denied"):
            CheckpointStore(tmp_path).stage(1)

    def test_space_is_asked_for_before_anything_is_written(self, tmp_path: Path) -> None:
        store = CheckpointStore(tmp_path / "run")
        store.require_space(1 << 10)
        with pytest.raises(CheckpointError, match=r"needs about .* are free"):
            store.require_space(1 << 60)
        assert names(tmp_path) == []


class TestForeign:
    """Checkpoints without a manifest, as transformers writes them."""

    def make(self, root: Path, step: int) -> Path:
        import torch
        from safetensors.torch import save_file

        path = root / f"checkpoint-{step}"
        path.mkdir(parents=True)
        save_file({"w": torch.arange(8.0)}, path / layout.WEIGHTS)
        for name in (layout.OPTIMIZER, layout.SCHEDULER, "rng_state_0.pth", "rng_state_1.pth"):
            torch.save({"x": torch.arange(4.0)}, path / name)
        (path / layout.TRAINER_STATE).write_text(json.dumps({"global_step": step}))
        return path

    def test_coherent_is_valid_and_ordered_by_step(self, tmp_path: Path) -> None:
        for step in (9, 10, 100):
            self.make(tmp_path, step)
        assert CheckpointStore(tmp_path).newest_valid() == (tmp_path / "checkpoint-100", [])

    def test_order_among_ours(self, tmp_path: Path) -> None:
        self.make(tmp_path, 5)
        commit(CheckpointStore(tmp_path), 10)
        self.make(tmp_path, 20)
        assert [c.step for c in CheckpointStore(tmp_path).checkpoints()] == [5, 10, 20]

    @pytest.mark.parametrize(
        ("damage", "reason"),
        [
            (lambda p: (p / layout.WEIGHTS).unlink(), "no weights"),
            (lambda p: os.truncate(p / layout.WEIGHTS, 90), "header says"),
            (lambda p: os.truncate(p / layout.OPTIMIZER, 500), r"optimizer\.pt is truncated"),
            (lambda p: os.truncate(p / layout.SCHEDULER, 0), r"scheduler\.pt is empty"),
            (lambda p: (p / layout.OPTIMIZER).unlink(), r"optimizer\.pt is missing"),
            (lambda p: (p / "rng_state_0.pth").unlink(), "process 0 is missing"),
            (lambda p: (p / layout.TRAINER_STATE).unlink(), r"trainer_state\.json is missing"),
            (lambda p: (p / layout.TRAINER_STATE).write_text("{"), r"trainer_state\.json is truncated"),
            (lambda p: (p / layout.TRAINER_STATE).write_text('{"global_step": 3}'), "step 3"),
            (lambda p: (p / layout.TRAINER_STATE).write_text("[]"), "damaged"),
            (lambda p: (p / layout.INCOMPLETE_SENTINEL).write_text(""), "never finished"),
            (lambda p: (p / layout.WEIGHTS).rename(p / "model-00001-of-00002.safetensors"), "no weights"),
        ],
    )
    def test_incoherent(self, tmp_path: Path, damage: Any, reason: str) -> None:
        path = self.make(tmp_path, 5)
        assert find_problem(path) is None
        damage(path)
        import re

        assert re.search(reason, str(find_problem(path)))

    def test_flipped_bit_in_a_torch_file(self, tmp_path: Path) -> None:
        path = self.make(tmp_path, 5) / layout.OPTIMIZER
        content = bytearray(path.read_bytes())
        place = content.find(b"\x00\x00\x80\x3f")  # the tensor's 1.0
        content[place] ^= 1
        path.write_bytes(content)
        assert "optimizer.pt is damaged" in str(find_problem(path.parent))

    def test_index_may_not_leave_the_folder(self, tmp_path: Path) -> None:
        path = self.make(tmp_path, 5)
        (path / layout.WEIGHTS).unlink()
        (path / layout.WEIGHTS_INDEX).write_text(json.dumps({"weight_map": {"w": "../../etc/passwd"}}))
        assert "damaged" in str(find_problem(path))
