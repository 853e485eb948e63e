"""When checkpoints are written in the background, and what happens to training when one cannot be written."""

import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import transformers
from datasets import Dataset
from torch.optim import AdamW

import finetune
from finetune.checkpoint import copies, manager
from finetune.checkpoint.store import CheckpointStore
from finetune.errors import ArgumentError, CheckpointError

COMMON: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_steps": 1, "max_steps": 3}


def make(tiny_bert: Any, out: Path, cls: Any = finetune.Trainer, callbacks: Any = None, **options: Any) -> Any:
    rows = Dataset.from_dict({"input_ids": [[3 + i] * 6 for i in range(24)], "labels": [0, 1, 2] * 8})
    args = finetune.TrainingArguments(str(out), **{**COMMON, **options})
    evaluated = None if args.eval_strategy == "no" else rows
    return cls(model=tiny_bert(), args=args, train_dataset=rows, eval_dataset=evaluated, callbacks=callbacks)


class Reader(transformers.TrainerCallback):
    """Reads each checkpoint as soon as it is told of it, as callbacks written for transformers do."""

    def __init__(self) -> None:
        self.found: list[bool] = []

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found.append((Path(args.output_dir) / f"checkpoint-{state.global_step}" / "model.safetensors").is_file())


class Bystander(transformers.TrainerCallback):
    """Does not care about checkpoints."""


class Copies(finetune.Trainer):
    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        super()._save_checkpoint(model, trial)
        assert (Path(self.output_dir) / f"checkpoint-{self.state.global_step}" / "config.json").is_file()


def test_checkpoints_are_written_in_the_background_where_nobody_reads_them_at_once(
    tiny_bert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert manager.saves_in_background(make(tiny_bert, tmp_path, callbacks=[Bystander]))
    assert not manager.saves_in_background(make(tiny_bert, tmp_path, async_save=False))
    assert not manager.saves_in_background(make(tiny_bert, tmp_path, callbacks=[Reader]))
    assert not manager.saves_in_background(make(tiny_bert, tmp_path, cls=Copies))
    assert manager.saves_in_background(make(tiny_bert, tmp_path, cls=Copies, async_save=True))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2 << 20))
    assert not manager.saves_in_background(make(tiny_bert, tmp_path)), "1 MiB and the model is more than half"


def test_what_reads_a_checkpoint_at_once_finds_it(tiny_bert: Any, tmp_path: Path) -> None:
    reader = Reader()
    make(tiny_bert, tmp_path / "a", callbacks=[reader]).train()
    assert reader.found == [True] * 3
    make(tiny_bert, tmp_path / "b", cls=Copies).train()


def test_the_best_checkpoint_may_be_the_one_still_being_written(
    tiny_bert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = CheckpointStore.commit

    def slow(self: Any, staging: Any, **kwargs: Any) -> Any:
        time.sleep(0.5)
        return commit(self, staging, **kwargs)

    monkeypatch.setattr(CheckpointStore, "commit", slow)
    trainer = make(tiny_bert, tmp_path, async_save=True, eval_steps=1, eval_strategy="steps", max_steps=1,
                   load_best_model_at_end=True)  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")


def fail_at(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    commit = CheckpointStore.commit

    def full(self: Any, staging: Any, **kwargs: Any) -> Any:
        if int(Path(staging).name.split("-")[1].split(".")[0]) in steps:
            raise OSError(28, "No space left on device")
        return commit(self, staging, **kwargs)

    monkeypatch.setattr(CheckpointStore, "commit", full)


@pytest.mark.parametrize("background", [True, False])
def test_a_failed_save_stops_training_and_leaves_the_one_before(
    background: bool, tiny_bert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fail_at(monkeypatch, 2)
    with pytest.raises(CheckpointError, match="No space left"):
        make(tiny_bert, tmp_path, async_save=background).train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert "resume_from_checkpoint=" in caplog.text and "checkpoint-1" in caplog.text


@pytest.mark.parametrize("background", [True, False])
def test_a_failed_save_does_not_stop_training_if_so_asked(
    background: bool, tiny_bert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fail_at(monkeypatch, 2, 3)
    trainer = make(tiny_bert, tmp_path, async_save=background, on_save_failure="continue", max_steps=4)
    assert trainer.train().global_step == 4
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-4"]
    assert caplog.text.count("No space left") >= 2


class Told(finetune.TrainerCallback):
    """Notes for which steps it was told of a checkpoint."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(state.global_step)


def test_nobody_is_told_of_a_checkpoint_that_is_not_there(
    tiny_bert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, 2)
    told, pushed = Told(), []

    class Pushes(finetune.Trainer):
        def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
            pass

        def _push_from_checkpoint(self, checkpoint_folder: str) -> None:  # type: ignore[override]
            pushed.append(Path(checkpoint_folder).name)

    make(
        tiny_bert, tmp_path, cls=Pushes, callbacks=[told], on_save_failure="continue", push_to_hub=True,
        hub_model_id="me/it",
    ).train()  # fmt: skip
    assert told.steps == [1, 3] and pushed == ["checkpoint-1", "checkpoint-3"]


class Worsens(finetune.Trainer):
    """The first checkpoint is the best."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        return {"eval_loss": float(self.state.global_step)}


class Preempted(finetune.TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("is_preempted", [True, False])
def test_a_preempted_run_keeps_the_checkpoint_it_goes_on_from(
    is_preempted: bool, tiny_bert: Any, tmp_path: Path
) -> None:
    trainer = make(
        tiny_bert, tmp_path, cls=Worsens, callbacks=[Preempted()] if is_preempted else [], save_total_limit=1,
        load_best_model_at_end=True, eval_strategy="steps", eval_steps=1, enable_jit_checkpoint=True,
    )  # fmt: skip
    loaded: list[str] = []
    trainer._load_best_model = lambda: loaded.append("best")
    trainer.train()
    assert trainer.was_preempted is is_preempted
    kept = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert kept == (["checkpoint-1", "checkpoint-2"] if is_preempted else ["checkpoint-1"])
    assert loaded == ([] if is_preempted else ["best"])


def test_a_push_has_whole_weights_and_a_checkpoint_may_have_shards(
    tiny_bert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(manager, "save_model", lambda *_, for_checkpoint, **__: asked.append(for_checkpoint))
    trainer = make(tiny_bert, tmp_path)
    trainer.save_model(str(tmp_path / "checkpoint-1"), _internal_call=True)
    trainer.save_model(_internal_call=True)  # as `push_to_hub` does
    trainer.save_model(str(tmp_path / "model"))
    assert asked == [True, False, False]


@pytest.mark.parametrize("background", [True, False])
def test_an_emergency_checkpoint_that_failed_is_not_called_saved(
    background: bool, tiny_bert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Breaks(finetune.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                raise KeyError("broken")

    fail_at(monkeypatch, 2)
    trainer = make(
        tiny_bert, tmp_path, callbacks=[Breaks()], async_save=background, on_save_failure="continue",
        save_on_exception=True, save_strategy="no",
    )  # fmt: skip
    with pytest.raises(KeyError):
        trainer.train()
    assert "Saved an emergency checkpoint" not in caplog.text
    assert "The emergency checkpoint after KeyError failed too" in caplog.text


@pytest.mark.parametrize("background", [True, False])
def test_the_best_is_never_one_that_could_not_be_written(
    background: bool, tiny_bert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each evaluation is better than the one before, so the last checkpoint would be the best."""
    fail_at(monkeypatch, 3)
    trainer = make(
        tiny_bert, tmp_path, async_save=background, on_save_failure="continue", eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, learning_rate=1e-3,
    )  # fmt: skip
    losses = iter([3.0, 2.0, 1.0])
    evaluate = trainer.evaluate
    trainer.evaluate = lambda *args, **kwargs: {**evaluate(*args, **kwargs), "eval_loss": next(losses)}
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")


@pytest.mark.parametrize(("limit", "kept"), [(1, ["checkpoint-1"]), (2, ["checkpoint-1", "checkpoint-3"])])
def test_only_the_best_stays_where_one_may(limit: int, kept: list[str], tiny_bert: Any, tmp_path: Path) -> None:
    names: dict[str, list[str]] = {}
    for library in (transformers, finetune):
        losses = iter([1.0, 2.0, 3.0])

        class Rising(library.Trainer):  # type: ignore[name-defined,misc]
            def evaluate(self, *args: Any, losses: Any = losses, **kwargs: Any) -> dict[str, float]:
                return {**super().evaluate(*args, **kwargs), "eval_loss": next(losses)}

        options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_total_limit": limit}
        out = tmp_path / library.__name__
        rows = Dataset.from_dict({"input_ids": [[3 + i] * 6 for i in range(24)], "labels": [0, 1, 2] * 8})
        args = library.TrainingArguments(str(out), **{**COMMON, **options})
        Rising(model=tiny_bert(), args=args, train_dataset=rows, eval_dataset=rows).train()
        names[library.__name__] = sorted(path.name for path in out.glob("checkpoint-*"))
    assert names == {"transformers": kept, "finetune": kept}


def test_a_best_checkpoint_in_files_of_ones_own(
    tiny_bert: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Own(finetune.Trainer):
        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            Path(str(output_dir)).mkdir(parents=True, exist_ok=True)
            torch.save(self.model.state_dict(), Path(str(output_dir)) / "mine.pt")

    options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    trainer = make(tiny_bert, tmp_path, cls=Own, **options)
    assert trainer.train().global_step == 3
    assert "holds no weights under a name known here" in caplog.text
    assert str(trainer.state.best_model_checkpoint) in caplog.text


def test_a_run_is_over_when_its_last_checkpoint_is_there(
    tiny_bert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, found = CheckpointStore.commit, []

    def slow(self: Any, staging: Any, **kwargs: Any) -> Any:
        time.sleep(0.3)
        return commit(self, staging, **kwargs)

    class Ends(finetune.TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            found.append((tmp_path / "checkpoint-3").is_dir())

    monkeypatch.setattr(CheckpointStore, "commit", slow)
    make(tiny_bert, tmp_path, async_save=True, callbacks=[Ends()]).train()
    assert found == [True]


def test_a_pruned_trial_leaves_no_write_behind(tiny_bert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copies of its last checkpoint are slower than the start of the next trial."""
    complete = copies.CopyPool.complete

    def slowly(pool: Any) -> None:
        time.sleep(0.3)
        complete(pool)

    monkeypatch.setattr(copies.CopyPool, "complete", slowly)
    trainer = make(tiny_bert, tmp_path, async_save=True)
    trainer.hp_search_backend, trainer.hp_space, trainer._searched_args = "optuna", lambda trial: {}, trainer.args
    busy: list[bool] = []

    class Prunes(finetune.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                raise ArithmeticError("pruned")

    trainer.add_callback(Prunes())
    trainer.model_init = lambda trial: tiny_bert()
    for number in (0, 1):
        with pytest.raises(ArithmeticError):
            trainer.train(trial=SimpleNamespace(number=number, params={}))
        busy.append(trainer._writer.busy)
    assert busy == [False, False]


def test_an_unknown_policy_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"on_save_failure.*stop.*continue"):
        finetune.TrainingArguments(str(tmp_path), on_save_failure="ignore")


def test_a_folder_that_cannot_be_written_is_said_before_the_first_step(tiny_bert: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    steps: list[int] = []

    class Steps(finetune.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            steps.append(state.global_step)

    with pytest.raises(ArgumentError, match="`output_dir`"):
        make(tiny_bert, tmp_path / "file" / "run", callbacks=[Steps()]).train()
    assert steps == []


class Late(finetune.TrainerCallback):
    """A callback of the user's: it could change weights between a save and the next step."""


class Touches(finetune.Trainer):
    """A trainer of the user's."""


def test_only_what_waits_for_the_step_is_copied_later(tiny_bert: Any, tmp_path: Path) -> None:
    def steady(**options: Any) -> int:
        trainer = make(tiny_bert, tmp_path, max_steps=1, save_strategy="no", **options)
        trainer.train()
        return len(manager.changes_in_step(trainer))

    trained = sum(p.requires_grad for p in tiny_bert().parameters())
    assert steady() == 3 * trained, "weights and two moments"
    assert steady(callbacks=[Late()]) == steady(cls=Touches) == steady(optim="adafactor") == 0


def test_copying_waits_for_nobody_and_the_step_waits_for_it(
    tiny_bert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow copy gives the weights of the moment of the save, as a save without background does."""
    complete, order = copies.CopyPool.complete, []

    def slowly(pool: Any) -> None:
        time.sleep(0.3)
        complete(pool)
        order.append("copied")

    class Order(AdamW):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            order.append("step")
            return super().step(*args, **kwargs)

    Order.__module__ = AdamW.__module__
    monkeypatch.setattr(copies.CopyPool, "complete", slowly)
    options: dict[str, Any] = {"max_steps": 3, "save_steps": 1, "learning_rate": 0.1}
    for name, background in (("now", False), ("later", True)):
        trainer = make(tiny_bert, tmp_path / name, async_save=background, **options)
        trainer.optimizer = Order(trainer.model.parameters(), lr=0.1)
        order.clear()
        trainer.train()
    assert order == ["step", "copied"] * 3
    for step in (1, 2, 3):
        now, later = (tmp_path / name / f"checkpoint-{step}" for name in ("now", "later"))
        for file in ("model.safetensors", "optimizer.pt"):
            assert (now / file).read_bytes() == (later / file).read_bytes(), (step, file)


def test_weights_that_change_meanwhile_are_an_error(tiny_bert: Any, tmp_path: Path) -> None:
    class Changes(finetune.Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                next(self.model.parameters()).add_(1.0)
            return super().training_step(*args, **kwargs)

    trainer = make(tiny_bert, tmp_path / "own", cls=Changes)
    trainer.train()
    Changes.__module__ = "finetune.trainer"  # as if it were ours, so that nobody expects it
    with pytest.raises(CheckpointError, match="changed outside the optimizer's step"):
        pool_that_waits(make(tiny_bert, tmp_path / "hidden", cls=Changes)).train()


def pool_that_waits(trainer: Any) -> Any:
    """Returns the trainer, whose background copies are made after the next training step began."""
    started = threading.Event()
    step, launch = trainer.training_step, trainer._writer.launch

    def signals(*args: Any, **kwargs: Any) -> Any:
        loss = step(*args, **kwargs)
        started.set()
        return loss

    def waits(*given: Any, **more: Any) -> None:
        pool, complete = trainer._writer._pool, trainer._writer._pool.complete
        started.clear()
        pool.complete = lambda: (started.wait(10), complete())
        launch(*given, **more)

    trainer.training_step, trainer._writer.launch = signals, waits
    return trainer
