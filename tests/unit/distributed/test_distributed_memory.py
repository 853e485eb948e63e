"""How much memory is free."""

import pytest
import torch

from finetune.distributed import memory


def test_a_container_may_leave_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_container_bytes", lambda: 5)
    assert memory.free_bytes(torch.device("cpu")) == 5
