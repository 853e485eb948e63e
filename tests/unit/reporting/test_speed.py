import pytest

from finetune.reporting import speed


@pytest.mark.parametrize(
    "counts",
    [{}, {"num_samples": 7, "num_steps": 3}, {"num_tokens": 12345}, {"num_samples": 0, "num_steps": 2.5}],
)
def test_same_metrics_as_transformers(monkeypatch, counts):
    from transformers import trainer_utils

    monkeypatch.setattr(speed.time, "time", lambda: 103.123456)
    assert speed.speed_metrics("eval", 100.0, **counts) == trainer_utils.speed_metrics("eval", 100.0, **counts)


def test_no_time_no_rate(monkeypatch):
    monkeypatch.setattr(speed.time, "time", lambda: 100.0)
    assert speed.speed_metrics("train", 100.0, num_samples=3) == {"train_runtime": 0.0}
