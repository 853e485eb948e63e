"""Data loaders as `transformers.Trainer` builds them. Where a loader stands is the business of `position`.

A map-style dataset goes through `accelerator.prepare`, so sharding, device placement and the use of the global
random generator (one draw per iteration) are those of transformers. A stream goes through `StreamLoader`, whose
position can be saved.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from finetune.data.loading.position import has_length, is_stream, watch_fetches
from finetune.data.loading.rebalance import BatchRebalanceSampler
from finetune.data.loading.samplers import LengthGroupedSampler, SeededRandomSampler, SequentialSampler, row_lengths
from finetune.data.loading.streaming import StreamLoader

logger = logging.getLogger(__name__)


def seed_worker(worker_id: int, num_workers: int, rank: int) -> None:
    """Seeds Python, numpy and torch in a worker, differently on each rank; transformers' `seed_worker`."""
    seed = (num_workers * rank + torch.initial_seed() % 2**32) % 2**32
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def train_sampler(dataset: Any, args: Any, input_name: str | None = None) -> Sampler[Any] | None:
    """Returns the sampler that `args.train_sampling_strategy` asks for; None for a dataset without length.

    `input_name` is the column whose lengths are grouped when there is no `args.length_column_name`. Every order is a
    function of (`data_seed`, else `seed`) and the epoch.
    """
    strategy = str(getattr(args.train_sampling_strategy, "value", args.train_sampling_strategy))
    if dataset is None or not has_length(dataset):
        return None
    seed = args.seed if args.data_seed is None else args.data_seed
    if strategy == "sequential":
        return SequentialSampler(dataset)
    if strategy == "group_by_length":
        lengths = row_lengths(dataset, args.length_column_name, input_name or "input_ids")
        # All rows of a step, so that the order does not depend on how many processes share it.
        rows = args.train_batch_size * args.gradient_accumulation_steps * max(1, args.world_size)
        return LengthGroupedSampler(lengths, rows, seed)
    if strategy == "batch_rebalance":
        world_size = max(1, args.world_size)
        return BatchRebalanceSampler(
            row_lengths(dataset, args.length_column_name, input_name or "input_ids"),
            effective_batch_size=args.train_batch_size * args.gradient_accumulation_steps * world_size,
            dp_size=world_size,
            grad_accum=args.gradient_accumulation_steps,
            seed=seed,
            rank=args.process_index if world_size > 1 else 0,
            drop_last=args.dataloader_drop_last,
        )
    return SeededRandomSampler(dataset, seed)


def warn_of_stream_order(args: Any) -> None:
    """Warns when `train_sampling_strategy` asks for an order that a stream cannot be read in."""
    strategy = str(getattr(args.train_sampling_strategy, "value", args.train_sampling_strategy))
    if strategy in ("group_by_length", "batch_rebalance"):
        logger.warning(
            "`train_sampling_strategy='%s'` has no effect: the training data is a stream, which is read in its own "
            "order. Pass a dataset with a length, or leave the argument out.",
            strategy,
        )


def eval_sampler(dataset: Any, args: Any, input_name: str | None = None) -> Sampler[Any] | None:
    """Returns the sampler for evaluation: the rows' own order, or grouped by length when training is."""
    if dataset is None or not has_length(dataset):
        return None
    if str(getattr(args.train_sampling_strategy, "value", args.train_sampling_strategy)) == "group_by_length":
        seed = args.seed if args.data_seed is None else args.data_seed
        lengths = row_lengths(dataset, args.length_column_name, input_name or "input_ids")
        return LengthGroupedSampler(lengths, args.eval_batch_size, seed)
    return SequentialSampler(dataset)


def build_dataloader(
    dataset: Any,
    *,
    args: Any,
    accelerator: Any,
    collate_fn: Callable[[list[Any]], Any],
    batch_size: int,
    sampler: Sampler[Any] | None = None,
    is_training: bool = False,
) -> DataLoader[Any]:
    """Returns the loader of this process, batches on its device; the loader that transformers would build.

    `batch_size` is that of one process; `sampler` is ignored for a stream. Streams are read by every process
    (transformers: by the first one, which fails on batches of unequal width) unless
    `accelerator_config.dispatch_batches` or `split_batches` asks for accelerate's ways, which cannot be resumed.
    """
    params: dict[str, Any] = {
        "num_workers": args.dataloader_num_workers,
        # torch would warn at every loader that it cannot pin without an accelerator.
        "pin_memory": args.dataloader_pin_memory and torch.accelerator.is_available(),
        "persistent_workers": args.dataloader_persistent_workers,
        "multiprocessing_context": args.dataloader_multiprocessing_context,
        "prefetch_factor": args.dataloader_prefetch_factor,
        "in_order": args.dataloader_in_order,
        "collate_fn": collate_fn,
    }
    if args.dataloader_num_workers and is_stream(dataset):
        # Workers are forked: the tokenizers library would warn in each, and stop using threads there anyway.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if is_stream(dataset):
        loader = _stream_loader(dataset, args, accelerator, batch_size, params)
    else:
        loader = _map_loader(dataset, args, accelerator, batch_size, sampler, is_training, params)
    if is_training:
        watch_fetches(loader, args.gradient_accumulation_steps + 2)
    return loader


def _map_loader(
    dataset: Any,
    args: Any,
    accelerator: Any,
    batch_size: int,
    sampler: Sampler[Any] | None,
    is_training: bool,
    params: dict[str, Any],
) -> DataLoader[Any]:
    if is_training:
        params["worker_init_fn"] = partial(
            seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index
        )
    if isinstance(sampler, BatchRebalanceSampler):
        params["batch_sampler"] = sampler
    else:
        params |= {"batch_size": batch_size, "sampler": sampler, "drop_last": args.dataloader_drop_last}
    loader = accelerator.prepare(DataLoader(dataset, **params))
    if isinstance(sampler, BatchRebalanceSampler) and loader.batch_sampler is not sampler:
        # The sampler knows its rank already; accelerate's wrapper must not take every W-th batch of it once more.
        loader.batch_sampler.num_processes, loader.batch_sampler.process_index = 1, 0
    return loader


def _stream_loader(
    dataset: Any, args: Any, accelerator: Any, batch_size: int, params: dict[str, Any]
) -> DataLoader[Any]:
    accelerates_way = (
        accelerator.dispatch_batches
        or accelerator.split_batches
        or getattr(accelerator, "torch_device_mesh", None) is not None
    )
    if accelerates_way:
        return accelerator.prepare(DataLoader(dataset, batch_size=batch_size, **params))
    # A node's share made by `split_dataset_by_node` is this process's own; dividing it again would lose rows.
    mine = getattr(dataset, "_distributed", None) is not None
    loader = StreamLoader(
        dataset,
        batch_size=batch_size,
        rank=0 if mine else accelerator.process_index,
        world_size=1 if mine else accelerator.num_processes,
        drop_last=args.dataloader_drop_last,
        device=accelerator.device if accelerator.device_placement else None,
        non_blocking=accelerator.non_blocking,
        gradient_state=accelerator.gradient_state,
        **params,
    )
    accelerator._dataloaders.append(loader)
    return loader


def num_examples(loader: Any, batch_size: int = 1) -> int:
    """Returns the rows of the loader's dataset; without one, its batches times `batch_size`."""
    try:
        dataset = loader.dataset
        inner = getattr(dataset, "dataset", None) if type(dataset).__name__ == "IterableDatasetShard" else None
        return len(dataset if inner is None else inner)
    except (NameError, AttributeError, TypeError):
        return len(loader) * batch_size
