"""The loss contract: what a batch's loss is divided by, and by whom.

A loss is a sum over items (tokens or rows) and a count of items. The gradient of one optimizer step is the gradient
of `sum over the global batch / count over the global batch`, whatever the number of micro-batches and processes:

    2 processes x 2 micro-batches with 10, 30, 20, 40 supervised tokens: `num_items_in_batch` = 100 everywhere.
    Each micro-batch's loss is its own sum / 100, times 2 because gradients are averaged over the 2 processes.

`scale_loss` is the only place that divides by accumulation, `undo_process_average` the only one that multiplies by
processes.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from finetune.data.rows import IGNORE_INDEX
from finetune.distributed.accelerator import zero_stage
from finetune.engine.divisor import LossDivisor, at_least_one
from finetune.errors import ArgumentError
from finetune.models.adapters import unwrap
from finetune.wrappers import clips_its_own_gradients, unwrap_optimizer

if TYPE_CHECKING:
    from accelerate import Accelerator


def move(
    data: Any,
    device: torch.device,
    float_dtype: torch.dtype | None = None,
    *,
    each: Callable[[Any], Any] | None = None,
) -> Any:
    """Returns `data` with every tensor on `device`; floating tensors also in `float_dtype` when given (DeepSpeed).

    `each` is applied to the parts of nested data; this function itself by default.
    """
    if isinstance(data, Tensor):
        if float_dtype is not None and (data.is_floating_point() or data.is_complex()):
            return data.to(device=device, dtype=float_dtype)
        return data.to(device=device)
    if each is None:
        each = partial(move, device=device, float_dtype=float_dtype)
    if isinstance(data, Mapping):
        return type(data)({key: each(value) for key, value in data.items()})  # pyright: ignore
    if isinstance(data, tuple | list):
        return type(data)(each(value) for value in data)
    return data


def input_dtype(accelerator: "Accelerator") -> torch.dtype | None:
    """Returns the dtype DeepSpeed wants float inputs in (it does not autocast); None for every other run."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return None if plugin is None else plugin.hf_ds_config.dtype()


def count_items(batches: list[Any], *, shifts_labels: bool) -> Tensor | None:
    """Returns the number of supervised items of some batches, as a 0-d int64 tensor on their device.

    A causal model predicts label i+1 at position i, so with `shifts_labels` the first label of a row is not a target:
    labels [[5, 6, -100], [-100, 7, 8]] count 3, not 4. A collator that provides `shift_labels` is taken at its word.
    None when the batches hold no countable `labels`.
    """
    if not batches or "labels" not in batches[0]:
        return None
    counts: list[Tensor] = []
    for batch in batches:
        labels = batch.get("shift_labels")
        if labels is None:
            labels = batch["labels"]
            if not isinstance(labels, Tensor):
                return None
            labels = labels[..., 1:] if shifts_labels else labels
        counts.append(labels.ne(IGNORE_INDEX).sum())
    return torch.stack(counts).sum() if len(counts) > 1 else counts[0]


def forward_loss(
    model: nn.Module,
    inputs: dict[str, Any],
    *,
    num_items_in_batch: Any = None,
    accepts_loss_kwargs: bool,
    divisor: LossDivisor | None = None,
    shifts_labels: bool = False,
    compute_loss_func: Callable[..., Any] | None = None,
    label_smoother: Callable[..., Tensor] | None = None,
) -> tuple[Tensor, Any]:
    """Returns the loss of one micro-batch and the model's outputs.

    With `num_items_in_batch` the loss is this micro-batch's share of the global mean: sum / `num_items_in_batch`,
    whoever divides: `compute_loss_func(outputs, labels, num_items_in_batch=...)`, the model, or `divisor` for a model
    that averages. Without, it is the mean over the micro-batch. A micro-batch whose labels are all ignored has the loss
    0 and no gradient, where its mean would be 0/0.

    Raises:
        ArgumentError: the model returned no loss.
    """
    inputs = dict(inputs)
    labels = None
    if compute_loss_func is not None or label_smoother is not None:
        labels = inputs.pop("labels", None)
    passed = None
    if accepts_loss_kwargs and num_items_in_batch is not None:
        passed = num_items_in_batch
        if divisor is not None:
            passed = divisor.probe(
                num_items_in_batch, lambda count: _loss_of(model(**inputs, num_items_in_batch=count), inputs)
            )
        inputs["num_items_in_batch"] = passed
    outputs = model(**inputs)
    if compute_loss_func is not None:
        if "num_items_in_batch" in _parameters(compute_loss_func):
            return compute_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch), outputs
        loss = compute_loss_func(outputs, labels)
        local = count_items([{**inputs, "labels": labels}], shifts_labels=shifts_labels)
        if local is not None:
            # A function that is not told the count returns a mean.
            share = loss if num_items_in_batch is None else loss * (local / num_items_in_batch)
            loss = _zero_of_no_items(share, local)
        return loss, outputs
    if label_smoother is not None and labels is not None:
        return label_smoother(outputs, labels, num_items_in_batch=num_items_in_batch), outputs
    loss = _loss_of(outputs, inputs)
    if passed is None:
        local = count_items([inputs], shifts_labels=shifts_labels)
        loss = loss if local is None else _zero_of_no_items(loss, local)
    elif divisor is not None:
        loss = divisor.correct(
            loss, passed, num_items_in_batch, lambda: count_items([inputs], shifts_labels=shifts_labels)
        )
    return loss, outputs


def _zero_of_no_items(loss: Tensor, num_items: Tensor) -> Tensor:
    return torch.where(loss.isnan() & (num_items == 0).to(loss.device), 0.0, loss)


def _loss_of(outputs: Any, inputs: dict[str, Any]) -> Tensor:
    if not isinstance(outputs, Mapping):
        return outputs[0]
    if outputs.get("loss") is None:
        raise ArgumentError(
            f"The model returned no loss, only {sorted(outputs)}, for a batch with the columns {sorted(inputs)}. "
            "Give the rows a `labels` column, or pass `compute_loss_func`."
        )
    return outputs["loss"]


def scale_loss(
    loss: Tensor,
    *,
    already_scaled: bool,
    accumulation: int,
) -> Tensor:
    """Returns the loss whose gradients, summed over a window of `accumulation` micro-batches, are the step's.

    A loss that was divided by the window's token count (`already_scaled`) is left alone; a per-batch mean is divided
    by the number of micro-batches.
    """
    return loss if already_scaled else loss / accumulation


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | set[str]:
    """Returns the names `function` can be called with; a `**kwargs` function takes every one."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return {"num_items_in_batch", *parameters}
    return parameters


@functools.lru_cache(maxsize=64)  # asked twice a step, and a signature takes 0.1 ms
def accepts_num_items(compute_loss: Callable[..., Any]) -> bool:
    """Returns whether a (possibly overridden) `compute_loss` takes `num_items_in_batch`: older subclasses do not."""
    return "num_items_in_batch" in _parameters(compute_loss)


class LabelSmoother:
    """Returns `(1 - epsilon) * nll + epsilon * mean over the vocabulary of -log p`, as Szegedy et al. (2015).

    Agrees with transformers' `LabelSmoother`: averaged over the supervised positions, or divided by
    `num_items_in_batch` when given. `shift_labels` aligns position i with label i + 1 for causal models.
    """

    def __init__(self, epsilon: float, *, shift_labels: bool) -> None:
        self.epsilon = epsilon
        self.shift_labels = shift_labels

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        if self.shift_labels:
            logits, labels = logits[..., :-1, :], labels[..., 1:]
        log_probs = -nn.functional.log_softmax(logits.float(), dim=-1)
        kept = labels.ne(IGNORE_INDEX)
        targets = labels.clamp(min=0).unsqueeze(-1)
        nll = log_probs.gather(-1, targets).squeeze(-1).masked_fill(~kept, 0.0)
        smooth = log_probs.mean(dim=-1).masked_fill(~kept, 0.0)
        count = num_items_in_batch if num_items_in_batch is not None else at_least_one(kept.sum())
        return ((1 - self.epsilon) * nll.sum() + self.epsilon * smooth.sum()) / count


def enter_train_mode(model: nn.Module, optimizer: Any) -> None:
    """Puts the model in training mode, and a schedule-free optimizer too (it keeps two sets of weights).

    The optimizer is asked each time, because a new one is in no mode while a new model is in training mode.
    """
    # A wrapper (DDP, DeepSpeed, PEFT) is born in training mode around a model that was loaded in evaluation mode.
    if not (model.training and unwrap(model).training):
        model.train()
    if callable(train := getattr(optimizer, "train", None)):
        train()


def enter_eval_mode(optimizer: Any) -> None:
    """Switches a schedule-free optimizer to its averaged weights; `enter_train_mode` switches back."""
    if callable(evaluate := getattr(optimizer, "eval", None)):
        evaluate()


def undo_process_average(loss: Tensor, num_processes: int) -> Tensor:
    """Returns the loss times the number of processes: data parallelism averages gradients, the contract sums them.

    Unchanged in evaluation, where nothing is averaged.
    """
    return loss * num_processes if num_processes > 1 and torch.is_grad_enabled() else loss


def clip_gradients(accelerator: "Accelerator", model: nn.Module, optimizer: Any, max_norm: float) -> Any:
    """Scales the gradients to a global norm of at most `max_norm` and returns the norm before, on the device.

    An optimizer that owns its gradients (layerwise GaLore keeps projections) clips them itself.
    """
    if clips_its_own_gradients(optimizer):
        return unwrap_optimizer(optimizer).clip_grad_norm(max_norm)
    if accelerator.distributed_type == "NO":
        # accelerate would look at every gradient first for one that is divided over processes.
        accelerator.unscale_gradients()
        return nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return accelerator.clip_grad_norm_(model.parameters(), max_norm)


def backward_kwargs(optim: str, accelerator: "Accelerator", learning_rate: Callable[[], float]) -> dict[str, Any]:
    """Returns what `accelerator.backward` needs beside the loss.

    LOMO updates inside backward and needs the learning rate; DeepSpeed must not divide by the accumulation again.
    """
    extra: dict[str, Any] = {}
    if optim in ("lomo", "adalomo"):
        extra["learning_rate"] = learning_rate()
    if zero_stage(accelerator) is not None:
        extra["scale_wrt_gas"] = False
    return extra


def empty_cache(every: int | None, global_step: int) -> None:
    """Returns cached device memory to the driver at every `torch_empty_cache_steps`-th step."""
    if every is not None and global_step % every == 0:
        from accelerate.utils.memory import clear_device_cache

        clear_device_cache()
