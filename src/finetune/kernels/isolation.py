"""A proof, by experiment, that samples of a packed row do not see each other in one model as it is set up."""

from __future__ import annotations

import itertools
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
    """What a probe found, relative to the largest hidden state: `limit` and `packed_limit` are what rounding explains.

    `influence` is the largest change of a hidden state outside the changed sample. `position_error` is how far a sample
    alone moves when it is given positions from 0 on, as rows give them; `packed_error` is how far `sample_apart` is in
    a row from what it is alone. `isolated` holds if all three are within their limits.
    """

    isolated: bool
    influence: float
    limit: float
    sample_changed: int
    sample_moved: int
    position_error: float
    packed_error: float
    packed_limit: float
    sample_apart: int


def probe_isolation(model: nn.Module, *, lengths: Sequence[int] = (7, 5, 9), seed: int = 0) -> Isolation:
    """Returns whether samples of a packed row are what they are alone, and stay it when another sample is changed.

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
    batch: dict[str, Any] = dict(_packed_arguments(lengths, ends))
    batch.update(max_length_q=max(lengths), max_length_k=max(lengths))
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
        alone = _compare_with_alone(backbone, ids, ends, before, float(scale))
    near = 1e-3 if limit < 1e-3 else 5e-2  # other shapes run in other kernels, so rounding explains more
    # A comparison with NaN does not hold, so it is no proof.
    isolated = worst <= limit and alone.position_error <= limit and alone.packed_error <= near
    return Isolation(isolated, worst, limit, *pair, alone.position_error, alone.packed_error, near, alone.sample)


def require_isolation(model: nn.Module) -> Isolation:
    """Returns the probe's finding, or raises `ArgumentError` naming the alternatives if samples see each other."""
    found, name = probe_isolation(model), type(unwrap_peft(model)).__name__
    if not found.position_error <= found.limit:
        raise ArgumentError(
            f"{name} does not count positions from 0: told to, it moved its hidden states by "
            f"{found.position_error:.1e} of their size (rounding explains {found.limit:.0e}), and packed rows give "
            f"each sample positions from 0 on. {REMEDY}"
        )
    if not found.influence <= found.limit:
        raise ArgumentError(
            f"in a packed row of {name}, changing sample {found.sample_changed} moved the "
            f"hidden states of sample {found.sample_moved} by {found.influence:.1e} of their size (rounding explains "
            f"{found.limit:.0e}): samples would be trained on each other's text. {REMEDY}"
        )
    if not found.isolated:
        raise ArgumentError(
            f"in a packed row of {name}, the hidden states of sample {found.sample_apart} are {found.packed_error:.1e} "
            f"of their size away from those of the sample alone (rounding explains {found.packed_limit:.0e}). {REMEDY}"
        )
    return found


@dataclass(frozen=True)
class _Alone:
    position_error: float
    packed_error: float
    sample: int


def _compare_with_alone(backbone: nn.Module, ids: Tensor, ends: Tensor, packed: Tensor, scale: float) -> _Alone:
    """Runs each sample alone, as a padded batch would, and returns the largest errors. `packed` (1, N, H)."""
    found: list[tuple[float, float]] = []
    for start, stop in itertools.pairwise(ends.tolist()):
        tokens = ids[:, start:stop]
        alone = _states(backbone, tokens, {}).to(packed.device)
        placed = _states(backbone, tokens, {"position_ids": torch.arange(stop - start)[None]}).to(packed.device)
        moved = (placed - alone).abs().max()
        # The median of the tokens: rounding alone can send one of them to other experts.
        apart = (packed[:, start:stop] - alone).abs().amax(-1)[0].float().median()
        found.append((float(moved) / scale, float(apart) / scale))
    sample = max(range(len(found)), key=lambda each: found[each][1])
    return _Alone(max(moved for moved, _ in found), found[sample][1], sample)


def _packed_arguments(lengths: Sequence[int], ends: Tensor) -> dict[str, Tensor]:
    return {
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": ends.int(),
        "cu_seq_lens_k": ends.int(),
        "seq_idx": torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].int(),
    }


def _states(backbone: Any, ids: Tensor, batch: dict[str, Any]) -> Tensor:
    device = backbone.get_input_embeddings().weight.device
    given = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    try:
        outputs = backbone(input_ids=ids.to(device), **given, use_cache=False)
    except TypeError as error:
        raise ArgumentError(
            f"{type(backbone).__name__} does not take a padding-free batch: {error}. {REMEDY}"
        ) from error
    return outputs.last_hidden_state
