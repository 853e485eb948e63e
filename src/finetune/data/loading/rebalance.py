"""Micro-batches of equal cost instead of equal size (`train_sampling_strategy="batch_rebalance"`)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from finetune.data.loading.randomness import FetchRandomness
from finetune.data.loading.samplers import permutation
from finetune.errors import ArgumentError

Cost = Callable[[int, float], float]


class BatchRebalanceSampler(Sampler[list[int]]):
    """Micro-batches of unequal size but nearly equal cost, for rank `rank` of `dp_size`.

    Each optimizer step takes the next `effective_batch_size` rows of the random order (`seed + epoch`), sorts them
    from long to short and cuts them into `dp_size * grad_accum` runs of similar cost, `n * L + 0.001 * n * L²` for
    `n` rows padded to `L` tokens. The costliest `dp_size` runs are everybody's first micro-batch, and so on.
    Every rank computes the same cuts; nothing is communicated. Same micro-batches as transformers'
    `BatchRebalanceSampler`. A short last step is dropped (`drop_last`) or yields what is left, each rank at least
    one row per micro-batch, repeated from the start of the epoch if need be.
    """

    quadratic_cost = 0.001

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        effective_batch_size: int,
        dp_size: int,
        grad_accum: int,
        shuffle: bool = True,
        seed: int = 42,
        rank: int = 0,
        drop_last: bool = True,
    ) -> None:
        self.num_groups = dp_size * grad_accum
        if dp_size < 1 or grad_accum < 1 or effective_batch_size < self.num_groups:
            raise ArgumentError(
                f"`train_sampling_strategy='batch_rebalance'` needs at least one row per micro-batch: "
                f"{effective_batch_size} rows per step for {dp_size} processes and {grad_accum} accumulation steps."
            )
        self.lengths = np.asarray(lengths)
        self.effective_batch_size = effective_batch_size
        self.dp_size, self.grad_accum, self.rank = dp_size, grad_accum, rank
        self.shuffle, self.seed, self.drop_last = shuffle, seed, drop_last
        self.epoch, self.start = 0, 0
        self.fetches: FetchRandomness | None = None  # told before each fetch when it is there

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order the next iteration follows; called by the loader."""
        self.epoch = epoch

    def order(self) -> np.ndarray:
        """Returns the row indices of the epoch before they are cut into micro-batches, (rows,) int64."""
        num_rows = len(self.lengths)
        return permutation(num_rows, self.seed + self.epoch) if self.shuffle else np.arange(num_rows)

    def skip(self, num_batches: int) -> BatchRebalanceSampler:
        """Returns a sampler of the same epoch that starts `num_batches` micro-batches further on."""
        other = copy.copy(self)
        other.start = self.start + num_batches
        return other

    @property
    def num_steps(self) -> int:
        """Optimizer steps per epoch."""
        whole, rest = divmod(len(self.lengths), self.effective_batch_size)
        return whole + (1 if rest and not self.drop_last else 0)

    def __len__(self) -> int:
        return max(0, self.num_steps * self.grad_accum - self.start)

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order()
        first_step, first_slot = divmod(self.start, self.grad_accum)
        if self.fetches is not None:
            self.fetches.start_epoch()
        for step in range(first_step, self.num_steps):
            rows = order[step * self.effective_batch_size : (step + 1) * self.effective_batch_size]
            if len(rows) < self.num_groups:
                rows = np.concatenate([rows, np.resize(order, self.num_groups - len(rows))])
            groups = self._groups(rows)
            for slot in range(first_slot, self.grad_accum):
                if self.fetches is not None:
                    self.fetches.before_fetch(step * self.grad_accum + slot)
                yield groups[slot * self.dp_size + self.rank].tolist()
            first_slot = 0

    def _groups(self, rows: np.ndarray) -> list[np.ndarray]:
        """Returns the rows of one step in `num_groups` arrays, costliest first."""
        rows = rows[np.argsort(-self.lengths[rows], kind="stable")]
        lengths = [float(length) for length in self.lengths[rows]]
        counts = _balance(lengths, self.num_groups, self.dp_size, self.effective_batch_size, self._cost)
        costs = _group_costs(lengths, counts, self._cost)
        cuts = np.cumsum(counts)[:-1]
        groups = np.split(rows, cuts)
        return [groups[i] for i in sorted(range(self.num_groups), key=lambda i: -costs[i])]

    def _cost(self, num_rows: int, longest: float) -> float:
        return num_rows * longest + self.quadratic_cost * num_rows * longest * longest


def _group_costs(lengths: list[float], counts: list[int], cost: Cost) -> list[float]:
    """Returns the cost of each run of `counts` rows; lengths descend, so a run's longest row is its first."""
    costs, first = [], 0
    for count in counts:
        costs.append(cost(count, lengths[first]))
        first += count
    return costs


def _balance(lengths: list[float], num_groups: int, dp_size: int, batch_size: int, cost: Cost) -> list[int]:
    """Returns how many rows each of the `num_groups` runs takes.

    Hill climbing: the costliest run gives one row to the cheapest, until a state comes back; the state with the
    smallest spread wins. A run down to one row can give no more, so its slot (the `dp_size` runs that would be
    worked on at the same time) is filled up to that run's cost and left alone from then on.
    """
    base, more = divmod(len(lengths), num_groups)
    counts = [base + (1 if i < more else 0) for i in range(num_groups)]
    frozen: set[int] = set()
    seen: set[tuple[int, ...]] = set()
    best, best_spread = list(counts), float("inf")
    for _ in range(max(num_groups * 30, batch_size)):
        if tuple(counts) in seen:
            break
        seen.add(tuple(counts))
        costs = _group_costs(lengths, counts, cost)
        active = [i for i in range(num_groups) if i not in frozen]
        if len(active) <= 1:
            break
        high, low = max(active, key=costs.__getitem__), min(active, key=costs.__getitem__)
        if costs[high] - costs[low] < best_spread:
            best, best_spread = list(counts), costs[high] - costs[low]
        if costs[high] == costs[low]:
            break
        if counts[high] > 1:
            counts[high] -= 1
            counts[low] += 1
        else:
            ranking = sorted(range(num_groups), key=lambda i: -costs[i])
            slot_start = ranking.index(high) // dp_size * dp_size
            slot = set(ranking[slot_start : slot_start + dp_size])
            _fill_slot(lengths, counts, slot, high, frozen, costs[high], cost)
            frozen |= slot
    return best


def _fill_slot(
    lengths: list[float], counts: list[int], slot: set[int], high: int, frozen: set[int], limit: float, cost: Cost
) -> None:
    """Moves rows in place from the cheapest outside runs into the slot's runs while these stay below `limit`."""
    for group in slot - frozen - {high}:
        while cost(counts[group] + 1, lengths[sum(counts[:group])]) <= limit:
            costs = _group_costs(lengths, counts, cost)
            donors = [i for i in range(len(counts)) if i not in frozen and i not in slot and counts[i] > 1]
            if not donors:
                break
            counts[min(donors, key=costs.__getitem__)] -= 1
            counts[group] += 1
