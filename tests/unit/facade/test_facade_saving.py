"""When checkpoints are written in the background, and what happens to training when one cannot be written."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import transformers
from datasets import Dataset

import finetune
from finetune.checkpoint import manager
from finetune.checkpoint.store import CheckpointStore
from finetune.errors import ArgumentError, CheckpointError

COMMON: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_steps": 1, "max_steps": 3}


def make(tiny_bert: Any, out: Path, cls: Any = finetune.Trainer, callbacks: Any = None, **options: Any) -> Any:
    rows = Dataset.from_dict({"input_ids": [[3 + i] * 6 for i in range(24)], "labels": [0, 1, 2] * 8})
    args = finetune.TrainingArguments(str(out), **{**COMMON, **options})
    return cls(model=tiny_bert(), args=args, train_dataset=rows, callbacks=callbacks)


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
