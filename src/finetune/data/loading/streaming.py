"""Batches of a stream (`IterableDataset`) with a position that can be saved and resumed exactly.

Every process reads the whole stream and keeps its part of each batch, so the position is the same everywhere and a
run can continue with another number of processes. Worker `w` of `W` produces the batches w, w + W, w + 2W, …; a
worker that has run dry hands out empty packets, so the order does not depend on timing. With each batch comes the
state of the stream right after it, which makes prefetching harmless: the saved position is that of the last batch
handed out.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader

from finetune.data.loading import randomness
from finetune.data.loading.digest import digest
from finetune.data.loading.randomness import FetchRandomness
from finetune.data.loading.stream_batches import Batches, Packet
from finetune.data.loading.stream_source import why_not_resumable
from finetune.errors import CheckpointError

logger = logging.getLogger(__name__)


class StreamLoader(DataLoader[Any]):
    """A `DataLoader` over a stream; batches of this process, on `device`, see the module.

    `state_dict()` gives the position after the last batch that was handed out, in plain values; `load_state_dict`
    makes the next iteration start there. Works like a loader prepared by accelerate: `set_epoch`, `iteration`,
    `end_of_dataloader`, `remainder` (rows in the last batch of all processes) and `gradient_state`.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        batch_size: int,
        collate_fn: Callable[[list[Any]], Any],
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        device: torch.device | None = None,
        non_blocking: bool = False,
        gradient_state: Any = None,
        **params: Any,
    ) -> None:
        super().__init__(dataset, batch_size=batch_size, collate_fn=collate_fn, drop_last=drop_last, **params)
        self.rank, self.world_size = rank, world_size
        self.device, self.non_blocking, self.gradient_state = device, non_blocking, gradient_state
        self.iteration = 0
        self.end_of_dataloader, self.remainder = False, -1
        self._batches = Batches(dataset, collate_fn, batch_size, rank, world_size, drop_last)
        # Batching happens in `Batches`, where the state after each batch is known.
        self._open = partial(DataLoader, self._batches, batch_size=None, collate_fn=_identity, **params)
        self._inner = self._open()
        self._position: dict[str, Any] = self._at_start()
        self._next_batch: Any = None
        self._expected: str | None = None
        self._num_dropped = 0

    @property
    def fetches(self) -> FetchRandomness | None:
        """What remembers the random states from before the last fetches; None with workers."""
        return self._batches.fetches

    def watch_fetches(self, fetches: FetchRandomness) -> None:
        """Tells `fetches` of every fetch from now on. For a loader without workers."""
        self._batches.fetches = fetches

    @property
    def total_batch_size(self) -> int:
        """Rows that all processes take together."""
        return (self.batch_size or 1) * self.world_size

    def __len__(self) -> int:
        num_rows = len(self._batches.rows)  # raises TypeError for a stream without length, as `DataLoader` does
        return num_rows // self.total_batch_size if self.drop_last else -(-num_rows // self.total_batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch of the next iteration; reaches workers that are already running."""
        self.iteration = epoch
        if self._position["epoch"] != epoch:  # a loaded position counts in its own epoch only
            self._batches.start, self._batches.num_skipped_workers, self._expected = None, 0, None
            self._batches.first_number = 0
            self._position = self._at_start()
        self._batches.epoch.fill_(epoch)
        self._batches.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.set_epoch(self.iteration)
        self.end_of_dataloader, self.remainder = False, -1
        if self._batches.start is None:
            self._position = self._at_start()
        if self.gradient_state is not None:
            self.gradient_state._add_dataloader(self)
        try:
            yield from self._look_ahead()
        finally:
            self._next_batch = None
            if self.gradient_state is not None:
                self.gradient_state._remove_dataloader(self)
        self.iteration += 1

    def _look_ahead(self) -> Iterator[Any]:
        """Yields each batch once the next one is known, because the last one must say that it is the last."""
        packets, pending = self._begin_verified()
        num_dropped, self._num_dropped = self._num_dropped, 0
        for _ in range(num_dropped):
            if pending is not None:
                self._advance(*pending)
                pending = next(packets, None)
        while pending is not None:
            (slot, packet), pending = pending, next(packets, None)
            self._advance(slot, packet)
            self._next_batch = pending[1].batch if pending else None
            # gather_for_metrics cuts repeated rows off only where this is set.
            self.end_of_dataloader = pending is None or packet.filled_up
            self.remainder = packet.num_rows if self.end_of_dataloader else -1
            yield self._to_device(packet.batch)

    def _turns(self, packets: Iterator[Packet]) -> Iterator[tuple[int, Packet]]:
        """Yields `(turn, packet)` in the workers' turns, until all have run dry."""
        num_workers = len(self._position["workers"])
        dry: set[int] = set()
        turn = self._position["turn"] // num_workers * num_workers
        for packet in packets:
            if packet.done:
                dry.add(turn % num_workers)
                if len(dry) == num_workers:
                    return
            elif not packet.skipped:
                yield turn, packet
            turn += 1

    def _advance(self, turn: int, packet: Packet) -> None:
        worker = self._position["workers"][turn % len(self._position["workers"])]
        worker["dataset"] = packet.state
        worker["rows"] += packet.num_rows
        self._position["turn"] = turn + 1
        self._position["batches"] += 1

    def _to_device(self, batch: Any) -> Any:
        if self.device is None:
            return batch
        from accelerate.utils import send_to_device

        return send_to_device(batch, self.device, non_blocking=self.non_blocking)

    def _at_start(self) -> dict[str, Any]:
        workers: list[dict[str, Any]] = [{"dataset": None, "rows": 0} for _ in range(max(1, self.num_workers))]
        return {"epoch": self.iteration, "batches": 0, "turn": 0, "workers": workers}

    def state_dict(self) -> dict[str, Any]:
        """Returns the position after the last batch handed out, with a hash of the next one if it is known."""
        position = self._position
        return {
            **{key: position[key] for key in ("epoch", "batches", "turn")},
            "workers": [dict(worker) for worker in position["workers"]],
            "layout": [self.rank, self.batch_size, self.world_size],
            "next_digest": None if self._next_batch is None else digest(self._next_batch),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, verify: bool = True) -> None:
        """Makes the next iteration start at `state`, and check its first batch against the stored hash.

        A stream without state of its own, or whose state leaves out its shuffle buffer, is read again from the start
        of the epoch up to the position (rows are not collated), which is said in the log.
        Raises `CheckpointError` when the number of workers differs.
        """
        num_workers = len(self._position["workers"])
        if len(state["workers"]) != num_workers:
            raise CheckpointError(
                f"The stream was read by {len(state['workers'])} worker(s) and `dataloader_num_workers` now asks for "
                f"{num_workers}: the order would change. Use the same number, or `ignore_data_skip=True` to start "
                "the epoch anew."
            )
        workers = [dict(worker) for worker in state["workers"]]
        reason = why_not_resumable(self.dataset)
        if reason is not None and state["batches"]:
            num_rows = sum(worker["rows"] for worker in workers)
            logger.warning("Reading %d rows of the stream again to resume exactly: %s.", num_rows, reason)
            for worker in workers:
                worker["dataset"] = None
        self._position = {key: state[key] for key in ("epoch", "batches", "turn")} | {"workers": workers}
        self.set_epoch(state["epoch"])
        self._batches.start = [dict(worker) for worker in workers]
        self._batches.first_number = state["batches"]
        self._batches.num_skipped_workers = state["turn"] % num_workers
        same_layout = list(state["layout"]) == [self.rank, self.batch_size, self.world_size]
        self._expected = state["next_digest"] if verify and same_layout else None

    def skip(self, num_batches: int) -> None:
        """Makes the next iteration start behind `num_batches`, which are read again and dropped.

        Does nothing where `load_state_dict` already found the place. For checkpoints without a saved position, as
        transformers writes them.
        """
        if self._batches.start is None:
            logger.warning("Reading %d batches of the stream again: the checkpoint has no position.", num_batches)
            self._num_dropped = num_batches

    def _begin(self) -> tuple[Iterator[tuple[int, Packet]], tuple[int, Packet] | None]:
        """Returns the packets of an epoch behind the first one, and that one."""
        packets = self._turns(iter(self._inner))
        pending = next(packets, None)  # by now every worker has its starting point
        self._batches.start, self._batches.num_skipped_workers = None, 0
        return packets, pending

    def _begin_verified(self) -> tuple[Iterator[tuple[int, Packet]], tuple[int, Packet] | None]:
        """Returns as `_begin`, after comparing the first packet with the one that was due when a position was loaded.

        A packet that differs is read once more. It differs from itself if rows or collator are random in a way that
        cannot be repeated: by workers, or by a generator of their own. Else the data changed.

        Raises:
            CheckpointError: the data is not what it was.
        """
        batches, expected = self._batches, self._expected
        self._expected = None
        if expected is None:
            return self._begin()
        start = copy.deepcopy(batches.start), batches.num_skipped_workers, batches.first_number
        before = randomness.capture()
        packets, pending = self._begin()
        found = None if pending is None else digest(pending[1].batch)
        if found == expected:
            return packets, pending
        if found is not None:
            batches.start, batches.num_skipped_workers, batches.first_number = start
            if not self.num_workers:  # workers are seeded anew, and must be for their randomness to show
                randomness.restore(before)
            self._inner = self._open()
            packets, pending = self._begin()
        if pending is None or digest(pending[1].batch) == found:
            raise CheckpointError(
                "The stream does not continue with the batch that was next when the checkpoint was written: the "
                "dataset, its order or its preparation changed. Restore them, or use `ignore_data_skip=True`."
            )
        logger.warning(
            "The rows of the stream, or what the collator makes of them, are random (their generator is not in the "
            "checkpoint), so a resumed run goes on at the same rows but cannot verify them."
        )
        return packets, pending


def _identity(packet: Any) -> Any:
    return packet
