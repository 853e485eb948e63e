"""Metrics as sums: computed batch by batch on the device, so that no prediction is ever kept.

Pass an object with two methods as `compute_metrics`:

    class MeanConfidence:
        def batch_sums(self, logits, labels):
            top = logits.softmax(-1).amax(-1)
            return {"top": top.sum(), "count": torch.tensor(top.numel())}

        def from_sums(self, sums):
            return {"confidence": sums["top"].item() / sums["count"].item()}

`batch_sums` sees what `prediction_step` returned for the rows of one batch on one process (through
`preprocess_logits_for_metrics`, if there is one) and returns tensors of fixed shapes. They are added over batches in
float64 and over processes once, at the end; `from_sums` turns the totals into numbers. Anything that is a function of
sums fits: accuracy, perplexity, calibration bins, a confusion matrix and with it precision, recall, F1 and Matthews.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from finetune.data.rows import IGNORE_INDEX
from finetune.distributed.ranks import sum_dtype
from finetune.errors import ArgumentError

if TYPE_CHECKING:
    from accelerate import Accelerator


@runtime_checkable
class SumMetrics(Protocol):
    """What `compute_metrics` may be instead of a function: see the module's docstring."""

    def batch_sums(self, logits: Any, labels: Any) -> Mapping[str, Tensor]: ...

    def from_sums(self, sums: dict[str, Tensor]) -> dict[str, float]: ...


class RunningSums:
    """The sums of one evaluation: on the device until `result`."""

    def __init__(self, metrics: SumMetrics) -> None:
        self.metrics = metrics
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, logits: Any, labels: Any) -> None:
        """Adds one batch; call it only with rows that count."""
        for name, value in self.metrics.batch_sums(logits, labels).items():
            if not isinstance(value, Tensor):
                raise ArgumentError(f"`batch_sums` must return tensors; `{name}` is a {type(value).__name__}.")
            value = value.detach().to(sum_dtype(value.device))
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def result(self, accelerator: "Accelerator") -> dict[str, float]:
        """Returns the metrics over all processes, or {} when no batch was added anywhere."""
        sums = {name: value.cpu().double() for name, value in self._sums.items()}
        if accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            everywhere: Any = gather_object([sums])
            sums = {}
            for part in everywhere:
                for name, value in part.items():
                    sums[name] = sums[name] + value if name in sums else value
        return self.metrics.from_sums(sums) if sums else {}


class TokenMetrics:
    """Token accuracy and perplexity of a language model, from logits (B, T, V) and unshifted labels (B, T).

    `shift` aligns position i with label i + 1, as causal models predict. Labels of -100 do not count.
    """

    def __init__(self, *, shift: bool = True) -> None:
        self.shift = shift

    def batch_sums(self, logits: Any, labels: Any) -> dict[str, Tensor]:
        """Returns `nll` (nats), `correct` and `count` over the supervised positions of one batch."""
        logits = logits[0] if isinstance(logits, tuple | list) else logits
        if self.shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        kept = labels.ne(IGNORE_INDEX)
        logits, labels = logits[kept], labels[kept]  # (N, V), (N)
        nll = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
        return {"nll": nll, "correct": logits.argmax(-1).eq(labels).sum(), "count": kept.sum()}

    def from_sums(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Returns `token_accuracy` and `perplexity`; {} without a supervised token."""
        if not sums["count"]:
            return {}
        return {
            "token_accuracy": float(sums["correct"] / sums["count"]),
            "perplexity": float(torch.exp(sums["nll"] / sums["count"])),
        }


class ClassificationMetrics:
    """Accuracy and macro-averaged precision, recall and F1 of one label per row (or token; -100 does not count).

    A class that is neither predicted nor present counts as 0 in the averages, as in scikit-learn with
    `zero_division=0` and all labels named. Example with 2 classes: labels [0, 0, 1], predictions [0, 1, 1] give
    accuracy 2/3, precision (1 + 1/2) / 2, recall (1/2 + 1) / 2 and F1 2/3.
    """

    def __init__(self, num_labels: int) -> None:
        self.num_labels = num_labels

    def batch_sums(self, logits: Any, labels: Any) -> dict[str, Tensor]:
        """Returns the confusion matrix (label, prediction) of one batch, shape (num_labels, num_labels)."""
        logits = logits[0] if isinstance(logits, tuple | list) else logits
        predictions, labels = logits.argmax(-1).flatten(), labels.flatten()
        kept = labels.ne(IGNORE_INDEX)
        cells = labels[kept] * self.num_labels + predictions[kept]
        counts = torch.bincount(cells, minlength=self.num_labels**2)
        return {"confusion": counts.view(self.num_labels, self.num_labels)}

    def from_sums(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Returns `accuracy`, `precision`, `recall` and `f1`."""
        confusion = sums["confusion"]
        hits, present, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
        return {
            "accuracy": float(hits.sum() / confusion.sum().clamp(min=1)),
            "precision": float((hits / predicted.clamp(min=1)).mean()),
            "recall": float((hits / present.clamp(min=1)).mean()),
            "f1": float((2 * hits / (present + predicted).clamp(min=1)).mean()),
        }
