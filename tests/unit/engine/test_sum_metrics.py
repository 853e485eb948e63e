"""Metrics as sums, by hand."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune.engine.search import default_compute_objective
from finetune.engine.sum_metrics import ClassificationMetrics, RunningSums, SumMetrics, TokenMetrics

ALONE: Any = SimpleNamespace(num_processes=1)


def test_functions_are_no_sums_and_these_are() -> None:
    assert isinstance(TokenMetrics(), SumMetrics)
    assert isinstance(ClassificationMetrics(2), SumMetrics)
    assert not isinstance(len, SumMetrics)


def test_tokens_by_hand() -> None:
    """Position 0 predicts label 1 and so on; the last position and -100 do not count."""
    logits = torch.tensor([[[2.0, 0.0], [0.0, 2.0], [9.0, 9.0]]])
    labels = torch.tensor([[1, 0, 0]])
    sums = TokenMetrics().batch_sums(logits, labels)
    wrong = torch.log(1 + torch.exp(torch.tensor(-2.0))).item() + 2
    right = torch.log(1 + torch.exp(torch.tensor(-2.0))).item()
    assert sums["nll"].item() == pytest.approx(right + wrong)
    assert (int(sums["correct"]), int(sums["count"])) == (1, 2)
    unshifted = TokenMetrics(shift=False).batch_sums(logits, torch.tensor([[0, -100, -100]]))
    assert (int(unshifted["correct"]), int(unshifted["count"])) == (1, 1)
    assert TokenMetrics().from_sums(dict.fromkeys(("nll", "correct", "count"), torch.tensor(0.0))) == {}


def test_classes_by_hand() -> None:
    running = RunningSums(ClassificationMetrics(2))
    running.add(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]))
    running.add((torch.tensor([[0.0, 1.0], [1.0, 0.0]]), "hidden states"), torch.tensor([1, -100]))
    result = running.result(ALONE)
    assert result == pytest.approx({"accuracy": 2 / 3, "precision": 0.75, "recall": 0.75, "f1": 2 / 3})


def test_nothing_added_gives_no_metrics() -> None:
    assert RunningSums(TokenMetrics()).result(ALONE) == {}


def test_small_numbers_are_not_lost_beside_large_ones() -> None:
    class One:
        def batch_sums(self, logits: Any, labels: Any) -> dict[str, torch.Tensor]:
            return {"n": logits}

        def from_sums(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
            return {"n": float(sums["n"])}

    running = RunningSums(One())
    for value in (2.0**24, 1.0, 1.0):
        running.add(torch.tensor(value), None)
    assert running.result(ALONE) == {"n": 2.0**24 + 2}, "float32 would have lost the ones"


def test_the_default_objective() -> None:
    speed = {"eval_runtime": 1.0, "eval_samples_per_second": 9.0, "eval_model_preparation_time": 1.0, "epoch": 3.0}
    assert default_compute_objective({"eval_loss": 0.5, **speed}) == 0.5
    assert default_compute_objective({"eval_loss": 0.5, "eval_a": 1.0, "eval_b": 2.0, **speed}) == 3.0
    assert default_compute_objective({"eval_loss": 0.5, **speed, "num_input_tokens_seen": 900}) == 0.5
