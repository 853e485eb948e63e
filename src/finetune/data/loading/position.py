"""Where a loader stands: start in the middle of an epoch, save and verify the place.

Positions are counted in micro-batches of one process. Which rows of the epoch's order they stand for does not depend
on the number of processes, as long as the rows per optimizer step stay the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from finetune.data.loading.randomness import FetchRandomness
from finetune.data.loading.rebalance import BatchRebalanceSampler
from finetune.data.loading.samplers import OrderedSampler, permutation, rank_batches
from finetune.data.loading.streaming import StreamLoader
from finetune.errors import CheckpointError

_LOADER_PARAMS = (
    "num_workers collate_fn pin_memory timeout worker_init_fn multiprocessing_context generator prefetch_factor "
    "persistent_workers in_order"
).split()


def has_length(thing: Any) -> bool:
    """Returns whether `len(thing)` works, as `transformers.trainer_utils.has_length` does."""
    try:
        return len(thing) is not None
    except (TypeError, AttributeError, NotImplementedError):
        return False


def is_stream(dataset: Any) -> bool:
    """Returns whether rows can only be read in sequence (`torch` or `datasets` `IterableDataset`)."""
    return isinstance(dataset, IterableDataset)


class SkippedBatches(BatchSampler):
    """The batches of another batch sampler without the first `num_batches`, found by arithmetic where possible.

    `SeededRandomSampler` and its kin, alone or sharded by accelerate, know their order, so nothing is iterated over.
    For another sampler the skipped indices are drawn and dropped; no row is read.
    """

    def __init__(self, batch_sampler: Any, num_batches: int) -> None:
        self.inner = batch_sampler
        self.num_batches = num_batches
        self.batch_size = getattr(batch_sampler, "batch_size", None)  # pyright: ignore[reportAttributeAccessIssue]
        self.drop_last = getattr(batch_sampler, "drop_last", False)
        self.num_processes = getattr(batch_sampler, "num_processes", 1)
        self.split_batches = getattr(batch_sampler, "split_batches", False)

    def set_epoch(self, epoch: int) -> None:
        """Passes the epoch on, however deep the sampler that wants it lies."""
        for sampler in _nested(self.inner):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return max(0, len(self.inner) - self.num_batches)

    def __iter__(self) -> Iterator[list[int]]:
        shard, batches, sampler = _layers(self.inner)
        if isinstance(batches, BatchRebalanceSampler):
            return iter(batches.skip(self.num_batches))
        order = _order(sampler)
        if order is None or type(batches) is not BatchSampler:
            return islice(iter(self.inner), self.num_batches, None)
        options = {"drop_last": batches.drop_last, "start": self.num_batches, **_sharding(shard)}
        rest = rank_batches(order, batches.batch_size, **options)
        fetches = getattr(sampler, "fetches", None)
        return rest if fetches is None else _announced(rest, fetches, self.num_batches)


def _announced(batches: Iterator[list[int]], fetches: FetchRandomness, number: int) -> Iterator[list[int]]:
    """Yields `batches`, of which the first has the given number, after telling `fetches` of each."""
    fetches.start_epoch()
    for place, batch in enumerate(batches, number):
        fetches.before_fetch(place)
        yield batch


def _nested(batch_sampler: Any) -> Iterator[Any]:
    """Yields a batch sampler and everything it wraps, outermost first."""
    while batch_sampler is not None:
        yield batch_sampler
        inner = getattr(batch_sampler, "inner", None) or getattr(batch_sampler, "batch_sampler", None)
        batch_sampler = inner if inner is not None else getattr(batch_sampler, "sampler", None)


def _layers(batch_sampler: Any) -> tuple[Any, Any, Any]:
    """Returns accelerate's shard (or None), the batch sampler under it, and the row sampler (or None)."""
    inner = getattr(batch_sampler, "batch_sampler", None)
    shard, batches = (batch_sampler, inner) if inner is not None else (None, batch_sampler)
    return shard, batches, getattr(batches, "sampler", None)


def _sharding(shard: Any) -> dict[str, Any]:
    """Returns how accelerate's shard (or None) cuts batches, as arguments of `rank_batches`."""
    names = ("num_processes", "process_index", "split_batches", "even_batches")
    return {} if shard is None else {name: getattr(shard, name) for name in names}


def _source(loader: Any) -> Any:
    """Returns the sampler that decides the order of the rows: one that makes whole batches, else that of the rows."""
    _, batches, sampler = _layers(getattr(loader, "batch_sampler", None))
    return batches if isinstance(batches, BatchRebalanceSampler) else sampler


def _order(sampler: Any) -> np.ndarray | None:
    """Returns the whole order of an epoch, or None for a sampler that cannot tell without being drawn from."""
    if isinstance(sampler, BatchRebalanceSampler):
        return sampler.order()
    if isinstance(sampler, OrderedSampler):
        return sampler.order()[sampler.start :]
    if type(sampler) is torch.utils.data.SequentialSampler:
        return np.arange(len(sampler))
    # accelerate's SeedableRandomSampler, made from the RandomSampler of an overriding subclass
    seedable = hasattr(sampler, "initial_seed") and not getattr(sampler, "replacement", True)
    if seedable and sampler.num_samples == len(sampler.data_source):
        return permutation(sampler.num_samples, sampler.initial_seed + sampler.epoch)
    return None


def skip_batches(loader: Any, num_batches: int) -> Any:
    """Returns a loader for the rest of the current epoch, without its first `num_batches`; reads no row of a map.

    The given loader is not changed and serves the following epochs. A stream that `load_loader_state` did not put at
    its place reads the batches again. A loader of a kind not known here goes through `accelerate.skip_first_batches`.
    """
    if num_batches == 0:
        return loader
    if isinstance(loader, StreamLoader):
        loader.skip(num_batches)
        return loader
    if not hasattr(loader, "dataset"):
        return islice(loader, num_batches, None)
    from accelerate import skip_first_batches
    from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard

    kind: Any = type(loader)
    own_params: dict[type, tuple[str, ...]] = {
        DataLoader: (),
        DataLoaderShard: ("_drop_last", "_non_blocking", "device", "rng_types", "synchronized_generator"),
        DataLoaderDispatcher: ("_drop_last", "_non_blocking", "split_batches", "slice_fn", "torch_device_mesh"),
    }
    plain = getattr(loader, "base_dataloader", loader)
    known = kind in own_params and loader.batch_sampler is not None and not is_stream(loader.dataset)
    if not known or isinstance(plain.sampler, BatchSampler):
        return skip_first_batches(loader, num_batches)
    params = {name: getattr(plain, name) for name in _LOADER_PARAMS}
    params |= {name: getattr(loader, name, None) for name in own_params[kind]}
    dispatches = kind is DataLoaderDispatcher and not loader.split_batches
    skipped = SkippedBatches(loader.batch_sampler, num_batches * (loader.state.num_processes if dispatches else 1))
    rest = kind(loader.dataset, batch_sampler=skipped, **params)
    if kind is not DataLoader:
        rest.iteration = loader.iteration
    return rest


def _epoch_order(loader: Any, epoch: int) -> np.ndarray | None:
    """Returns the order of the rows of all processes in `epoch`, or None; leaves the loader as it is."""
    if is_stream(getattr(loader, "dataset", None)):
        return None
    source = _source(loader)
    before = getattr(source, "epoch", None)
    if before is None:
        return _order(source)
    try:
        source.epoch = epoch
        return _order(source)
    finally:
        source.epoch = before


def rows_per_batch(loader: Any) -> int | None:
    """Returns the rows that all processes together take per micro-batch, or None where that varies."""
    if isinstance(loader, StreamLoader):
        return loader.total_batch_size
    shard, batches, _ = _layers(getattr(loader, "batch_sampler", None))
    batch_size = getattr(batches, "batch_size", None)
    if batch_size is None:
        return None
    return batch_size * (1 if shard is None or shard.split_batches else shard.num_processes)


def following_rows(loader: Any, num_batches: int, epoch: int, num_rows: int = 32) -> list[int] | None:
    """Returns the indices of the `num_rows` rows that follow after `num_batches` micro-batches of `epoch`.

    They do not depend on the number of processes or workers. Past the end of the epoch it continues with the next one.
    None when the order cannot be known in advance (a sampler of one's own; a stream, whose state has a hash).
    """
    order, following = _epoch_order(loader, epoch), _epoch_order(loader, epoch + 1)
    if order is None or following is None:
        return None
    source = _source(loader)
    if isinstance(source, BatchRebalanceSampler):
        start = num_batches // source.grad_accum * source.effective_batch_size
    else:
        start = num_batches * (rows_per_batch(loader) or 1)
    return np.concatenate([order[start:], following])[:num_rows].tolist()


def watch_fetches(loader: Any, num_kept: int) -> None:
    """Makes a loader without workers remember the random states from before its last `num_kept` fetches.

    Nothing happens where this process does not fetch (workers draw from generators of their own) or where a sampler
    not known here gives the order: random draws of collators are not repeated there by a resumed run.
    """
    if getattr(loader, "num_workers", 0):
        return
    source = _source(loader)
    if isinstance(loader, StreamLoader):
        loader.watch_fetches(FetchRandomness(num_kept))
    elif isinstance(source, BatchRebalanceSampler):
        source.fetches = FetchRandomness(num_kept)
    elif isinstance(source, OrderedSampler) and (rows := rows_per_batch(loader)) is not None:
        source.fetches, source.rows_per_fetch = FetchRandomness(num_kept), rows


def fetches_of(loader: Any) -> FetchRandomness | None:
    """Returns what `watch_fetches` made for `loader`, or None."""
    return loader.fetches if isinstance(loader, StreamLoader) else getattr(_source(loader), "fetches", None)


def loader_state(loader: Any) -> dict[str, Any]:
    """Returns what must be the same, or restored, for the order to continue; plain values.

    For a stream its position; for a map-style dataset its number of rows, the kind of sampler and its seed.
    """
    if isinstance(loader, StreamLoader):
        return {"kind": "stream", **loader.state_dict()}
    if is_stream(getattr(loader, "dataset", None)):
        return {"kind": "stream_without_state"}
    source = _source(loader)
    seed = getattr(source, "seed", getattr(source, "initial_seed", None))
    kind = type(source).__name__
    return {
        "kind": "map",
        "num_rows": len(loader.dataset) if has_length(getattr(loader, "dataset", None)) else None,
        # accelerate's name for the order that SeededRandomSampler produces as well
        "sampler": "SeededRandomSampler" if kind == "SeedableRandomSampler" else kind,
        "seed": seed if isinstance(seed, int) else None,
    }


def load_loader_state(loader: Any, state: Mapping[str, Any], *, verify: bool = True) -> None:
    """Puts a stream at its saved position; checks that a map-style loader has the saved order.

    Raises `CheckpointError` naming what differs. `verify=False` accepts changed data.
    """
    if isinstance(loader, StreamLoader) and state.get("kind") == "stream":
        loader.load_state_dict(state, verify=verify)
        return
    now = loader_state(loader)
    if now["kind"] == "stream_without_state":
        raise CheckpointError(
            "The stream is read through accelerate (`dispatch_batches`, `split_batches` or a device mesh), which "
            "cannot resume it. Use `ignore_data_skip=True` to start the epoch anew."
        )
    changed = [f"`{key}` was {state[key]!r} and is {now.get(key)!r}" for key in state if state[key] != now.get(key)]
    if verify and (changed or now["kind"] != state.get("kind")):
        raise CheckpointError(
            f"The training data is not what it was when the checkpoint was written: {'; '.join(changed)}. Restore it "
            "(dataset, `seed`, `data_seed`, `train_sampling_strategy`), or use `ignore_data_skip=True`."
        )


def batch_rows(
    loader: Any, number: int, epoch: int | None = None, *, process_index: int | None = None
) -> list[int] | None:
    """Returns which rows of the dataset are in micro-batch `number` (from 0) of one process; reads no row.

    Of `epoch`, or of the one the loader is in; of this process by default. None when the order cannot be known in
    advance (a stream, a sampler of one's own) or there is no such batch.
    """
    if is_stream(getattr(loader, "dataset", None)) or getattr(loader, "batch_sampler", None) is None:
        return None
    shard, batches, sampler = _layers(loader.batch_sampler)
    order = _order(sampler) if epoch is None else _epoch_order(loader, epoch)
    if order is None or getattr(batches, "batch_size", None) is None:
        return None
    sharding = _sharding(shard)
    if shard is not None and process_index is not None:
        sharding["process_index"] = process_index
    return next(rank_batches(order, batches.batch_size, drop_last=batches.drop_last, start=number, **sharding), None)
