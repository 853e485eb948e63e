import collections
import enum
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetune.checkpoint import copies, files, layout
from finetune.errors import CheckpointError, ModelLoadError


class Colour(str, enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.trace}",))


def test_plain_values_survive_a_safe_load(tmp_path: Path) -> None:
    value = {
        "a": [1, 2.5, None, True, b"x", "text"],
        3: (np.float64(0.5), np.int64(4), np.bool_(True)),
        "enums": [Colour.RED, Level.HIGH],
        "ordered": collections.OrderedDict(x=1),
        "counter": collections.Counter({5: 2}),
        "defaults": collections.defaultdict(list, k=[1]),
        "set": {1, 2},
        "torch": (torch.float16, torch.device("cpu"), torch.Size([2, 3]), torch.ones(2, dtype=torch.bfloat16)),
    }
    files.save_plain(value, tmp_path / "x.pt")
    read = torch.load(tmp_path / "x.pt", weights_only=True)
    assert read["a"] == value["a"] and read[3] == (0.5, 4, True)
    assert read["enums"] == ["red", 3] and [type(v) for v in read["enums"]] == [str, int]
    assert read["counter"].most_common() == [(5, 2)] and read["defaults"] == {"k": [1]} and read["set"] == {1, 2}
    assert read["torch"][:3] == value["torch"][:3] and torch.equal(read["torch"][3], value["torch"][3])


@pytest.mark.parametrize("value", [object(), Path("x"), np.zeros(2), lambda: 0, 1j])
def test_anything_else_is_refused_by_name(tmp_path: Path, value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"`x\.pt\.state\.0\[1\]` is a"):
        files.save_plain({"state": {0: [1, value]}}, tmp_path / "x.pt")
    assert not (tmp_path / "x.pt").exists()


def test_tensor_class_that_a_safe_load_does_not_know_is_refused(tmp_path: Path) -> None:
    class Strange(torch.Tensor):
        pass

    with pytest.raises((CheckpointError, AttributeError, pickle.PicklingError)):
        files.save_plain({"t": torch.ones(2).as_subclass(Strange)}, tmp_path / "x.pt")


def test_pickle_is_never_executed(tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    torch.save({"state": Bomb(trace)}, tmp_path / "optimizer.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Bomb(trace)))
    torch.save({"state": Bomb(trace)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("optimizer.pt", "raw.pt", "old.pt"):
        with pytest.raises(CheckpointError, match="could run code"):
            files.load_plain(tmp_path / name)
    assert not trace.exists()
    pickle.loads((tmp_path / "raw.pt").read_bytes())
    assert trace.exists(), "the bomb must be a live one"


def test_missing_and_truncated_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        files.load_plain(tmp_path / "x.pt")
    files.save_plain({"a": torch.ones(100)}, tmp_path / "x.pt")
    os.truncate(tmp_path / "x.pt", 700)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        files.load_plain(tmp_path / "x.pt")


def test_snapshot_is_independent_and_keeps_ties() -> None:
    weight = torch.ones(3)
    copy = copies.snapshot({"a": weight, "b": weight, "half": weight[:2], "list": [weight, 1]})
    weight.add_(1)
    assert copy["a"].tolist() == [1, 1, 1] and copy["half"].tolist() == [1, 1]
    assert copy["a"].data_ptr() == copy["b"].data_ptr() == copy["list"][0].data_ptr() != weight.data_ptr()


def test_snapshot_does_not_confuse_a_freed_tensor_with_its_successor() -> None:
    memo: dict[Any, Any] = {}
    taken = [copies.snapshot(torch.full((64,), float(i)), memo) for i in range(50)]
    assert [int(c[0]) for c in taken] == list(range(50))


def test_same_bits() -> None:
    nan, zero = torch.tensor([float("nan")]), torch.tensor([0.0])
    assert files.same_bits(nan, nan.clone()) and not files.same_bits(zero, -zero)
    assert not files.same_bits(zero, zero.double()) and not files.same_bits(zero, torch.zeros(2))
    assert files.same_bits(torch.ones(3, 2).t(), torch.ones(2, 3)) and files.same_bits(torch.empty(0), torch.empty(0))
    assert files.same_bits(torch.tensor(3.0), torch.tensor(3.0)) and files.same_bits(
        torch.tensor([True]), torch.tensor([True])
    )


def test_digest_is_of_the_whole_file(tmp_path: Path) -> None:
    import hashlib

    content = os.urandom(files._CHUNK + 12345)
    (tmp_path / "x").write_bytes(content)
    assert files.digest(tmp_path / "x") == hashlib.sha256(content).hexdigest()


def test_only_failures_of_the_file_system_become_checkpoint_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="Is a directory"), files.writing(tmp_path):
        tmp_path.write_text("")
    with pytest.raises(RuntimeError, match="mine") as caught, files.writing(tmp_path):
        raise RuntimeError("mine")
    assert not isinstance(caught.value, CheckpointError)
    with pytest.raises(CheckpointError), files.writing(tmp_path):
        torch.save({}, tmp_path / "missing" / "x.pt")


class TestLayout:
    def test_names(self) -> None:
        assert layout.rng_name(0, 1) == "rng_state.pth" and layout.rng_name(1, 2) == "rng_state_1.pth"
        assert layout.checkpoint_step("a/checkpoint-12") == 12 and layout.checkpoint_step("checkpoint-12b") is None

    def test_transformers_agrees(self) -> None:
        from transformers import trainer, trainer_utils, utils
        from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME

        assert layout.CHECKPOINT_PREFIX == trainer_utils.PREFIX_CHECKPOINT_DIR
        assert [layout.OPTIMIZER, layout.SCHEDULER, layout.SCALER, layout.TRAINER_STATE, layout.TRAINING_ARGS] == [
            trainer.OPTIMIZER_NAME, trainer.SCHEDULER_NAME, trainer.SCALER_NAME, trainer.TRAINER_STATE_NAME,
            trainer.TRAINING_ARGS_NAME,
        ]  # fmt: skip
        assert [layout.WEIGHTS, layout.WEIGHTS_INDEX] == [utils.SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME]
        assert [layout.PICKLED_WEIGHTS, layout.ADAPTER_WEIGHTS] == [utils.WEIGHTS_NAME, ADAPTER_SAFE_WEIGHTS_NAME]

    def test_ranked_files(self, tmp_path: Path) -> None:
        for name in ("rng_state_10.pth", "rng_state_2.pth", "finetune_state_1.pt", "finetune_state_0.pt"):
            (tmp_path / name).touch()
        assert layout.rng_ranks(tmp_path) == [2, 10]
        assert [p.name for p in layout.stateful_files(tmp_path)] == ["finetune_state_0.pt", "finetune_state_1.pt"]


def test_copies_use_the_memory_of_the_last_ones_only_when_told() -> None:
    pool, tensor = copies.CopyPool(), torch.arange(6.0).view(2, 3)
    first = copies.snapshot({"a": tensor}, pool=pool)["a"]
    second = copies.snapshot([tensor], pool=pool)[0]
    assert second.data_ptr() != first.data_ptr(), "the first copy may still be being written"
    pool.renew()
    tensor += 1
    again = copies.snapshot((tensor, torch.ones(7)), pool=pool)[0]
    assert again.data_ptr() in (first.data_ptr(), second.data_ptr())
    assert torch.equal(again, tensor)
    pool.trim()
    assert pool.num_bytes == tensor.nbytes + 7 * 4


class OfALibrary(OSError):
    """As `requests.exceptions.RequestException` is one."""


@pytest.mark.parametrize(
    ("error", "is_of_the_disk"),
    [
        (OSError(28, "No space left on device"), True),
        (PermissionError(13, "Permission denied"), True),
        (OSError("something"), True),
        (TimeoutError(110, "Connection timed out", "/nfs/file"), True),
        (ConnectionResetError(104, "Connection reset by peer"), False),
        (TimeoutError("timed out"), False),
        (OfALibrary("503"), False),
        (ModelLoadError("of an override"), False),
        (CheckpointError("said already"), False),
    ],
)
def test_only_errors_of_the_disk_are_said_to_be_such(tmp_path: Path, error: Exception, is_of_the_disk: bool) -> None:
    with pytest.raises(CheckpointError if is_of_the_disk else type(error)) as caught, files.writing(tmp_path / "x"):
        raise error
    assert ("could not be written" in str(caught.value)) == is_of_the_disk
