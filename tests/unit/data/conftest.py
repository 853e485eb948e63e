"""What the tests of prepared rows share."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

TEXTS = ["the cat sat on a mat", "sun", "stars over the hills", "a"]


@pytest.fixture
def quiet() -> Iterator[None]:
    """No progress bars of `datasets`."""
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def on_disk(tmp_path: Path) -> Any:
    """Four rows with `text` (`TEXTS`) and `extra`, in files of their own."""
    datasets.Dataset.from_dict({"text": TEXTS, "extra": [1, 2, 3, 4]}).save_to_disk(tmp_path / "rows")
    return datasets.load_from_disk(str(tmp_path / "rows"))
