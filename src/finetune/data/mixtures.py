"""One dataset out of several, with weights, drawn anew in every epoch.

Worked example: sizes 4 and 2, weights 1 and 1, 4 rows per epoch give 2 rows of each. The first set shows rows of a
fixed random order, say 2 0 | 3 1: epoch 0 takes 2 and 0, epoch 1 takes 3 and 1, epoch 2 begins a new random order. So
every row of a set is seen once before any is seen again, whatever the weights.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from finetune.errors import ArgumentError


def mixture_counts(weights: Sequence[float], num_rows: int) -> list[int]:
    """Returns how many of `num_rows` come from each set; they sum to `num_rows` (largest remainders are rounded up).

    >>> mixture_counts([0.5, 0.25, 0.25], 5)
    [3, 1, 1]
    """
    shares = np.asarray(weights, np.float64) / sum(weights) * num_rows
    counts = np.floor(shares).astype(int)
    order = np.argsort(-(shares - counts), kind="stable")
    counts[order[: num_rows - int(counts.sum())]] += 1
    return counts.tolist()


def mix_datasets(
    datasets: Mapping[str, Any] | Sequence[Any],
    weights: Mapping[str, float] | Sequence[float] | None = None,
    *,
    num_rows: int | None = None,
    seed: int = 0,
    epoch: int = 0,
) -> Any:
    """Returns the rows of one epoch of a mixture, shuffled; a pure function of the datasets, `seed` and `epoch`.

    `weights` are shares of rows (any positive scale); None weights by size. `num_rows` defaults to the total size.
    The datasets must be map-style with the same columns, so prepare them first. Rows are selected, not copied.
    Raises `ArgumentError` for weights that do not fit the datasets.
    """
    from datasets import concatenate_datasets

    names = list(datasets) if isinstance(datasets, Mapping) else [str(i) for i in range(len(datasets))]
    parts = [datasets[name] for name in names] if isinstance(datasets, Mapping) else list(datasets)
    sizes = [len(part) for part in parts]
    shares = _weights(weights, names, sizes)
    rows = sum(sizes) if num_rows is None else num_rows
    counts = mixture_counts(shares, rows)
    starts = np.concatenate(([0], np.cumsum(sizes)))
    chosen = [
        starts[i] + _draw(size, epoch * count, count, seed, i)
        for i, (size, count) in enumerate(zip(sizes, counts, strict=True))
        if count
    ]
    indices = np.random.default_rng([seed, epoch, len(parts)]).permutation(np.concatenate(chosen))
    return concatenate_datasets(parts).select(indices)


def _draw(size: int, start: int, count: int, seed: int, part: int) -> np.ndarray:
    """Returns `count` row numbers from position `start` of an endless run of permutations of a set."""
    if size == 0:
        raise ArgumentError(f"Dataset {part} of the mixture is empty. Leave it out, or give it weight 0.")
    first, last = start // size, (start + count - 1) // size
    orders = [np.random.default_rng([seed, part, number]).permutation(size) for number in range(first, last + 1)]
    return np.concatenate(orders)[start - first * size :][:count]


def _weights(weights: Any, names: list[str], sizes: list[int]) -> list[float]:
    if weights is None:
        return [float(size) for size in sizes]
    if isinstance(weights, Mapping):
        if set(weights) != set(names):
            raise ArgumentError(f"The mixture has the datasets {names}, but weights for {sorted(weights)}.")
        weights = [weights[name] for name in names]
    shares = [float(weight) for weight in weights]
    if len(shares) != len(names) or min(shares, default=0) < 0 or sum(shares) <= 0:
        raise ArgumentError(f"The mixture has {len(names)} datasets and the weights {shares}. Give each a share >= 0.")
    return shares
