import json
import logging
import os
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune.checkpoint import layout, manager, stateful
from finetune.checkpoint.manifest import find_problem, read_manifest
from finetune.checkpoint.writer import CheckpointWriter, meet
from finetune.control.state import TrainerState
from finetune.distributed import ranks
from finetune.errors import ArgumentError, CheckpointError


@pytest.mark.parametrize("asynchronous", [False, True])
def test_resumed_equals_uninterrupted(tiny_run: Any, same: Any, tmp_path: Path, asynchronous: bool) -> None:
    expected = tiny_run(tmp_path / "whole").train(7).everything()
    run = tiny_run(asynchronous=asynchronous).train(3)
    run.save()
    run.writer.wait()
    resumed = tiny_run()
    resumed.train(1)  # anything it did before is overwritten
    assert resumed.resume() == str(tmp_path / "run" / "checkpoint-3")
    assert same(resumed.train(4).everything(), expected)


def test_files_and_manifest(tiny_run: Any) -> None:
    run = tiny_run().train(2)
    report = run.save()
    files = sorted(p.name for p in report.path.iterdir())
    assert files == [
        "finetune_state.pt", "manifest.json", "model.safetensors", "optimizer.pt", "optimizer_layout.json",
        "rng_state.pth", "scheduler.pt", "trainer_state.json", "training_args.bin",
    ]  # fmt: skip
    manifest = read_manifest(report.path)
    assert manifest is not None and manifest.step == 2 and not manifest.model_only and manifest.world_size == 1
    assert sorted(manifest.files) == [name for name in files if name != "manifest.json"]
    assert report.num_bytes == manifest.num_bytes > 1000 and not report.in_background
    assert 0 < report.write_seconds <= report.stall_seconds
    for path in report.path.glob("*"):
        if path.suffix in (".pt", ".pth", ".bin"):
            torch.load(path, weights_only=True)


def test_weights_only(tiny_run: Any) -> None:
    report = tiny_run(save_only_model=True).train(1).save()
    assert not (report.path / layout.OPTIMIZER).exists() and not (report.path / "rng_state.pth").exists()
    manifest = read_manifest(report.path)
    assert manifest is not None and manifest.model_only


def test_overridden_methods_are_the_ones_called(tiny_run: Any) -> None:
    run = tiny_run().train(1)
    called: list[str] = []
    for name in ("save_model", "_save_optimizer_and_scheduler", "_save_scaler", "_save_rng_state"):

        def spy(folder: str, *args: Any, _name: str = name, **kwargs: Any) -> None:
            called.append(_name)
            assert Path(folder).name == "checkpoint-1" and ".staging" in folder
            getattr(type(run), _name)(run, folder, *args, **kwargs)

        setattr(run, name, spy)
    run.save()
    assert called == ["save_model", "_save_optimizer_and_scheduler", "_save_scaler", "_save_rng_state"]


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (KeyError("mine"), KeyError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(28, "no space"), CheckpointError),
    ],
)
def test_failure_half_way_leaves_the_last_checkpoint(tiny_run: Any, error: BaseException, raised: Any) -> None:
    run = tiny_run().train(1)
    run.save()

    def fail(folder: str) -> None:
        raise error

    run._save_rng_state = fail
    with pytest.raises(raised):
        run.train(1).save()
    assert sorted(os.listdir(run.out)) == ["checkpoint-1", "latest"]
    del run._save_rng_state
    run.save()
    assert find_problem(run.out / "checkpoint-2") is None


def test_policy_of_going_on_after_a_failed_save(tiny_run: Any, caplog: pytest.LogCaptureFixture) -> None:
    run = tiny_run(on_save_failure="continue").train(1)
    run.events.state.best_model_checkpoint, run.events.state.best_global_step = "before", 1

    def fail(folder: str) -> None:
        raise CheckpointError("no space")

    run._save_scaler = fail
    report = run.save()
    assert report.error == "no space" and "goes on" in caplog.text
    assert run.events.state.best_model_checkpoint == "before" and os.listdir(run.out) == []


def test_best_pointer_and_retention(tiny_run: Any) -> None:
    run = tiny_run(save_total_limit=1)
    for step, loss in enumerate([3.0, 1.0, 2.0, 4.0], start=1):
        run.train(1)
        run.events.state.log_history.append({"eval_loss": loss, "step": step})
        manager.determine_best_metric({"eval_loss": loss}, args=run.args, state=run.events.state)
        run.save()
        assert run.events.state.best_model_checkpoint == str(run.out / f"checkpoint-{min(step, 2)}")
    assert sorted(os.listdir(run.out)) == ["best", "checkpoint-2", "checkpoint-4", "latest"]
    assert (run.out / "best").read_text() == "checkpoint-2\n"
    manifest = read_manifest(run.out / "checkpoint-2")
    assert manifest is not None and manifest.metric == 1.0 and manifest.greater_is_better is False
    saved = json.loads((run.out / "checkpoint-2" / "trainer_state.json").read_text())
    assert saved["best_model_checkpoint"] == str(run.out / "checkpoint-2")
    run.train(1)
    manager.load_best_model(run.events.state, accelerator=run.accelerator, model=run.model)
    best = tiny_run().train(2)
    assert all(torch.equal(v, best.model.state_dict()[k]) for k, v in run.model.state_dict().items())
    manager.rotate(run.args, str(run.out), run.events.state.best_model_checkpoint)
    assert (run.out / "checkpoint-4").is_dir(), "the last checkpoint is never deleted"


def test_space_is_checked_first(tiny_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run().train(1)
    usage = shutil.disk_usage(run.out.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match="needs about"):
        run.save()
    assert not run.out.exists()


def test_bytes_needed_is_about_right(tmp_path: Path) -> None:
    model = torch.nn.Linear(500, 500)
    optimizer = torch.optim.AdamW(model.parameters())
    weights = 4 * (500 * 500 + 500)
    before = manager.bytes_needed(model, optimizer, weights_only=False)
    model(torch.ones(1, 500)).sum().backward(), optimizer.step()
    assert before == 3 * weights + (1 << 20)
    assert manager.bytes_needed(model, optimizer, weights_only=False) == before + 8
    assert manager.bytes_needed(model, optimizer, weights_only=True) == weights + (1 << 20)


class TestBackground:
    def test_training_goes_on_while_writing(self, tiny_run: Any, same: Any, tmp_path: Path) -> None:
        run = tiny_run(asynchronous=True).train(2)
        gate, started = threading.Event(), threading.Event()
        real = run._save_optimizer_and_scheduler

        def gated(folder: str) -> None:
            run.writer.run(lambda: (started.set(), gate.wait(20)))
            real(folder)

        run._save_optimizer_and_scheduler = gated
        report = run.save()
        assert started.wait(10) and run.writer.busy and report.in_background
        assert not report.path.exists() and report.write_seconds == 0.0
        run.train(3)  # changes everything that is still to be written
        gate.set()
        assert run.writer.wait() >= 0 and find_problem(report.path) is None
        assert run.writer.last is report and report.write_seconds > report.stall_seconds and report.num_bytes > 0
        expected = tiny_run(tmp_path / "other").train(5).everything()
        resumed = tiny_run()
        resumed.resume()
        assert same(resumed.train(3).everything(), expected)

    def test_failure_surfaces_at_the_next_save_and_the_last_checkpoint_stays(self, tiny_run: Any, caplog: Any) -> None:
        run = tiny_run(asynchronous=True).train(1)
        run.save()
        run.train(1)
        run._save_scaler = lambda folder: run.writer.run(lambda: (_ for _ in ()).throw(OSError(28, "No space left")))
        run.save()
        while run.writer.busy:
            time.sleep(0.01)
        assert "failed" in caplog.text, "said when it happens"
        del run._save_scaler
        with pytest.raises(CheckpointError, match="No space"):
            run.train(1).save()
        assert sorted(os.listdir(run.out)) == ["checkpoint-1", "latest"]
        assert run.save().path.name == "checkpoint-3", "and once only"
        run.writer.wait()

    def test_failure_surfaces_at_the_end(self, tiny_run: Any) -> None:
        run = tiny_run(asynchronous=True).train(1)
        with (
            pytest.raises(CheckpointError, match="No such file"),
            manager.report_last_on_error(str(run.out), run.writer),
        ):
            run._save_scaler = lambda folder: run.writer.run(lambda: shutil.rmtree(folder))
            run.save()

    def test_a_failure_that_is_tolerated_is_in_the_report(self, tiny_run: Any) -> None:
        run = tiny_run(asynchronous=True, on_save_failure="continue")
        run.writer.tolerant = True
        run.train(1).save()
        run.writer.wait()
        run.events.state.best_global_step = 2
        run._save_scaler = lambda folder: run.writer.run(lambda: (_ for _ in ()).throw(OSError(28, "No space left")))
        report = run.train(1).save()
        run.writer.wait()
        assert "No space left" in str(report.error) and run.writer.last is report
        assert run.events.state.best_model_checkpoint is None, "a checkpoint that is not there is not the best"
        del run._save_scaler
        assert run.train(1).save().error is None

    def test_next_save_waits(self, tiny_run: Any) -> None:
        run = tiny_run(asynchronous=True)
        for _ in range(4):
            run.train(1).save()
        run.writer.wait()
        assert [p.name for p in sorted(run.out.glob("checkpoint-*"))] == [f"checkpoint-{n}" for n in (1, 2, 3, 4)]
        assert all(find_problem(p) is None for p in run.out.glob("checkpoint-*"))

    def test_processes_meet_in_their_store(self) -> None:
        store = torch.distributed.HashStore()

        def args(rank: int) -> Any:
            return SimpleNamespace(process_index=rank, should_save=rank == 0, world_size=3, save_on_each_node=False)

        answers: list[Any] = []
        first = threading.Thread(target=lambda: answers.append(meet(store, "save", args(0), None)))
        first.start()
        assert meet(store, "save", args(1), None) is None
        time.sleep(0.1)
        assert first.is_alive(), "it waits for all"
        own = OSError("disk")
        assert meet(store, "save", args(2), own) is own
        first.join()
        assert "Process 2 failed. OSError: disk" in str(answers[0])
        assert not store.check(["save/1"]) and not store.check(["save/2"])
        meet(store, "next", args(2), None)
        lost = meet(store, "next", args(0), None, timeout_seconds=0.05)
        assert "2 of 3" in str(lost)

    def test_the_processes_of_each_node_meet(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        store = torch.distributed.HashStore()

        def args(rank: int) -> Any:
            return SimpleNamespace(process_index=rank, should_save=rank % 2 == 0, world_size=4, save_on_each_node=True)

        meet(store, "save", args(3), None)
        assert meet(store, "save", args(2), None) is None
        assert "1 of 2" in str(meet(store, "save", args(0), None, timeout_seconds=0.05))


class TestResolve:
    def test_fresh(self, tmp_path: Path) -> None:
        for value in (None, False, "false", "None"):
            assert manager.resolve_resume(value, str(tmp_path)) is None
        assert manager.resolve_resume("auto", str(tmp_path / "missing")) is None

    @pytest.mark.parametrize("value", [True, "true", "True", "auto"])
    def test_newest_valid(self, tiny_run: Any, value: Any, caplog: pytest.LogCaptureFixture) -> None:
        run = tiny_run()
        run.train(1).save(), run.train(1).save()
        os.truncate(run.out / "checkpoint-2" / "optimizer.pt", 100)
        with caplog.at_level(logging.WARNING):
            assert manager.resolve_resume(value, str(run.out)) == str(run.out / "checkpoint-1")
        assert "`checkpoint-2`: optimizer.pt has 100 bytes instead of" in caplog.text

    def test_none_valid(self, tiny_run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        with pytest.raises(CheckpointError, match="no valid checkpoint"):
            manager.resolve_resume(True, str(tmp_path))
        run = tiny_run()
        run.train(1).save()
        (run.out / "checkpoint-1" / "rng_state.pth").unlink()
        with pytest.raises(CheckpointError, match=r"`checkpoint-1`: rng_state\.pth is missing"):
            manager.resolve_resume(True, str(run.out))
        assert manager.resolve_resume("auto", str(run.out)) is None and "rng_state.pth is missing" in caplog.text

    def test_given_folder_is_verified_and_never_replaced(self, tiny_run: Any, tmp_path: Path) -> None:
        run = tiny_run()
        run.train(1).save(), run.train(1).save()
        wanted = str(run.out / "checkpoint-2")
        assert manager.resolve_resume(wanted, "elsewhere") == wanted
        assert manager.resolve_resume(Path(wanted), "elsewhere") == wanted
        (run.out / "checkpoint-2" / "model.safetensors").write_bytes(b"")
        with pytest.raises(CheckpointError, match=r"model\.safetensors has 0 bytes.*checkpoint-1"):
            manager.resolve_resume(wanted, "elsewhere")
        with pytest.raises(CheckpointError, match="does not exist"):
            manager.resolve_resume(str(tmp_path / "nothing"), "elsewhere")
        with pytest.raises(CheckpointError, match=r"trainer_state\.json is missing.*checkpoint-1"):
            manager.resolve_resume(str(run.out), "elsewhere")

    def test_missing_manifest_of_ours_is_not_taken_for_a_foreign_checkpoint(self, tiny_run: Any) -> None:
        run = tiny_run()
        run.train(1).save()
        (run.out / "checkpoint-1" / "manifest.json").unlink()
        with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
            manager.resolve_resume(True, str(run.out))


class TestStateful:
    class Meter:
        def __init__(self, value: int) -> None:
            self.value = value

        def state_dict(self) -> dict[str, Any]:
            return {"value": self.value}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.value = state_dict["value"]

    class Elastic(Meter):
        def load_state_dicts(self, states: list[dict[str, Any]]) -> None:
            self.value = sum(state["value"] for state in states)

    def save(self, folder: Path, values: list[int]) -> None:
        for rank, value in enumerate(values):
            stateful.save_stateful(folder, {"m": self.Meter(value)}, rank=rank, world_size=len(values))

    def test_each_process_gets_its_own(self, tmp_path: Path) -> None:
        self.save(tmp_path, [5, 7])
        meter = self.Meter(0)
        assert stateful.load_stateful(tmp_path, {"m": meter, "new": self.Meter(1)}, rank=1, world_size=2) == ["m"]
        assert meter.value == 7

    def test_another_number_of_processes(self, tmp_path: Path) -> None:
        self.save(tmp_path, [5, 7])
        elastic = self.Elastic(0)
        stateful.load_stateful(tmp_path, {"m": elastic}, rank=0, world_size=1)
        assert elastic.value == 12
        with pytest.raises(CheckpointError, match=r"saved by 2 processes.*`m`.*over 1"):
            stateful.load_stateful(tmp_path, {"m": self.Meter(0)}, rank=0, world_size=1)
        self.save(tmp_path, [6, 6])
        meter = self.Meter(0)
        stateful.load_stateful(tmp_path, {"m": meter}, rank=0, world_size=1)
        assert meter.value == 6

    def test_foreign_checkpoint_has_none(self, tmp_path: Path) -> None:
        assert stateful.load_stateful(tmp_path, {"m": self.Meter(0)}, rank=0, world_size=1) == []

    def test_malformed(self, tmp_path: Path) -> None:
        torch.save([1], tmp_path / "finetune_state.pt")
        with pytest.raises(CheckpointError):
            stateful.load_stateful(tmp_path, {"m": self.Meter(0)}, rank=0, world_size=1)


class TestMetrics:
    ARGS = SimpleNamespace(metric_for_best_model="accuracy", greater_is_better=True, save_strategy="steps")

    def test_better_is_noted(self) -> None:
        state = TrainerState()
        for step, (value, better) in enumerate(
            [(float("nan"), False), (0.5, True), (0.5, False), (float("nan"), False), (0.7, True), (0.6, False)]
        ):
            state.global_step = step
            assert manager.determine_best_metric({"eval_accuracy": value}, args=self.ARGS, state=state) is better
        assert state.best_metric == 0.7 and state.best_global_step == 4

    def test_same_as_transformers(self) -> None:
        from transformers import Trainer

        for greater in (True, False):
            args = SimpleNamespace(metric_for_best_model="eval_loss", greater_is_better=greater, save_strategy="steps")
            states = [TrainerState(), TrainerState()]
            for step, value in enumerate([2.0, 1.0, 3.0, 1.0, float("nan"), 0.5]):
                for state in states:
                    state.global_step = step
                fake = SimpleNamespace(args=args, state=states[0])
                theirs = Trainer._determine_best_metric(fake, {"eval_loss": value}, None)  # type: ignore[arg-type]
                assert theirs == manager.determine_best_metric({"eval_loss": value}, args=args, state=states[1])
                assert states[0] == states[1]

    def test_unknown_metric(self) -> None:
        with pytest.raises(ArgumentError, match=r"`eval_accuracy`.*Did you mean `eval_accuracies`") as caught:
            manager.determine_best_metric({"eval_accuracies": 1.0}, args=self.ARGS, state=TrainerState())
        assert isinstance(caught.value, KeyError) and not str(caught.value).startswith('"')

    def test_metric_of_the_present_step(self) -> None:
        state = TrainerState(global_step=4)
        state.log_history = [{"eval_loss": 3.0, "step": 2}, {"eval_loss": 2.0, "step": 4}, {"loss": 1.0, "step": 4}]
        assert manager.current_metric(state, "loss") == 2.0
        state.global_step = 5
        assert manager.current_metric(state, "loss") is None


class TestState:
    def test_best_checkpoint_that_moved_along(self, tiny_run: Any, tmp_path: Path, caplog: Any) -> None:
        run = tiny_run()
        run.events.state.best_global_step = 1
        run.train(1).save(), run.train(1).save()
        run.out.rename(tmp_path / "moved")
        state = manager.load_state(str(tmp_path / "moved" / "checkpoint-2"), run.args)
        assert state.best_model_checkpoint == str(tmp_path / "moved" / "checkpoint-1")
        shutil.rmtree(tmp_path / "moved" / "checkpoint-1")
        assert manager.load_state(str(tmp_path / "moved" / "checkpoint-2"), run.args).best_model_checkpoint is None
        assert "is gone" in caplog.text

    def test_changed_intervals_are_said(self, tiny_run: Any, caplog: pytest.LogCaptureFixture) -> None:
        run = tiny_run()
        report = run.train(1).save()
        run.args.save_steps = 7
        manager.load_state(str(report.path), run.args)
        assert "`save_steps` was 1 in the checkpoint and is 7 now" in caplog.text

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"global_step": "x"}', '{"log_history": 3}'])
    def test_damaged(self, tmp_path: Path, tiny_run: Any, text: str) -> None:
        (tmp_path / "trainer_state.json").write_text(text)
        with pytest.raises(CheckpointError):
            manager.load_state(str(tmp_path), tiny_run().args)


class TestErrors:
    def test_where_to_resume_is_said_and_the_error_kept(self, tiny_run: Any, caplog: Any) -> None:
        run = tiny_run(asynchronous=True)
        with pytest.raises(ZeroDivisionError), manager.report_last_on_error(str(run.out), run.writer):
            run.train(1).save()
            raise ZeroDivisionError
        assert f"resume_from_checkpoint='{run.out / 'checkpoint-1'}'" in caplog.text

    def test_a_failed_emergency_save_is_not_called_saved(self, caplog: pytest.LogCaptureFixture) -> None:
        manager.emergency_save(lambda: "no space", ValueError("x"), consistent=True)
        assert caplog.messages == ["The emergency checkpoint after ValueError failed too: no space"]

    def test_no_emergency_save_among_several_processes(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ranks, "world_size", lambda: 2)
        manager.emergency_save(lambda: pytest.fail("waits for the others"), ValueError("x"), consistent=True)
        assert caplog.messages[0].startswith("No emergency checkpoint after ValueError: `save_on_exception` needs a")

    def test_emergency_save(self, caplog: pytest.LogCaptureFixture) -> None:
        saved: list[int] = []
        manager.emergency_save(lambda: saved.append(1), ValueError("x"), consistent=True)
        manager.emergency_save(lambda: saved.append(2), ValueError("x"), consistent=False)
        manager.emergency_save(lambda: 1 / 0, ValueError("x"), consistent=True)
        manager.emergency_save(lambda: saved.append(3), KeyboardInterrupt(), consistent=True)
        assert "after ValueError: x" in caplog.messages[0] and caplog.messages[-1].endswith("after KeyboardInterrupt")
        assert (
            saved == [1, 3] and "failed too: division" in caplog.text and "middle of an optimizer step" in caplog.text
        )


def test_writer_without_background_runs_at_once() -> None:
    writer, done = CheckpointWriter(), []
    value = {"w": torch.ones(1)}
    with writer.collecting():
        assert writer.snapshot(value) is value and not writer.collects
        writer.run(lambda: done.append(1))
        assert done == [1]
    writer.launch(done.append)
    assert done == [1, None] and writer.wait() < 1 and not writer.busy


def test_a_node_gives_its_folder_back_when_another_one_failed(tiny_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `save_on_each_node` each node stages for itself, and hears of the others at the end of that."""
    run = tiny_run().train(1)
    heard: list[None] = []

    def together(error: Any) -> None:
        heard.append(None)
        if error is not None:
            raise error
        if len(heard) == 1:
            raise CheckpointError("Process 1 could not do its part of the checkpoint.")

    with monkeypatch.context() as patch:
        patch.setattr("finetune.checkpoint.writer.raise_together", together)
        with pytest.raises(CheckpointError, match="Process 1"):
            run.save()
    assert not list(run.out.glob(".staging/checkpoint-*"))
    assert run.save().path.name == "checkpoint-1", "the lock is free again"
