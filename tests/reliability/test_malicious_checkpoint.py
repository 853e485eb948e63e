"""A pickle in a checkpoint folder is never executed, wherever it is, also when the manifest vouches for it."""

import io
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.checkpoint import backends, layout, manifest
from finetune.errors import CheckpointError


class Bomb:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.trace}",))


def forge(folder: Path) -> None:
    """Certifies the folder as it is, as an attacker would."""
    facts = manifest.read_manifest(folder)
    assert facts is not None
    forged = manifest.describe(
        folder, step=facts.step, world_size=1, model_only=False, metric=None, greater_is_better=True
    )
    (folder / layout.MANIFEST).write_text(forged.to_json())


@pytest.mark.parametrize("form", ["zip", "old", "raw"])
@pytest.mark.parametrize(
    "name",
    ["optimizer.pt", "scheduler.pt", "rng_state.pth", "finetune_state.pt", "training_args.bin", "pytorch_model.bin"],
)
def test_bomb_in_every_file(name: str, form: str, tmp_path: Path, tiny_run: Any) -> None:
    run = tiny_run().train(2)
    folder, trace = run.save().path, tmp_path / "executed"
    bomb = {"state": Bomb(trace), "param_groups": [], "states": Bomb(trace), "python": Bomb(trace)}
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    if form == "raw":
        (folder / name).write_bytes(pickle.dumps(bomb))
    else:
        torch.save(bomb, folder / name, _use_new_zipfile_serialization=form == "zip")
    forge(folder)
    if name == "training_args.bin":  # nothing reads it
        tiny_run().resume(True)
    else:
        with pytest.raises(CheckpointError, match="could run code"):
            tiny_run().resume(True)
    assert not trace.exists()


def test_bomb_in_adapter_weights(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from finetune.checkpoint.weights import load_weights

    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=2, target_modules=["q_proj"]))
    torch.save(Bomb(tmp_path / "executed"), tmp_path / layout.PICKLED_ADAPTER_WEIGHTS)
    with pytest.raises(CheckpointError, match="could run code"):
        load_weights(tmp_path, model)
    assert not (tmp_path / "executed").exists()


class TestSharded:
    """FSDP's and DeepSpeed's loaders unpickle; here they do not."""

    def test_metadata_of_distributed_checkpoints(self, tmp_path: Path) -> None:
        folder = tmp_path / "pytorch_model_fsdp_0"
        folder.mkdir()
        (folder / ".metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
        with pytest.raises(CheckpointError, match=r"names `(posix|nt)\.system`"):
            with backends.safe_loading(tmp_path):
                raise AssertionError("not reached")
        assert not (tmp_path / "executed").exists()

    def test_dotted_names_are_not_a_way_out(self, tmp_path: Path) -> None:
        payload = b"\x80\x04\x8c\x27torch.distributed.checkpoint.filesystem\x8c\x09os.system\x93\x8c\x04true\x85R."
        (tmp_path / ".metadata").write_bytes(payload)
        with pytest.raises(CheckpointError, match=r"os\.system"), backends.safe_loading(tmp_path):
            pass

    def test_real_metadata_passes(self, tmp_path: Path) -> None:
        import torch.distributed.checkpoint as dcp

        model = torch.nn.Linear(3, 3)
        dcp.save({"m": model.state_dict(), "lr": 0.1}, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
        loaded = {"m": {k: torch.zeros_like(v) for k, v in model.state_dict().items()}, "lr": 0.0}
        with backends.safe_loading(tmp_path):
            dcp.load(loaded, storage_reader=dcp.FileSystemReader(tmp_path), no_dist=True)
        assert loaded["lr"] == 0.1 and torch.equal(loaded["m"]["weight"], model.weight)

    def test_every_load_inside_is_safe(self, tmp_path: Path) -> None:
        buffer = io.BytesIO()
        torch.save(Bomb(tmp_path / "executed"), buffer)
        with backends.safe_loading(tmp_path), pytest.raises(pickle.UnpicklingError):
            torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
        assert not (tmp_path / "executed").exists() and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
        with pytest.raises(CheckpointError), backends.restoring(tmp_path), backends.safe_loading(tmp_path):
            torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)

    def test_bomb_is_live(self, tmp_path: Path) -> None:
        pickle.loads(pickle.dumps(Bomb(tmp_path / "executed")))
        assert (tmp_path / "executed").exists()


def test_link_to_a_file_outside(tmp_path: Path, tiny_run: Any) -> None:
    run = tiny_run().train(1)
    folder = run.save().path
    shutil.move(folder / "optimizer.pt", tmp_path / "optimizer.pt")
    (folder / "optimizer.pt").symlink_to(tmp_path / "optimizer.pt")
    tiny_run().resume(True)  # the content is what was certified
    (tmp_path / "optimizer.pt").write_bytes(b"PK")
    with pytest.raises(CheckpointError):
        tiny_run().resume(True)
