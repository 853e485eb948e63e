"""A proof, by experiment, that samples of a packed row do not see each other in one model as it is set up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import ArgumentError
from finetune.kernels.attention import backbone_of, in_mode
from finetune.kernels.packed_scores import REMEDY
from finetune.wrappers import unwrap_peft


@dataclass(frozen=True)
class Isolation:
    """What a probe found: `influence` is the largest change of a hidden state outside the changed sample.

    It is relative to the largest hidden state; `limit` is what rounding can explain.
    """

    isolated: bool
    influence: float
    limit: float
    sample_changed: int
    sample_moved: int


def probe_isolation(model: nn.Module, *, lengths: Sequence[int] = (7, 5, 9), seed: int = 0) -> Isolation:
    """Changes one sample of a packed row after the other and returns whether anything moved in the others.

    Runs the backbone without gradient, in evaluation mode, on random tokens exactly as a padding-free batch would be,
    with whatever attention is set. Use it on the model as it will be trained.

    Raises:
        ArgumentError: the model does not take such a batch, or does not react to its own tokens (no proof either way).
    """
    backbone = backbone_of(unwrap_peft(model))
    table = backbone.get_input_embeddings().weight
    tokens = getattr(table, "ds_shape", table.shape)[0]  # ZeRO-3 leaves no row between two uses
    make = torch.Generator().manual_seed(seed)
    total, ends = sum(lengths), torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.randint(0, tokens, (1, total), generator=make)
    other = (ids + torch.randint(1, tokens, (1, total), generator=make)) % tokens
    batch = {name: value.to(table.device) for name, value in _packed_arguments(lengths, ends).items()}
    batch.update(max_length_q=max(lengths), max_length_k=max(lengths))  # pyright: ignore
    with in_mode(model, training=False), torch.no_grad():
        before = _states(backbone, ids, batch)
        limit = 1e-4 if before.dtype in (torch.float32, torch.float64) else 2e-2
        scale = before.abs().max()
        worst, pair = 0.0, (0, 0)
        for changed in range(len(lengths)):
            inside = slice(int(ends[changed]), int(ends[changed + 1]))
            mixed = ids.clone()
            mixed[:, inside] = other[:, inside]
            moved = (_states(backbone, mixed, batch) - before).abs().amax(-1)[0] / scale  # (N,)
            if not bool(moved[inside].max() > limit):
                raise ArgumentError(
                    f"{type(backbone).__name__} gives the same hidden states for other tokens, so nothing can be "
                    f"proven about packed rows (are its weights loaded?). {REMEDY}"
                )
            moved[inside] = 0.0
            if float(moved.max()) >= worst:
                worst = float(moved.max())
                pair = (changed, int(torch.searchsorted(ends, moved.argmax().cpu(), right=True)) - 1)
    return Isolation(math.isfinite(worst) and worst <= limit, worst, limit, *pair)


def require_isolation(model: nn.Module) -> Isolation:
    """Returns the probe's finding, or raises `ArgumentError` naming the alternatives if samples see each other."""
    found = probe_isolation(model)
    if not found.isolated:
        raise ArgumentError(
            f"in a packed row of {type(unwrap_peft(model)).__name__}, changing sample {found.sample_changed} moved the "
            f"hidden states of sample {found.sample_moved} by {found.influence:.1e} of their size (rounding explains "
            f"{found.limit:.0e}): samples would be trained on each other's text. {REMEDY}"
        )
    return found


def _packed_arguments(lengths: Sequence[int], ends: Tensor) -> dict[str, Tensor]:
    return {
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": ends.int(),
        "cu_seq_lens_k": ends.int(),
        "seq_idx": torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].int(),
    }


def _states(backbone: nn.Module, ids: Tensor, batch: dict[str, Any]) -> Tensor:
    device = batch["position_ids"].device
    try:
        outputs = backbone(input_ids=ids.to(device), **batch, use_cache=False)
    except TypeError as error:
        raise ArgumentError(
            f"{type(backbone).__name__} does not take a padding-free batch: {error}. {REMEDY}"
        ) from error
    return outputs.last_hidden_state
