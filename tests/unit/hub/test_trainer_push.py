"""A real training that pushes, over real HTTP."""

import dataclasses
import logging
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from finetune import Trainer, TrainerCallback, TrainingArguments
from finetune.hub import uploads

TOKEN = "hf_" + "s3cret" * 5  # what the server in conftest.py accepts


class Rows(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = torch.arange(index, index + 6)
        return {"input_ids": ids, "labels": ids}


class Pushes(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_push_begin(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)


@pytest.fixture
def make_trainer(tmp_path, tiny_llama, monkeypatch):
    patience = uploads.Patience(pauses=(0.01,), call_seconds=5.0, upload_seconds=5.0)
    monkeypatch.setattr(uploads, "DEFAULT_PATIENCE", patience)

    def make(folder="out", **changes):
        settings = {
            "per_device_train_batch_size": 2,
            "max_steps": 4,
            "save_steps": 2,
            "lr_scheduler_type": "constant",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "push_to_hub": True,
            "hub_model_id": "me/tiny",
            "hub_token": TOKEN,
            "hub_always_push": True,
        }
        args = TrainingArguments(str(tmp_path / folder), **{**settings, **changes})
        return Trainer(model=tiny_llama(), args=args, train_dataset=Rows(), callbacks=[Pushes()])

    return make


def pushes_of(trainer):
    return next(callback.steps for callback in trainer.callback_handler.callbacks if isinstance(callback, Pushes))


def test_training_pushes_and_another_machine_resumes(hub, make_trainer, tmp_path):
    from huggingface_hub import snapshot_download

    trainer = make_trainer(hub_strategy="checkpoint", max_steps=2)
    trainer.train()
    assert pushes_of(trainer) == [2] and trainer.hub_model_id == "me/tiny"
    assert {"config.json", "model.safetensors"} <= set(hub.files("me/tiny"))
    arrived = snapshot_download("me/tiny", token=TOKEN, cache_dir=tmp_path / "cache")

    resumed = make_trainer("elsewhere", push_to_hub=False)
    # The cache holds links; a checkpoint is plain files.
    folder = tmp_path / "last-checkpoint"
    folder.mkdir()
    for path in Path(arrived, "last-checkpoint").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    resumed.train(resume_from_checkpoint=str(folder))
    straight = make_trainer("straight", push_to_hub=False)
    straight.train()
    assert resumed.state.global_step == 4
    for ours, theirs in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_save_model_pushes_and_writes_the_card(hub, make_trainer):
    trainer = make_trainer(hub_strategy="end", save_strategy="no", max_steps=1)
    trainer.train()
    assert not hub.messages
    trainer.save_model()
    assert hub.messages == ["Model save"]
    assert b"generated_from_trainer" in hub.files("me/tiny")["README.md"]
    pushed = [content for commit in hub.repos["me/tiny"] for content in commit.values()]
    assert not any(TOKEN.encode() in content for content in pushed)


@pytest.mark.parametrize("trouble", [500, "disconnect"])
def test_a_hub_that_fails_does_not_stop_the_training(hub, make_trainer, caplog, trouble):
    trainer = make_trainer()
    hub.trouble = [("preupload", trouble)] * 200
    trainer.train()
    assert trainer.state.global_step == 4
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert any("hf upload me/tiny" in line and "checkpoint-4" in line for line in said)


def test_the_token_is_nowhere_in_the_output_folder(hub, make_trainer, tmp_path):
    trainer = make_trainer(max_steps=2)
    trainer.train()
    trainer.push_to_hub()
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert files and [path.name for path in files if TOKEN.encode() in path.read_bytes()] == []
    assert trainer.args.hub_token == TOKEN and dataclasses.is_dataclass(trainer.args)
