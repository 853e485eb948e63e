"""The batches of a stream as each worker makes them, with the stream's state after every one (see `streaming.py`)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from finetune.data.loading.randomness import FetchRandomness
from finetune.data.loading.stream_source import explained_rows


@dataclass
class Packet:
    """What travels from a worker: one batch of this process and the stream's state after it."""

    batch: Any
    state: Any
    num_rows: int  # rows of all processes in this batch, before any was repeated to fill it up
    filled_up: bool = False
    done: bool = False
    skipped: bool = False

    def pin_memory(self) -> Packet:
        """Called by the pinning thread of `DataLoader`, which does not look into classes it does not know."""
        from torch.utils.data._utils.pin_memory import pin_memory

        self.batch = pin_memory(self.batch)
        return self


class Batches(IterableDataset):
    """The packets of one worker. `start[w]` tells worker `w` where to begin, once."""

    def __init__(
        self,
        rows: Any,
        collate: Callable[[list[Any]], Any],
        batch_size: int,
        rank: int,
        world_size: int,
        drop_last: bool,
    ) -> None:
        self.rows, self.collate = rows, collate
        self.batch_size, self.rank, self.world_size, self.drop_last = batch_size, rank, world_size, drop_last
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by workers that are already running
        self.start: list[dict[str, Any]] | None = None
        self.fetches: FetchRandomness | None = None
        self.first_number = 0
        self.num_skipped_workers = 0  # workers below this number had their turn in the interrupted round

    def __iter__(self) -> Iterator[Packet]:
        info = get_worker_info()
        worker = info.id if info is not None else 0
        start, self.start = self.start[worker] if self.start else None, None
        behind, self.num_skipped_workers = worker < self.num_skipped_workers, 0
        self.set_epoch(int(self.epoch))
        if behind:
            yield Packet(None, None, 0, skipped=True)
        yield from self._packets(start)
        while True:
            yield Packet(None, None, 0, done=True)

    def _packets(self, start: dict[str, Any] | None) -> Iterator[Packet]:
        num_replayed = 0
        if start is not None and start["dataset"] is not None:
            self.rows.load_state_dict(start["dataset"])
        elif start is not None:
            num_replayed = start["rows"]
        rows = explained_rows(self.rows)
        deque(islice(rows, num_replayed), maxlen=0)
        per_round = self.batch_size * self.world_size
        number, self.first_number = self.first_number, 0
        if self.fetches is not None:
            self.fetches.start_epoch()
        while True:
            if self.fetches is not None:
                self.fetches.before_fetch(number)
            if not (group := list(islice(rows, per_round))):
                return
            number += 1
            if len(group) == per_round or not self.drop_last:
                yield self._packet(group, per_round)

    def _packet(self, group: list[Any], per_round: int) -> Packet:
        num_rows = len(group)
        own = self.batch_size if num_rows == per_round else -(-num_rows // self.world_size)
        # The processes must stay in step, so a short last batch is shared out and filled up with its own first rows.
        for i in range(own * self.world_size - num_rows):
            group.append(group[i % num_rows])
        batch = self.collate(group[self.rank * own : (self.rank + 1) * own])
        state = self.rows.state_dict() if callable(getattr(self.rows, "state_dict", None)) else None
        return Packet(batch, state, num_rows, filled_up=len(group) > num_rows)

    def set_epoch(self, epoch: int) -> None:
        """Tells the rows which epoch comes."""
        if callable(getattr(self.rows, "set_epoch", None)):
            # `datasets` shares its epoch between processes and adds the difference: setting it twice at once is a race.
            if getattr(self.rows, "epoch", None) != epoch:
                self.rows.set_epoch(epoch)
        elif isinstance(generator := getattr(self.rows, "generator", None), torch.Generator):
            generator.manual_seed(epoch)  # the agreement of transformers' IterableDatasetShard
