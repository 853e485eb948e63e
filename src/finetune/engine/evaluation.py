"""The evaluation loop shared by `evaluate` and `predict`.

The loss is a sum over items divided by their count, reduced over processes once, at the end: it does not depend on
the batch size, on packing or on the number of processes. Two batches with mean losses 2.0 over 30 tokens and 1.0 over
10 tokens give 1.75, where a mean over batches gives 1.5.

Rows that accelerate repeats to give every process a full last batch are cut off before they are scored.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from finetune.compat import EvalLoopOutput, EvalPrediction
from finetune.control.callbacks import Events
from finetune.distributed import ranks
from finetune.engine.eval_rows import CountedBatch, count_rows, require_rounds
from finetune.engine.gather import PADDING, Collected, find_batch_size, pad_rows
from finetune.engine.step import count_items
from finetune.engine.sum_metrics import RunningSums, SumMetrics
from finetune.errors import ArgumentError
from finetune.hooks import EvalHooks

if TYPE_CHECKING:
    from accelerate import Accelerator

    from finetune.arguments import TrainingArguments


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalSettings:
    """What one evaluation needs beside the model and the data.

    Attributes:
        compute_metrics: a function of an `EvalPrediction`, `SumMetrics`, or None.
        main_input_name: the batch entry handed to `compute_metrics` as `inputs`.
        keep_all: whether outputs are kept although metrics are computed batch by batch (`predict`).
    """

    args: "TrainingArguments"
    accelerator: "Accelerator"
    compute_metrics: Any
    preprocess_logits: Callable[[Any, Any], Any] | None
    gather_function: Callable[[Any], Any]
    prediction_loss_only: bool
    ignore_keys: list[str] | None
    metric_key_prefix: str
    shifts_labels: bool
    main_input_name: str
    keep_all: bool


class _LossSum:
    """Sum and count of the evaluation loss, and how many batches had none that is a number, on the device."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, dtype=ranks.sum_dtype(device), device=device)
        self.any = False

    def add(self, loss: Tensor, items: Tensor | int) -> None:
        items = torch.as_tensor(items, device=self.sums.device, dtype=self.sums.dtype)
        # A batch without items has a 0/0 loss; it must not poison the sum.
        total = torch.where(items > 0, loss.to(self.sums.dtype) * items, torch.zeros_like(items))
        self.sums += torch.stack([total, items, (~torch.isfinite(total)).to(items.dtype)])
        self.any = True

    def mean(self, accelerator: "Accelerator") -> float | None:
        """Returns the mean over all processes. A loss that is not a number is not left out: a warning counts them."""
        total, count, bad = ranks.sum_over_processes(self.sums, accelerator).tolist()
        if bad and accelerator.is_main_process:
            logger.warning(
                "The loss of %d evaluation batches is NaN or infinite, and so is their mean. Look at their labels, or "
                "at overflow in half precision.",
                bad,
            )
        return total / count if count else (float("nan") if self.any else None)


def evaluation_loop(
    hooks: EvalHooks, model: nn.Module, dataloader: Any, settings: EvalSettings, events: Events
) -> EvalLoopOutput:
    """Returns predictions, labels, prefixed metrics and the rows of the dataset, after one pass over `dataloader`."""
    args, accelerator, compute_metrics = settings.args, settings.accelerator, settings.compute_metrics
    require_rounds(dataloader, accelerator)
    model.eval()
    kept, loss_sum = _Kept(settings), _LossSum(args.device)
    sums = RunningSums(compute_metrics) if isinstance(compute_metrics, SumMetrics) else None
    metrics: dict[str, Any] | None = None
    num_rows = 0
    for step, raw in enumerate(dataloader):
        counted = count_rows(raw, step, accelerator, dataloader)
        num_rows += counted.rows
        losses, logits, labels = hooks.prediction_step(
            model, counted.inputs, settings.prediction_loss_only, ignore_keys=settings.ignore_keys
        )
        if losses is not None:
            loss_sum.add(losses.detach().mean(), _weight(counted, settings.shifts_labels))
        if sums is not None and logits is not None and labels is not None and counted.valid:
            prepare = settings.preprocess_logits
            sums.add(prepare(logits, labels) if prepare is not None else logits, labels)
        if sums is None or settings.keep_all:
            batch = kept.gather(hooks, counted.inputs, find_batch_size(raw), losses, logits, labels)
            if args.batch_eval_metrics and sums is None:
                metrics = _batch_metrics(settings, batch) or metrics
            del batch
        # Gone before the next batch is computed, so that two never lie in memory.
        del losses, logits, labels
        events.fire("on_prediction_step")
        if args.eval_accumulation_steps is not None and (step + 1) % args.eval_accumulation_steps == 0:
            kept.offload()

    predictions, label_ids = kept.predictions.arrays(), kept.labels.arrays()
    if sums is not None:
        metrics = sums.result(accelerator)
    elif compute_metrics is not None and not args.batch_eval_metrics and not (predictions is None or label_ids is None):
        metrics = settings.compute_metrics(kept.as_prediction(predictions, label_ids))
    metrics = _prefixed(metrics or {}, loss_sum.mean(accelerator), settings.metric_key_prefix)
    return EvalLoopOutput(
        predictions=predictions, label_ids=label_ids, metrics=metrics, num_samples=_num_samples(dataloader, num_rows)
    )


def _weight(counted: CountedBatch, shifts_labels: bool) -> Tensor | int:
    """Returns the items that a batch's mean loss stands for: its supervised tokens, else its rows."""
    if not counted.valid or not isinstance(counted.inputs, Mapping):
        return counted.valid
    items = count_items([counted.inputs], shifts_labels=shifts_labels)
    return counted.valid if items is None else items


def _batch_metrics(settings: EvalSettings, batch: "_Batch") -> dict[str, Any] | None:
    if settings.compute_metrics is None or batch.logits is None or batch.labels is None:
        return None
    return settings.compute_metrics(
        batch.as_prediction(settings.args.include_for_metrics),
        compute_result=settings.accelerator.gradient_state.end_of_dataloader,
    )


@contextlib.contextmanager
def naming_memory_errors(args: "TrainingArguments") -> Iterator[None]:
    """Context manager: an evaluation that runs out of memory says so: a smaller training batch would not help it."""
    try:
        yield
    except RuntimeError as error:
        if args.auto_find_batch_size:
            from accelerate.utils.memory import should_reduce_batch_size

            if should_reduce_batch_size(error):
                raise RuntimeError(
                    "The evaluation does not fit into memory. `auto_find_batch_size` changes the training batch only: "
                    f"lower `per_device_eval_batch_size` (now {args.per_device_eval_batch_size})."
                ) from error
        raise


@dataclass
class _Batch:
    losses: Any
    logits: Any
    labels: Any
    inputs: Any

    def as_prediction(self, include: list[str]) -> EvalPrediction:
        return EvalPrediction(
            predictions=self.logits,
            label_ids=self.labels,
            losses=self.losses if "loss" in include else None,
            inputs=self.inputs if "inputs" in include else None,
        )


class _Kept:
    """Outputs gathered over processes and kept for `compute_metrics` and `predict`."""

    def __init__(self, settings: EvalSettings) -> None:
        self.settings = settings
        concat = settings.args.eval_do_concat_batches
        self.predictions, self.labels = Collected(concat=concat), Collected(concat=concat)
        self.inputs, self.losses = Collected(concat=concat), Collected(concat=concat)
        self._many = settings.accelerator.num_processes > 1
        self._keeps = settings.keep_all or not settings.args.batch_eval_metrics

    def gather(self, hooks: EvalHooks, inputs: Any, rows: int | None, losses: Any, logits: Any, labels: Any) -> _Batch:
        """Returns the batch as all processes see it, and keeps it unless metrics are computed batch by batch.

        `rows` is the size of the batch before repeated rows were cut off: processes can only gather equal shapes.
        """
        settings, include = self.settings, self.settings.args.include_for_metrics
        rows = rows or 1
        shown, per_row = None, None
        if "inputs" in include:
            prepared = hooks._prepare_inputs(inputs)
            # `compute_metrics(compute_result=...)` gets the whole batch, the ordinary one only the main input.
            shown = prepared
            if not settings.args.batch_eval_metrics:
                shown = self._everywhere(self._even(prepared[settings.main_input_name], rows), self.inputs)
        if "loss" in include and losses is not None:
            per_row = self._everywhere(losses.detach().repeat(rows), self.losses)
        labels = None if labels is None else self._even(labels, rows)
        if logits is not None:
            logits = self._even(logits, rows)
            if settings.preprocess_logits is not None:
                logits = settings.preprocess_logits(logits, labels)
            logits = self._everywhere(logits, self.predictions)
        if labels is not None:
            labels = self._everywhere(labels, self.labels)
        return _Batch(per_row, logits, labels, shown)

    def _even(self, data: Any, rows: int) -> Any:
        """Returns `data` with as many rows and columns as on the other processes."""
        if not self._many:
            return data
        return self.settings.accelerator.pad_across_processes(pad_rows(data, rows), dim=1, pad_index=PADDING)

    def _everywhere(self, data: Any, collected: Collected) -> Any:
        data = self.settings.gather_function(data) if self._many else data
        if self._keeps:
            collected.add(data)
        return data

    def offload(self) -> None:
        for part in (self.predictions, self.labels, self.inputs, self.losses):
            part.offload()

    def as_prediction(self, predictions: Any, label_ids: Any) -> EvalPrediction:
        include = self.settings.args.include_for_metrics
        return EvalPrediction(
            predictions=predictions,
            label_ids=label_ids,
            losses=self.losses.arrays() if "loss" in include else None,
            inputs=self.inputs.arrays() if "inputs" in include else None,
        )


def _num_samples(dataloader: Any, counted: int) -> int:
    """Returns the rows evaluated: the dataset's length where it has one, else what was counted."""
    try:
        return len(dataloader.dataset)
    except (AttributeError, TypeError):
        return counted


def _prefixed(metrics: dict[str, Any], loss: float | None, prefix: str) -> dict[str, Any]:
    """Returns the metrics as plain numbers, each name starting with `prefix_`."""
    if not isinstance(metrics, Mapping):
        raise ArgumentError(f"`compute_metrics` must return a dict of names to numbers, got {type(metrics).__name__}.")
    plain = {} if loss is None else {f"{prefix}_loss": loss}
    plain |= {key: _plain(value) for key, value in metrics.items() if loss is None or key != f"{prefix}_loss"}
    return {key if key.startswith(f"{prefix}_") else f"{prefix}_{key}": value for key, value in plain.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.numel() == 1):
        return value.item()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    return value
