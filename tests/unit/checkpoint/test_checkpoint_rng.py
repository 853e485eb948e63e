import logging
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from finetune.checkpoint import files, rng
from finetune.errors import CheckpointError


def draw() -> list[Any]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(2).tolist()]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    draw()  # leaves a half-used Gaussian pair in `random` and numpy


def test_restored_streams_continue_bit_for_bit(tmp_path: Path) -> None:
    rng.save_rng(tmp_path, 0, 1)
    expected = [draw() for _ in range(3)]
    assert rng.load_rng(tmp_path, 0, 1)
    assert [draw() for _ in range(3)] == expected


def test_capturing_draws_nothing() -> None:
    state = rng.capture_rng()
    first = draw()
    rng.restore_rng(state)
    rng.capture_rng()
    assert draw() == first


def test_needs_no_allow_list(tmp_path: Path) -> None:
    rng.save_rng(tmp_path, 3, 4)
    torch.load(tmp_path / "rng_state_3.pth", weights_only=True)
    assert not torch.serialization.get_unsafe_globals_in_checkpoint(tmp_path / "rng_state_3.pth")


def test_transformers_reads_ours(tmp_path: Path) -> None:
    from transformers import Trainer

    rng.save_rng(tmp_path, 0, 1)
    expected = draw()
    args = SimpleNamespace(world_size=1, process_index=0, parallel_mode=None)
    Trainer._load_rng_state(SimpleNamespace(args=args), str(tmp_path))  # type: ignore[arg-type]
    assert draw() == expected


def test_we_read_that_of_transformers(tmp_path: Path) -> None:
    from transformers import Trainer

    args = SimpleNamespace(world_size=1, process_index=0, parallel_mode=None)
    Trainer._save_rng_state(SimpleNamespace(args=args), str(tmp_path))  # type: ignore[arg-type]
    assert torch.serialization.get_unsafe_globals_in_checkpoint(tmp_path / "rng_state.pth"), "it has a NumPy array"
    expected = draw()
    assert rng.load_rng(tmp_path, 0, 1)
    assert draw() == expected


def test_another_number_of_processes_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rng.save_rng(tmp_path, 0, 1)
    with caplog.at_level(logging.WARNING):
        assert not rng.load_rng(tmp_path, 1, 2)
    assert "saved by 1" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.pop("python"),
        lambda s: s.update(numpy=("MT19937", [1, 2], 0, 0, 0.0)),
        lambda s: s.update(cpu=torch.zeros(3)),
        lambda s: s.update(python=(3, (1, 2), None)),
        lambda s: s.update(python=5),
    ],
)
def test_malformed_state_is_one_clear_error(tmp_path: Path, change: Any) -> None:
    state = rng.capture_rng()
    change(state)
    files.save_plain(state, tmp_path / "rng_state.pth")
    with pytest.raises(CheckpointError, match="random state"):
        rng.load_rng(tmp_path, 0, 1)


def test_a_file_that_is_not_a_dictionary(tmp_path: Path) -> None:
    files.save_plain([1, 2], tmp_path / "rng_state.pth")
    with pytest.raises(CheckpointError):
        rng.load_rng(tmp_path, 0, 1)
