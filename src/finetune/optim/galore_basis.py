"""The subspace a gradient is projected onto: which side, how it is found, and how to go there and back.

Legend: G (m, n) gradient of one weight, r rank, l = r + oversampling. A left basis Q is (m, r) with orthonormal
columns and projects to Q^T G (r, n); a right basis P is (r, n) with orthonormal rows and projects to G P^T (m, r);
"full" uses both and projects to (r, r). Orientation and side agree with `galore_torch`'s `GaLoreProjector`.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Side = Literal["left", "right", "full"]
PROJECTION_TYPES = ("std", "reverse_std", "left", "right", "full")
OVERSAMPLING = 16


class Basis(NamedTuple):
    """Tensors of one basis: `left` (m, r) or None, `right` (r, n) or None; "full" has both."""

    left: Tensor | None
    right: Tensor | None


def side_of(shape: torch.Size, proj_type: str) -> Side:
    """Returns the side that `proj_type` means for a gradient of this shape.

    "std" takes the shorter dimension, so the basis is small and the projection keeps the longer one.
    """
    tall = shape[0] >= shape[1]
    if proj_type == "std":
        return "right" if tall else "left"
    if proj_type == "reverse_std":
        return "left" if tall else "right"
    return proj_type  # pyright: ignore[reportReturnType]


def project(gradient: Tensor, basis: Basis) -> Tensor:
    """Returns the projection of G: (r, n), (m, r) or (r, r)."""
    low = gradient
    if basis.left is not None:
        low = basis.left.t() @ low
    if basis.right is not None:
        low = low @ basis.right.t()
    return low


def project_back(low: Tensor, basis: Basis) -> Tensor:
    """Returns the (m, n) matrix whose projection is `low`."""
    full = low
    if basis.left is not None:
        full = basis.left @ full
    if basis.right is not None:
        full = full @ basis.right
    return full


def coordinate_basis(gradient: Tensor, rank: int, side: Side) -> Basis:
    """Returns the basis of the first coordinates, for a gradient with NaN or infinite values, which has no best one."""
    rows, columns = gradient.shape
    rank = min(rank, rows, columns)
    options = {"dtype": gradient.dtype, "device": gradient.device}
    return Basis(
        None if side == "right" else torch.eye(rows, rank, **options),
        None if side == "left" else torch.eye(rank, columns, **options),
    )


def exact_basis(gradient: Tensor, rank: int, side: Side) -> tuple[Basis, Tensor]:
    """Returns the leading singular vectors of G and the share of its energy they hold (a 0-d tensor).

    Uses one full SVD in float32, as `galore_torch` does, so the two take the same basis, signs included.
    """
    matrix = gradient.float()
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    energy = _share(values[:rank].square().sum(), values.square().sum())
    basis = Basis(
        None if side == "right" else left[:, :rank].to(gradient.dtype).contiguous(),
        None if side == "left" else right[:rank].to(gradient.dtype).contiguous(),
    )
    return basis, energy


Reduce = Callable[[Tensor], Tensor]


def _identity(product: Tensor) -> Tensor:
    return product


def randomized_basis(
    gradient: Tensor,
    rank: int,
    side: Side,
    *,
    previous: Basis | None,
    generator: torch.Generator,
    reduce: Reduce = _identity,
) -> tuple[Basis, Tensor]:
    """Returns approximate leading singular vectors of G and the share of its energy they hold (a 0-d tensor).

    A subspace iteration of products and QR, started from `previous` padded with random directions, or from random
    directions alone. `reduce` is applied to every product with G; an average over data-parallel ranks there gives the
    basis of the averaged gradient, because the products are linear in G (the energy is then relative to the mean of
    the ranks' energies). Source: Halko, Martinsson and Tropp, "Finding structure with randomness", 2011, section 4.5.
    """
    matrix = gradient.float()
    left = right = energy = None
    if side != "right":
        old = None if previous is None else previous.left
        left, energy = _leading(matrix, rank, old, generator, reduce)
    if side != "left":
        old = None if previous is None or previous.right is None else previous.right.t()
        right, energy = _leading(matrix.t(), rank, old, generator, reduce)
    assert energy is not None
    return Basis(
        None if left is None else left.to(gradient.dtype).contiguous(),
        None if right is None else right.t().to(gradient.dtype).contiguous(),
    ), energy


def _leading(
    matrix: Tensor, rank: int, previous: Tensor | None, generator: torch.Generator, reduce: Reduce
) -> tuple[Tensor, Tensor]:
    """Returns the leading left singular vectors (m, r) of `matrix` (m, n) and their share of its energy."""
    rows, columns = matrix.shape
    width = min(rows, columns, rank + OVERSAMPLING)
    if previous is None:
        trial = torch.randn(rows, width, generator=generator, device=matrix.device)
    else:
        known = previous[:, :width].float()
        noise = torch.randn(rows, width - known.shape[1], generator=generator, device=matrix.device)
        trial = torch.cat([known, noise / rows**0.5], dim=1)
    # Measured on real gradients (see bench_galore_refresh.py): with one pass fewer, some layers of a language model
    # stay below 0.99 of the optimal energy even from the basis of the batch before.
    for _ in range(3 if previous is None else 2):
        trial = reduce(matrix @ reduce(matrix.t() @ trial))
        trial = torch.linalg.qr(trial).Q  # (m, l)
    small = reduce(trial.t() @ matrix)  # (l, n)
    energies, rotation = torch.linalg.eigh(small @ small.t())  # ascending
    found = _with_settled_signs(trial @ rotation.flip(1)[:, :rank], previous)
    total = reduce(matrix.square().sum())
    return found, _share(energies.flip(0)[:rank].sum(), total)


def _share(part: Tensor, total: Tensor) -> Tensor:
    """Returns `part / total`, and 0 for a gradient of zeros."""
    return part / total.clamp_min(torch.finfo(total.dtype).tiny)


def _with_settled_signs(found: Tensor, previous: Tensor | None) -> Tensor:
    """Returns the columns with the signs that continue `previous`, or else with their largest entry positive.

    An eigenvector has no sign of its own. Without this the last bit of a gradient could reverse a direction, and with
    it the meaning of the moments that are kept over a refresh.
    """
    if previous is not None and previous.shape == found.shape:
        agreement = (found * previous.float()).sum(dim=0)
    else:
        agreement = found.gather(0, found.abs().argmax(dim=0, keepdim=True)).squeeze(0)
    return torch.where(agreement < 0, -found, found)
