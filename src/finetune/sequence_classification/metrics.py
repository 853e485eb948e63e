"""Metrics by task. Those of classes are sums over batches (`engine/sum_metrics.py`): no prediction is kept.

Pearson and Spearman need all predictions of a regression at once, one number per row.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.engine.sum_metrics import ClassificationMetrics, SumMetrics
from finetune.sequence_classification.labels import MULTI, SINGLE, Task


def metrics_for(task: Task) -> Any:
    """Returns what `compute_metrics` is for a task."""
    if task.problem_type == SINGLE:
        return ClassMetrics(len(task.names))
    metrics: SumMetrics | Any = LabelMetrics() if task.problem_type == MULTI else regression_metrics
    return metrics


def first_output(logits: Any, labels: Any = None) -> Any:
    """Returns the logits among a model's outputs, which some models return with hidden states."""
    return logits[0] if isinstance(logits, (tuple, list)) else logits


class ClassMetrics(ClassificationMetrics):
    """Accuracy, macro and weighted F1 and Matthews correlation of one class per row; with two classes F1 of class 1.

    Agrees with scikit-learn: macro F1 averages over the classes that occur as a label or a prediction. Labels
    [0, 0, 1, 1], predictions [0, 1, 1, 1]: accuracy 0.75, F1 0.8, macro F1 0.733, Matthews 0.577.
    """

    def from_sums(self, sums: dict[str, Tensor]) -> dict[str, float]:
        confusion = sums["confusion"]
        hits, present, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
        total = confusion.sum()
        f1 = _f1(hits, present, predicted)
        covariance = hits.sum() * total - (present * predicted).sum()
        spread = (total**2 - (predicted**2).sum()) * (total**2 - (present**2).sum())
        found = {
            "accuracy": hits.sum() / total,
            "f1_macro": f1[(present + predicted) > 0].mean(),
            "f1_weighted": (f1 * present).sum() / total,
            "matthews_correlation": covariance / spread.sqrt() if spread > 0 else torch.zeros(()),
        }
        if self.num_labels == 2:
            found["f1"] = f1[1]
        return {name: float(value) for name, value in found.items()}


class LabelMetrics:
    """Exact match (`accuracy`) and micro, macro and weighted F1 of several labels per row, predicted above 0.5."""

    def batch_sums(self, logits: Any, labels: Any) -> dict[str, Tensor]:
        """Returns counts for logits and labels of shape (B, C)."""
        predicted, present = first_output(logits) > 0, labels > 0.5
        exact = predicted.eq(present).all(-1)
        return {
            "hits": (predicted & present).sum(0),
            "present": present.sum(0),
            "predicted": predicted.sum(0),
            "exact": exact.sum(),
            "rows": torch.tensor(exact.numel(), device=exact.device),
        }

    def from_sums(self, sums: dict[str, Tensor]) -> dict[str, float]:
        hits, present, predicted = sums["hits"], sums["present"], sums["predicted"]
        f1 = _f1(hits, present, predicted)
        return {
            "accuracy": float(sums["exact"] / sums["rows"]),
            "f1_micro": float(_f1(hits.sum(), present.sum(), predicted.sum())),
            "f1_macro": float(f1.mean()),
            "f1_weighted": float((f1 * present).sum() / present.sum().clamp(min=1)),
        }


def _f1(hits: Tensor, present: Tensor, predicted: Tensor) -> Tensor:
    return 2 * hits / (present + predicted).clamp(min=1)


def regression_metrics(prediction: Any) -> dict[str, float]:
    """Returns mean squared and absolute error and, for one output, Pearson and Spearman correlation.

    A correlation is left out where it is not defined: fewer than two rows, or all values equal.
    """
    predicted = np.asarray(first_output(prediction.predictions), dtype=np.float64)
    wanted = np.asarray(prediction.label_ids, dtype=np.float64)
    if predicted.ndim == 2 and predicted.shape[1] == 1:
        predicted, wanted = predicted[:, 0], wanted.reshape(-1)
    error = predicted - wanted
    found: dict[str, float] = {"mse": float((error**2).mean()), "mae": float(np.abs(error).mean())}
    if predicted.ndim == 1 and len(predicted) > 1 and np.ptp(predicted) and np.ptp(wanted):
        found["pearson"] = float(np.corrcoef(predicted, wanted)[0, 1])
        found["spearman"] = float(np.corrcoef(ranks(predicted), ranks(wanted))[0, 1])
    return found


def ranks(values: np.ndarray) -> np.ndarray:
    """Returns ranks from 1; equal values share their mean: [10, 30, 10] -> [1.5, 3, 1.5]."""
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[index]
