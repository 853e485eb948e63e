"""Metrics from sums over batches against scikit-learn and scipy on all rows at once."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as reference

from finetune.sequence_classification.metrics import ClassMetrics, LabelMetrics, ranks, regression_metrics


def summed(metrics: Any, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Returns the metrics from batches of 7 rows."""
    total: dict[str, torch.Tensor] = {}
    for start in range(0, len(labels), 7):
        for name, value in metrics.batch_sums(logits[start : start + 7], labels[start : start + 7]).items():
            total[name] = total.get(name, 0) + value.double()
    return metrics.from_sums(total)


@pytest.mark.parametrize("classes", [2, 4])
def test_class_metrics_agree_with_scikit_learn(classes: int) -> None:
    torch.manual_seed(classes)
    labels, logits = torch.randint(0, classes, (50,)), torch.randn(50, classes + (classes > 2))
    found = summed(ClassMetrics(logits.shape[1]), logits, labels)  # with 4 classes a fifth never occurs as a label
    truth, guess = labels.numpy(), logits.argmax(-1).numpy()
    assert found["accuracy"] == pytest.approx(reference.accuracy_score(truth, guess))
    assert found["f1_macro"] == pytest.approx(reference.f1_score(truth, guess, average="macro"))
    assert found["f1_weighted"] == pytest.approx(reference.f1_score(truth, guess, average="weighted"))
    assert found["matthews_correlation"] == pytest.approx(reference.matthews_corrcoef(truth, guess))
    assert found.get("f1") == (pytest.approx(reference.f1_score(truth, guess)) if classes == 2 else None)


def test_the_example_of_the_docstring_and_one_class_only() -> None:
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    found = summed(ClassMetrics(2), logits, torch.tensor([0, 0, 1, 1]))
    assert [round(found[name], 3) for name in ("accuracy", "f1", "f1_macro", "matthews_correlation")] == [
        *(0.75, 0.8, 0.733, 0.577)
    ]
    assert summed(ClassMetrics(2), logits[1:], torch.tensor([1, 1, 1]))["matthews_correlation"] == 0.0


def test_label_metrics_agree_with_scikit_learn() -> None:
    torch.manual_seed(0)
    labels, logits = torch.randint(0, 2, (50, 5)).float(), torch.randn(50, 5)
    found = summed(LabelMetrics(), logits, labels)
    truth, guess = labels.numpy(), (logits > 0).numpy()
    assert found["accuracy"] == pytest.approx(reference.accuracy_score(truth, guess))
    for average in ("micro", "macro", "weighted"):
        assert found[f"f1_{average}"] == pytest.approx(reference.f1_score(truth, guess, average=average))


def test_regression_metrics_agree_with_scipy_also_for_ties() -> None:
    draw = np.random.default_rng(0)
    predicted, wanted = draw.normal(size=(40, 1)), draw.integers(0, 5, size=40).astype(float)
    found = regression_metrics(SimpleNamespace(predictions=predicted, label_ids=wanted))
    assert found["pearson"] == pytest.approx(stats.pearsonr(predicted[:, 0], wanted)[0])
    assert found["spearman"] == pytest.approx(stats.spearmanr(predicted[:, 0], wanted)[0])
    assert found["mse"] == pytest.approx(reference.mean_squared_error(wanted, predicted[:, 0]))
    assert ranks(np.array([10, 30, 10])).tolist() == [1.5, 3.0, 1.5]
    flat = regression_metrics(SimpleNamespace(predictions=np.ones((3, 1)), label_ids=np.arange(3.0)))
    assert set(flat) == {"mse", "mae"}
