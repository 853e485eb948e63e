import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from finetune.control.state import TrainerState
from finetune.errors import ArgumentError
from finetune.hub import card, repo, snapshots, uploads

TOKEN = "hf_" + "s3cret" * 5  # what the server in conftest.py accepts


class Handler:
    def __init__(self):
        self.pushes = 0

    def on_push_begin(self, args, state, control):
        self.pushes += 1


class FakeTrainer:
    """The part of a trainer that pushes, with files instead of a model."""

    init_hf_repo = repo.init_hf_repo
    push_to_hub = repo.push_to_hub
    _push_from_checkpoint = repo._push_from_checkpoint
    _finish_current_push = repo._finish_current_push

    def __init__(self, folder: Path, first: bool = True, **args):
        defaults = {
            "output_dir": str(folder),
            "hub_model_id": "me/model",
            "hub_token": TOKEN,
            "hub_private_repo": True,
            "hub_strategy": "every_save",
            "hub_always_push": True,
            "hub_revision": None,
            "save_strategy": "steps",
        }
        self.args = SimpleNamespace(**{**defaults, **args})
        self.state, self.control, self.callback_handler = TrainerState(epoch=1.0), None, Handler()
        self.model = SimpleNamespace(model_tags=["mine"])
        self.hub_model_id, self.first, self.cards = None, first, []
        self.weights = b"final"

    def is_world_process_zero(self):
        return self.first

    def save_model(self, output_dir=None, _internal_call=False):
        assert _internal_call
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(self.weights)

    def create_model_card(self, **kwargs):
        self.cards.append(kwargs)
        Path(self.args.output_dir, "README.md").write_text("---\ntags: [generated_from_trainer]\n---\n")

    def checkpoint(self, step: int) -> str:
        """Writes checkpoint-`step` as a real one looks and returns its path."""
        self.state.global_step = step
        folder = Path(self.args.output_dir, f"checkpoint-{step}")
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"step": step}))
        (folder / "model.safetensors").write_bytes(b"%d" % step * (1 << 20))
        torch.save({"step": step}, folder / "optimizer.pt")
        (folder / "scheduler.pt").write_bytes(b"s")
        (folder / "rng_state_0.pth").write_bytes(b"r")
        self.state.save_to_json(folder / "trainer_state.json")
        return str(folder)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "out"
    path.mkdir()
    return path


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    set_patience(monkeypatch, 5.0)


def set_patience(monkeypatch, seconds):
    patience = uploads.Patience(
        pauses=(0.01, 0.01), call_seconds=min(seconds, 2.0), upload_seconds=seconds, bytes_per_second=1e9
    )
    monkeypatch.setattr(uploads, "DEFAULT_PATIENCE", patience)


def test_checkpoints_in_shards_are_said_once_to_have_no_weights(hub, folder, caplog):
    trainer = FakeTrainer(folder)
    for step in (1, 2):
        path = Path(trainer.checkpoint(step))
        (path / "pytorch_model_fsdp_0").mkdir()
        trainer._push_from_checkpoint(str(path))
    assert "in shards" not in caplog.text, "whole weights are beside them"
    for step in (3, 4):
        path = Path(trainer.checkpoint(step))
        (path / "pytorch_model_fsdp_0").mkdir()
        (path / "model.safetensors").unlink()
        trainer._push_from_checkpoint(str(path))
    trainer._finish_current_push()
    assert caplog.text.count("hold the model in shards") == 1 and "FULL_STATE_DICT" in caplog.text


def test_push_to_hub_saves_writes_the_card_and_uploads(hub, folder):
    trainer = FakeTrainer(folder)
    for name in ("_private", "data_preview.html", "data_audit.json"):
        (folder / name).write_text("x")
    trainer.checkpoint(1)
    commit = trainer.push_to_hub(commit_message="Done", tags="sft")
    assert hub.private == {"me/model": True} and trainer.hub_model_id == "me/model"
    assert hub.files("me/model") == {
        "README.md": b"---\ntags: [generated_from_trainer]\n---\n",
        "config.json": b"{}",
        "model.safetensors": b"final",
    }
    assert hub.messages == ["Done"] and commit.commit_url.startswith(hub.url)
    assert trainer.cards == [{"tags": ["sft", "mine"], "model_name": "model"}]
    assert trainer.callback_handler.pushes == 1
    assert not list(folder.glob("_push-*"))


def test_the_name_defaults_to_the_output_folder(hub, folder):
    trainer = FakeTrainer(folder, hub_model_id=None)
    trainer.init_hf_repo(private=False)
    assert trainer.hub_model_id == "me/out" and hub.private == {"me/out": False}


def test_other_processes_only_save(hub, folder):
    trainer = FakeTrainer(folder, first=False)
    assert trainer.push_to_hub() is None
    trainer.init_hf_repo()
    trainer._push_from_checkpoint(trainer.checkpoint(1))
    trainer._finish_current_push()
    assert not hub.calls and (folder / "model.safetensors").exists()


def test_every_save_pushes_the_model_of_the_checkpoint_without_training_state(hub, folder):
    trainer = FakeTrainer(folder)
    trainer.init_hf_repo()
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"older layout")
    (folder / "all_results.json").write_text("{}")
    trainer._push_from_checkpoint(trainer.checkpoint(5))
    trainer._finish_current_push()
    assert set(hub.files("me/model")) == {"config.json", "model.safetensors", "all_results.json"}
    assert hub.files("me/model")["config.json"] == b'{"step": 5}'
    assert hub.messages == ["Training in progress, step 5"]


def test_end_pushes_no_checkpoint(hub, folder):
    trainer = FakeTrainer(folder, hub_strategy="end", save_strategy="epoch")
    trainer.init_hf_repo()
    trainer._push_from_checkpoint(trainer.checkpoint(5))
    assert trainer.push_in_progress.is_done() and not hub.messages


def test_last_checkpoint_can_be_resumed_elsewhere_and_holds_nothing_old(hub, folder, tmp_path):
    from huggingface_hub import snapshot_download

    trainer = FakeTrainer(folder, hub_strategy="checkpoint", save_strategy="epoch")
    trainer.init_hf_repo()
    first = Path(trainer.checkpoint(5))
    (first / "rng_state_1.pth").write_bytes(b"a process that is gone")
    trainer._push_from_checkpoint(str(first))
    trainer._push_from_checkpoint(trainer.checkpoint(10))
    trainer._finish_current_push()
    assert hub.messages[-2:] == ["Training in progress, epoch 1", "Training in progress, epoch 1, checkpoint"]
    names = {name for name in hub.files("me/model") if name.startswith("last-checkpoint/")}
    assert names == {f"last-checkpoint/{path.name}" for path in (folder / "checkpoint-10").iterdir()}

    elsewhere = snapshot_download("me/model", token=TOKEN, cache_dir=tmp_path / "cache")
    arrived = Path(elsewhere, "last-checkpoint")
    assert TrainerState.load_from_json(arrived / "trainer_state.json").global_step == 10
    assert torch.load(arrived / "optimizer.pt", weights_only=True) == {"step": 10}


def test_all_checkpoints_stay_side_by_side(hub, folder):
    trainer = FakeTrainer(folder, hub_strategy="all_checkpoints")
    trainer.init_hf_repo()
    for step in (1, 2):
        trainer._push_from_checkpoint(trainer.checkpoint(step))
    trainer._finish_current_push()
    for step in (1, 2):
        assert hub.files("me/model")[f"checkpoint-{step}/config.json"] == b'{"step": %d}' % step


def test_a_push_does_not_see_what_happens_to_the_files_after_it_was_asked_for(hub, folder):
    trainer = FakeTrainer(folder, hub_strategy="checkpoint")
    trainer.init_hf_repo()
    hub.trouble = [("preupload", 503)] * 2
    path = trainer.checkpoint(7)
    trainer._push_from_checkpoint(path)
    shutil.rmtree(path)
    (folder / "config.json").write_text("torn")
    trainer._finish_current_push()
    assert hub.files("me/model")["model.safetensors"] == b"7" * (1 << 20)
    assert hub.files("me/model")["last-checkpoint/config.json"] == b'{"step": 7}'
    assert not list(folder.glob("_push-*"))


def test_without_hub_always_push_a_busy_queue_is_left_alone(hub, folder):
    trainer = FakeTrainer(folder, hub_always_push=False)
    trainer.init_hf_repo()
    hub.trouble = [("preupload", "stall")]
    trainer._push_from_checkpoint(trainer.checkpoint(1))
    trainer._push_from_checkpoint(trainer.checkpoint(2))
    assert trainer.callback_handler.pushes == 1
    hub.released.set()
    trainer._finish_current_push()
    assert hub.messages == ["Training in progress, step 1"]


@pytest.mark.parametrize("trouble", [500, 429, "disconnect", "stall"])
def test_passing_trouble_is_retried(hub, folder, monkeypatch, trouble):
    set_patience(monkeypatch, 1.5 if trouble == "stall" else 5.0)
    trainer = FakeTrainer(folder)
    trainer.init_hf_repo()
    hub.trouble = [("commit", trouble)]
    trainer._push_from_checkpoint(trainer.checkpoint(3))
    trainer._finish_current_push()
    assert hub.files("me/model")["config.json"] == b'{"step": 3}'


@pytest.mark.parametrize("trouble", [500, 403, "disconnect", "stall"])
def test_lasting_trouble_never_raises_and_names_the_command(hub, folder, caplog, monkeypatch, trouble):
    set_patience(monkeypatch, 0.5 if trouble == "stall" else 5.0)
    trainer = FakeTrainer(folder, hub_strategy="checkpoint", hub_revision="dev")
    trainer.init_hf_repo()
    hub.trouble = [("preupload", trouble)] * 100
    path = trainer.checkpoint(3)
    trainer._push_from_checkpoint(path)
    trainer._finish_current_push()
    assert len(trainer.push_in_progress.failures) == 2
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    command = f"hf upload me/model {path} last-checkpoint --revision dev --commit-message"
    assert any("training goes on" in line and command in line for line in said)
    assert any(line.startswith("Not on the Hub") and command in line for line in said)
    assert TOKEN not in caplog.text
    assert not list(folder.glob("_push-*"))


def test_the_named_command_does_what_it_says(hub, folder, monkeypatch):
    trainer = FakeTrainer(folder)
    trainer.init_hf_repo()
    hub.trouble = [("preupload", 403)]
    trainer._push_from_checkpoint(trainer.checkpoint(3))
    trainer._finish_current_push()
    assert hub.files("me/model") == {}
    import shlex

    words = shlex.split(trainer.push_in_progress.failures[0].command("me/model"))
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "PATH": "",
        "HOME": str(folder),
    }
    program = Path(sys.executable).with_name("hf")
    result = subprocess.run(
        [program, *words[1:]], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert set(hub.files("me/model")) == {"config.json", "model.safetensors"}


def test_a_later_push_makes_an_earlier_failure_good(hub, folder):
    trainer = FakeTrainer(folder)
    trainer.init_hf_repo()
    hub.trouble = [("preupload", 403)]
    trainer._push_from_checkpoint(trainer.checkpoint(1))
    trainer.push_in_progress.wait_until_done()
    assert len(trainer.push_in_progress.failures) == 1
    trainer._push_from_checkpoint(trainer.checkpoint(2))
    trainer._finish_current_push()
    assert trainer.push_in_progress.failures == []


def test_a_failed_final_push_gives_none_or_a_failed_future(hub, folder, caplog):
    trainer = FakeTrainer(folder)
    trainer.init_hf_repo()
    hub.trouble = [("preupload", 403)] * 2
    assert trainer.push_to_hub() is None
    assert f"hf upload me/model {folder} ." in caplog.text and "--exclude 'checkpoint-*'" in caplog.text
    assert isinstance(trainer.push_to_hub(blocking=False).exception(timeout=10), uploads.RefusedError)


def test_a_wrong_token_is_an_error_at_the_start(hub, folder):
    with pytest.raises(ArgumentError, match=r"`me/model`.*`hub_token`") as caught:
        FakeTrainer(folder, hub_token="hf_wrong").init_hf_repo()
    assert "hf_wrong" not in str(caught.value)


def test_an_impossible_name_is_an_error_at_the_start(hub, folder):
    with pytest.raises(ArgumentError, match="`hub_model_id`"):
        FakeTrainer(folder, hub_model_id="a/b/c").init_hf_repo()


@pytest.mark.parametrize("trouble", [503, "disconnect", "stall"])
def test_a_hub_out_of_reach_at_the_start_is_asked_again_by_the_push(hub, folder, caplog, trouble):
    trainer = FakeTrainer(folder)
    hub.trouble = [("create", trouble)] * (1 if trouble == "stall" else 20)
    trainer.init_hf_repo()
    assert trainer.hub_model_id is None and "cannot be reached" in caplog.text
    hub.trouble = []
    trainer._push_from_checkpoint(trainer.checkpoint(1))
    trainer._finish_current_push()
    assert trainer.hub_model_id == "me/model" and hub.files("me/model")


def test_a_missing_branch_is_created(hub, folder):
    trainer = FakeTrainer(folder, hub_revision="dev")
    trainer.push_to_hub()
    assert "dev" in hub.branches and "model.safetensors" in hub.files("me/model")


def test_the_token_is_not_pushed(hub, folder, caplog):
    trainer = FakeTrainer(folder)
    trainer.init_hf_repo()
    path = Path(trainer.checkpoint(1))
    torch.save({"hub_token": TOKEN}, path / "training_args.bin")
    (folder / "notes.txt").write_text(f"my token is {TOKEN}")
    trainer._push_from_checkpoint(str(path))
    trainer.push_to_hub()
    every = [content for commit in hub.repos["me/model"] for content in commit.values()]
    assert every and not any(TOKEN.encode() in content for content in every)
    assert "training_args.bin` contains the Hub token" in caplog.text and TOKEN not in caplog.text


def test_a_token_given_to_the_call_is_used_and_hidden(hub, folder):
    trainer = FakeTrainer(folder, hub_token=None)
    (folder / "notes.txt").write_text(TOKEN)
    assert trainer.push_to_hub(token=TOKEN) is not None
    assert "notes.txt" not in hub.files("me/model")


def test_a_snapshot_that_cannot_be_made_is_left_out(hub, folder, caplog, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    trainer = FakeTrainer(folder)
    trainer.init_hf_repo()
    path = trainer.checkpoint(1)
    monkeypatch.setattr(snapshots.tempfile, "mkdtemp", full)
    trainer._push_from_checkpoint(path)
    assert trainer.push_to_hub() is None
    assert caplog.text.count("No space left") == 2


def test_a_snapshot_that_cannot_be_filled_leaves_nothing(hub, folder, caplog, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    trainer = FakeTrainer(folder, hub_strategy="checkpoint")
    trainer.init_hf_repo()
    path = trainer.checkpoint(1)
    monkeypatch.setattr(snapshots.shutil, "copy2", full)
    trainer._push_from_checkpoint(path)
    assert trainer.push_to_hub() is None
    assert "No space left" in caplog.text and not list(folder.glob("_push-*"))


def test_leftovers_of_a_killed_run_are_removed(hub, folder):
    (folder / "_push-abc").mkdir()
    FakeTrainer(folder).init_hf_repo()
    assert not (folder / "_push-abc").exists()


def test_without_hard_links_files_are_copied(hub, folder, monkeypatch):
    def refuse(*args):
        raise OSError("no links here")

    monkeypatch.setattr(snapshots.os, "link", refuse)
    trainer = FakeTrainer(folder)
    trainer._push_from_checkpoint(trainer.checkpoint(4))
    trainer._finish_current_push()
    assert hub.files("me/model")["model.safetensors"] == b"4" * (1 << 20)


def test_nothing_to_finish(folder):
    FakeTrainer(folder)._finish_current_push()


def test_the_real_card_is_accepted(hub, folder):
    trainer = FakeTrainer(folder)
    content = card.render(card.Card(model_name="m", pipeline="text-generation", tags=["a"], hub_model_id="me/model"))
    trainer.create_model_card = lambda **kwargs: (folder / "README.md").write_text(content)
    trainer.push_to_hub()
    assert hub.files("me/model")["README.md"] == content.encode()
