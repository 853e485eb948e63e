"""Files are written entirely or not at all, and names and sizes are read in one way."""

import os
from pathlib import Path

import pytest

from finetune import files


@pytest.mark.parametrize("durably", [False, True])
def test_a_file_is_replaced_entirely(tmp_path: Path, durably: bool) -> None:
    for content in ("one\n", "zw\u00f6lf\n", b"bytes"):
        files.write_atomically(tmp_path / "latest", content, durably=durably)
        assert [p.name for p in tmp_path.iterdir()] == ["latest"]
        wanted = content if isinstance(content, bytes) else content.encode()
        assert (tmp_path / "latest").read_bytes() == wanted


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "latest"
    path.write_text("one")

    def full(source: object, target: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        files.write_atomically(path, "two")
    assert [p.name for p in tmp_path.iterdir()] == ["latest"] and path.read_text() == "one"


def test_durable_writes_reach_the_disk(tmp_path: Path, monkeypatch) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    files.write_atomically(tmp_path / "a", "x")
    assert not flushed
    files.write_atomically(tmp_path / "a", "x", durably=True)
    assert len(flushed) == 2, "the file and its folder"


def test_checkpoint_names() -> None:
    assert files.checkpoint_step(files.checkpoint_name(12)) == 12
    assert files.checkpoint_step("a/checkpoint-12") == 12
    for other in ("checkpoint-12b", "checkpoint-12.tmp", "checkpoint-", "my-checkpoint-12"):
        assert files.checkpoint_step(other) is None


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1023 B"), (3 << 30, "3.0 GiB"), (5 << 40, "5.0 TiB")])
def test_format_bytes(count: int, text: str) -> None:
    assert files.format_bytes(count) == text
