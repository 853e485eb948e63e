"""What errors say, made short for a message."""

import sys
from pathlib import Path
from typing import Any

import pytest

import finetune
from finetune.errors import first_line, one_line


def test_one_line() -> None:
    assert one_line(ValueError("two\n   lines ")) == "two lines"
    assert one_line(ValueError("x" * 301)) == "x" * 297 + "..."
    assert one_line(ValueError("x" * 10), 8) == "xxxxx..."


def test_first_line() -> None:
    assert first_line(RuntimeError("\nfull disk\nfile.cc:12")) == "full disk"
    assert first_line(RuntimeError()) == first_line(RuntimeError(" \n")) == "RuntimeError"
    assert len(first_line(ValueError("x" * 301))) == 300


def test_a_name_that_the_package_lacks() -> None:
    with pytest.raises(AttributeError, match="Did you mean `SFTTrainer`"):
        finetune.SFTTrainr  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(AttributeError, match=r"no attribute '__file_\w+'\.$"):
        finetune.__file_name__  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_a_name_that_only_trl_has(monkeypatch: Any, tmp_path: Path) -> None:
    (tmp_path / "trl").mkdir()
    (tmp_path / "trl" / "__init__.py").write_text('_names = ["RichProgressCallback"]\nraise RuntimeError("imported")\n')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trl", raising=False)
    with pytest.raises(AttributeError, match="not part of finetune: `from trl import RichProgressCallback`"):
        finetune.RichProgressCallback  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
