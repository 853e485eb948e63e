"""Lookups are answered once, with the true answer, and are looked up again afterwards."""

import accelerate.optimizer
import pytest

from finetune.features.lookups import settled_lookups


@pytest.mark.parametrize("answer", [True, False])
def test_asked_once_and_restored(monkeypatch, answer: bool) -> None:
    asked: list[int] = []

    def look() -> bool:
        asked.append(1)
        return answer

    monkeypatch.setattr(accelerate.optimizer, "is_lomo_available", look)
    with pytest.raises(KeyError), settled_lookups():
        assert [accelerate.optimizer.is_lomo_available() for _ in range(5)] == [answer] * 5
        assert len(asked) == 1
        raise KeyError
    assert accelerate.optimizer.is_lomo_available is look
