"""Whether a run keeps its activations or computes them again in the backward pass, when that is unset.

TRL recomputes always, which costs a quarter of a step and is needed only where the activations do not fit. Here a short
forward pass is measured, and they are kept where the largest batch takes a small part of the free memory.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from finetune.data.columns import list_lengths
from finetune.distributed.memory import free_bytes
from finetune.files import format_bytes
from finetune.kernels.attention import backbone_of, in_mode
from finetune.wrappers import unwrap_peft

# Of the memory that is free beside gradients and moments. The rest is for what is not measured: the loss, the
# temporaries of the backward pass, fragments, and other programs.
FREE_SHARE = 0.25
# Gradient and two moments in float32, for each trained parameter.
_TRAINED_BYTES = 12
_PROBED_LENGTHS = (16, 32, 64)


@dataclass(frozen=True)
class Recomputation:
    """The decision, and why, for the header of the run."""

    recomputes: bool
    reason: str

    def __str__(self) -> str:
        return f"{'recomputed' if self.recomputes else 'kept'}: {self.reason}"


def decide(
    model: nn.Module,
    args: Any,
    *,
    num_rows: int,
    longest_row: int | None,
    autocast: AbstractContextManager[Any],
    fsdp_recomputes: bool = False,
) -> Recomputation:
    """Returns whether activations are recomputed: `args.gradient_checkpointing`, or what the memory allows if unset.

    Unset, they are kept where one process trains and micro-batches of `num_rows` rows, all as long as `longest_row`,
    keep at most a quarter of the memory that gradients and moments leave free. Numbers do not depend on it.
    `fsdp_recomputes`: FSDP does it itself.
    """
    if args.gradient_checkpointing is not None:
        return Recomputation(bool(args.gradient_checkpointing), "`gradient_checkpointing` says so")
    if fsdp_recomputes:
        return Recomputation(False, "FSDP recomputes them (`fsdp_config`)")
    if args.world_size > 1 or args.n_gpu > 1 or args.activation_offloading or args.activation_checkpointing_kwargs:
        return Recomputation(True, "the default with several processes, offloading or `gradient_checkpointing_kwargs`")
    if longest_row is None:
        return Recomputation(True, "the length of the longest row is not known")
    try:
        with autocast:
            kept = kept_bytes(model)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        return Recomputation(True, f"what they take could not be measured ({type(error).__name__}: {error})")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    free = free_bytes(torch.device(args.device)) - _TRAINED_BYTES * trained
    needed = kept(num_rows, longest_row)
    text = f"at most {format_bytes(needed)} of {format_bytes(max(0, free))} free"
    return Recomputation(needed > FREE_SHARE * free, text)


def longest_row(dataset: Any, max_length: int | None) -> int | None:
    """Returns the tokens of the longest prepared row; `max_length` for a stream."""
    try:
        return int(list_lengths(dataset, "input_ids").max())
    except (AttributeError, KeyError, TypeError, ValueError):
        return max_length


def kept_bytes(model: nn.Module) -> Callable[[int, int], int]:
    """Returns `(rows, length) -> bytes` that autograd keeps of a forward pass of the backbone, weights not counted.

    Three short passes are measured, and the parabola through them is followed: attention that keeps its scores grows
    with the square. Random generators and the model are left as they were.

    Example: a pass that keeps 1 MiB whatever the length (weights cast to bfloat16) and 10 KiB a token gives
    `kept(8, 1024)` = 1 MiB + 8 x 10 MiB = 81 MiB.
    """
    sizes = [_kept_by_one_pass(model, length) for length in _PROBED_LENGTHS]
    square, linear, constant = (max(0.0, float(c)) for c in np.polyfit(_PROBED_LENGTHS, sizes, 2))
    return lambda rows, length: int(constant + rows * (linear * length + square * length**2))


def _kept_by_one_pass(model: nn.Module, length: int) -> int:
    backbone = backbone_of(unwrap_peft(model))
    device = backbone.get_input_embeddings().weight.device
    weights = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    devices = [device] if device.type == "cuda" else []
    with (
        in_mode(model, training=True),
        torch.random.fork_rng(devices),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
    ):
        ids = torch.ones((1, length), dtype=torch.long, device=device)
        output = backbone(input_ids=ids, use_cache=False)
    del output
    return sum(kept.values())
