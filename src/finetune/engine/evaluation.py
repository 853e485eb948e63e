"""The evaluation loop shared by `evaluate` and `predict`.

The loss is a sum over items divided by their count, reduced over processes once, at the end: it does not depend on
the batch size, on packing or on the number of processes. Two batches with mean losses 2.0 over 30 tokens and 1.0 over
10 tokens give 1.75, where a mean over batches gives 1.5.

Rows that accelerate repeats to give every process a full last batch are cut off before they are scored.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from finetune.compat import EvalLoopOutput, EvalPrediction
from finetune.control.callbacks import Events
from finetune.engine.gather import Collected, find_batch_size
from finetune.engine.step import count_items
from finetune.errors import ArgumentError
from finetune.hooks import EvalHooks

if TYPE_CHECKING:
    from accelerate import Accelerator

    from finetune.arguments import TrainingArguments


@dataclass(frozen=True)
class EvalSettings:
    """What one evaluation needs beside the model and the data.

    Attributes:
        main_input_name: the batch entry handed to `compute_metrics` as `inputs`.
        keep_all: whether outputs are kept although metrics are computed batch by batch (`predict`).
    """

    args: "TrainingArguments"
    accelerator: "Accelerator"
    compute_metrics: Callable[..., dict[str, Any]] | None
    preprocess_logits: Callable[[Any, Any], Any] | None
    gather_function: Callable[[Any], Any]
    prediction_loss_only: bool
    ignore_keys: list[str] | None
    metric_key_prefix: str
    shifts_labels: bool
    main_input_name: str
    keep_all: bool


class _LossSum:
    """Sum and count of the evaluation loss on the device."""

    def __init__(self, device: torch.device) -> None:
        self.pair = torch.zeros(2, dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
        self.any = False

    def add(self, loss: Tensor, items: Tensor | int) -> None:
        items = torch.as_tensor(items, device=self.pair.device, dtype=self.pair.dtype)
        # A batch without items has a 0/0 loss; it must not poison the sum.
        total = torch.where(items > 0, loss.to(self.pair.dtype) * items, torch.zeros_like(items))
        self.pair += torch.stack([total, items])
        self.any = True

    def mean(self, accelerator: "Accelerator") -> float | None:
        pair = self.pair
        if accelerator.num_processes > 1:
            reduced = accelerator.reduce(pair, reduction="sum")
            assert isinstance(reduced, Tensor)
            pair = reduced
        total, count = pair.tolist()
        return total / count if count else (float("nan") if self.any else None)


def evaluation_loop(
    hooks: EvalHooks, model: nn.Module, dataloader: Any, settings: EvalSettings, events: Events
) -> EvalLoopOutput:
    """Returns predictions, labels, prefixed metrics and the exact number of rows of one pass over `dataloader`."""
    args, accelerator = settings.args, settings.accelerator
    model.eval()
    kept = _Kept(settings)
    loss_sum, metrics, num_rows = _LossSum(args.device), None, 0
    for step, raw in enumerate(dataloader):
        inputs, valid, rows = _drop_repeated_rows(raw, accelerator, dataloader)
        num_rows += rows
        items = count_items([inputs], shifts_labels=settings.shifts_labels) if isinstance(inputs, Mapping) else None
        weight = valid if items is None else torch.where(torch.tensor(valid > 0, device=items.device), items, 0)
        losses, logits, labels = hooks.prediction_step(
            model, inputs, settings.prediction_loss_only, ignore_keys=settings.ignore_keys
        )
        if losses is not None:
            loss_sum.add(losses.detach().mean(), weight)
        batch = kept.gather(hooks, raw, losses, logits, labels)
        events.fire("on_prediction_step")
        if args.batch_eval_metrics:
            if settings.compute_metrics is not None and batch.logits is not None and batch.labels is not None:
                metrics = settings.compute_metrics(
                    batch.as_prediction(args.include_for_metrics),
                    compute_result=accelerator.gradient_state.end_of_dataloader,
                )
        elif args.eval_accumulation_steps is not None and (step + 1) % args.eval_accumulation_steps == 0:
            kept.offload()

    predictions, label_ids = kept.predictions.arrays(), kept.labels.arrays()
    if (
        settings.compute_metrics is not None
        and not args.batch_eval_metrics
        and predictions is not None
        and label_ids is not None
    ):
        metrics = settings.compute_metrics(kept.as_prediction(predictions, label_ids))
    mean_loss = loss_sum.mean(accelerator)
    metrics = _prefixed(metrics or {}, mean_loss, settings.metric_key_prefix)
    return EvalLoopOutput(
        predictions=predictions,
        label_ids=label_ids,
        metrics=metrics,
        num_samples=_num_samples(dataloader, num_rows),
    )


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

    def gather(self, hooks: EvalHooks, inputs: Any, losses: Any, logits: Any, labels: Any) -> _Batch:
        """Returns the batch as all processes see it, and keeps it unless metrics are computed batch by batch."""
        settings, accelerator = self.settings, self.settings.accelerator
        include = settings.args.include_for_metrics
        keep = settings.keep_all or not settings.args.batch_eval_metrics
        many = accelerator.num_processes > 1
        gather = settings.gather_function if many else (lambda data: data)
        pad = (
            (lambda data: accelerator.pad_across_processes(data, dim=1, pad_index=-100))
            if many
            else (lambda data: data)
        )
        rows = find_batch_size(inputs) or 1
        shown, per_row = None, None
        if "inputs" in include:
            prepared = hooks._prepare_inputs(inputs)
            # `compute_metrics(compute_result=...)` gets the whole batch, the ordinary one only the main input.
            shown = prepared if settings.args.batch_eval_metrics else gather(pad(prepared[settings.main_input_name]))
            if keep:
                self.inputs.add(shown)
        if "loss" in include and losses is not None:
            per_row = gather(losses.detach().repeat(rows))
            if keep:
                self.losses.add(per_row)
        labels = None if labels is None else pad(labels)
        if logits is not None:
            logits = pad(logits)
            if settings.preprocess_logits is not None:
                logits = settings.preprocess_logits(logits, labels)
            logits = gather(logits)
            if keep:
                self.predictions.add(logits)
        if labels is not None:
            labels = gather(labels)
            if keep:
                self.labels.add(labels)
        return _Batch(per_row, logits, labels, shown)

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


def _drop_repeated_rows(inputs: Any, accelerator: "Accelerator", dataloader: Any) -> tuple[Any, int, int]:
    """Returns (inputs without repeated rows, this process's row count, the row count over all processes).

    Example: 5 rows, 2 processes, batch 2. The last global batch holds rows [4, 0 | 1, 2] of which one counts:
    process 0 keeps 1 row; process 1 keeps none and scores one row with weight 0, because models cannot run on nothing.
    """
    size = find_batch_size(inputs) or 0
    if accelerator.num_processes == 1:
        return inputs, size, size
    state = accelerator.gradient_state
    total = size * accelerator.num_processes
    if not state.end_of_dataloader or state.remainder <= 0:
        return inputs, size, total
    valid = min(max(state.remainder - accelerator.process_index * size, 0), size)
    if valid == size or not _is_row_batch(inputs, size):
        return inputs, valid, state.remainder
    keep = max(valid, 1)
    return {k: v[:keep] if isinstance(v, Tensor) else v for k, v in inputs.items()}, valid, state.remainder


def _is_row_batch(inputs: Any, size: int) -> bool:
    return isinstance(inputs, Mapping) and all(
        value.ndim > 0 and value.shape[0] == size for value in inputs.values() if isinstance(value, Tensor)
    )


def _num_samples(dataloader: Any, counted: int) -> int:
    """Returns the rows evaluated: the data set's length where it has one, else what was counted."""
    try:
        return len(dataloader.dataset)
    except (AttributeError, TypeError):
        return counted


def _prefixed(metrics: dict[str, Any], loss: float | None, prefix: str) -> dict[str, Any]:
    """Returns the metrics as plain numbers, each name starting with `prefix_`."""
    if not isinstance(metrics, Mapping):
        raise ArgumentError(f"`compute_metrics` must return a dict of names to numbers, got {type(metrics).__name__}.")
    plain = {key: _plain(value) for key, value in metrics.items()}
    if loss is not None:
        plain[f"{prefix}_loss"] = loss
    return {key if key.startswith(f"{prefix}_") else f"{prefix}_{key}": value for key, value in plain.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.numel() == 1):
        return value.item()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    return value
