"""The order in which model and optimizer are handed to accelerate, which differs between the ways to parallelise."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from finetune.distributed.accelerator import fsdp_version, zero_stage
from finetune.distributed.ranks import world_size
from finetune.distributed.verify import verify_prepared


@dataclass
class Prepared:
    """What the loop trains: `model` as wrapped by accelerate, and the optimizer that belongs to its parameters.

    `lr_scheduler` is set only when a DeepSpeed config brings its own; otherwise the caller creates one now, after
    the optimizer has its final form.
    """

    model: nn.Module
    optimizer: Any
    lr_scheduler: Any = None


def prepare(
    accelerator: Any,
    model: nn.Module,
    create_optimizer: Callable[..., Any],
    *,
    args: Any = None,
    max_steps: int = 0,
    create_scheduler: Callable[..., Any] | None = None,
) -> Prepared:
    """Returns the prepared model and optimizer. Agrees with `_prepare_for_training` of transformers' Trainer.

    | runs            | order                                                                                     |
    |-----------------|-------------------------------------------------------------------------------------------|
    | one process, DDP, FSDP2 | `create_optimizer()`, then model and optimizer prepared together                  |
    | FSDP1           | the model first: wrapping replaces parameters; then `create_optimizer(wrapped model)`      |
    | DeepSpeed       | config finalised with `max_steps`; optimizer and schedule from the config if it names them |
    | sharded at load | the model owns its placement: only the optimizer is prepared                               |

    `create_optimizer` is called with no argument, or with the wrapped model under FSDP1. `args` and `max_steps` are
    read under DeepSpeed only, where `create_scheduler(num_training_steps, optimizer)` is called by the engine if the
    config names an optimizer but no schedule. A model that is already wrapped (a second `train()`) is not wrapped
    again.
    """
    if zero_stage(accelerator) is not None:
        return _prepare_deepspeed(accelerator, model, create_optimizer, args, max_steps, create_scheduler)
    if getattr(model, "is_distributed_loading_by_transformers", False):
        return _prepare_sharded_at_load(accelerator, model, create_optimizer)
    version = fsdp_version(accelerator)
    if version == 1:
        _fit_fsdp_to_adapters(accelerator, model)
        wrapped = accelerator.prepare(model)
        prepared = Prepared(wrapped, accelerator.prepare(create_optimizer(wrapped)))
    else:
        with _embeddings_on_their_own(accelerator, model):
            prepared = Prepared(*accelerator.prepare(model, create_optimizer()))
    if version is not None:
        _allow_generation(prepared.model)
    verify_prepared(accelerator, prepared.model)
    return prepared


def _prepare_deepspeed(
    accelerator: Any,
    model: nn.Module,
    create_optimizer: Callable[..., Any],
    args: Any,
    max_steps: int,
    create_scheduler: Callable[..., Any] | None,
) -> Prepared:
    from accelerate.utils import DummyOptim, DummyScheduler

    config = accelerator.state.deepspeed_plugin.hf_ds_config
    config.trainer_config_finalize(args, model, max_steps)
    settings = config.config
    if "optimizer" in settings:
        optimizer: Any = DummyOptim(params=[p for p in model.parameters() if p.requires_grad])
    else:
        optimizer = create_optimizer()
        # DeepSpeed knows a short list of optimizers by name and refuses others unless told otherwise.
        settings["zero_allow_untested_optimizer"] = True
    scheduler: Any = None
    if "scheduler" in settings:
        scheduler = DummyScheduler(optimizer)
    elif isinstance(optimizer, DummyOptim) and create_scheduler is not None:
        scheduler = DummyScheduler(
            optimizer,
            lr_scheduler_callable=lambda real: create_scheduler(num_training_steps=max_steps, optimizer=real),
        )
    objects = (model, optimizer) if scheduler is None else (model, optimizer, scheduler)
    types = _weight_types(model)
    prepared = Prepared(*accelerator.prepare(*objects))
    prepared.model.weight_types = types  # pyright: ignore[reportArgumentType,reportAttributeAccessIssue]
    verify_prepared(accelerator, prepared.model)
    return prepared


def _weight_types(model: Any) -> dict[str, Any]:
    """Returns the number format of each weight by name, as it was loaded: DeepSpeed casts the model to `bf16`."""
    import torch

    asked = getattr(getattr(model, "config", None), "dtype", None)
    return {
        # ZeRO-3 has cast what was loaded under `zero.Init`; the configuration says what it was.
        name: asked if hasattr(parameter, "ds_id") and isinstance(asked, torch.dtype) else parameter.dtype
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def prepare_for_evaluation(accelerator: Any, model: nn.Module) -> nn.Module:
    """Returns `model` ready for `evaluate()` without a training run: sharded under FSDP and ZeRO-3, else only placed.

    A model that is already wrapped comes back as it is. ZeRO-1 and 2 keep whole weights, so nothing is needed there.
    """
    if zero_stage(accelerator) == 3:
        config = accelerator.state.deepspeed_plugin.hf_ds_config
        config.del_config_sub_tree("optimizer")
        config.del_config_sub_tree("lr_scheduler")
        return accelerator.prepare(model)
    if fsdp_version(accelerator) is not None:
        with _embeddings_on_their_own(accelerator, model):
            return accelerator.prepare(model)
    return accelerator.prepare_model(model, evaluation_mode=True)


def _prepare_sharded_at_load(accelerator: Any, model: nn.Module, create_optimizer: Callable[..., Any]) -> Prepared:
    optimizer = create_optimizer()
    wrapped = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
    _replicate_unsharded(accelerator, wrapped)
    return Prepared(wrapped, accelerator.prepare(optimizer))


def _replicate_unsharded(accelerator: Any, model: nn.Module) -> None:
    """Keeps trainable parameters that nobody shards (adapters on a sharded base) equal on all processes.

    They start as on process 0, and their gradient is averaged once, after the last micro-batch of a window.
    """
    if world_size() == 1:
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    def average(parameter: torch.Tensor) -> None:
        if accelerator.sync_gradients and parameter.grad is not None:
            dist.all_reduce(parameter.grad, op=dist.ReduceOp.SUM)
            parameter.grad /= world_size()

    for parameter in model.parameters():
        if not parameter.requires_grad or isinstance(parameter.data, DTensor):
            continue
        with torch.no_grad():
            dist.broadcast(parameter.data, src=0)
        if not getattr(parameter, "_averaged_over_ranks", False):
            parameter.register_post_accumulate_grad_hook(average)
            parameter._averaged_over_ranks = True  # pyright: ignore[reportAttributeAccessIssue]


def _fit_fsdp_to_adapters(accelerator: Any, model: nn.Module) -> None:
    """Wraps adapters on their own under FSDP1: a flat parameter cannot be half frozen."""
    if "peft" not in sys.modules or not hasattr(model, "active_peft_config"):
        return
    try:
        from transformers.distributed.fsdp import update_fsdp_plugin_peft
    except ImportError:  # transformers < 5.20
        from transformers.integrations.fsdp import update_fsdp_plugin_peft  # pyright: ignore

    update_fsdp_plugin_peft(model, accelerator)


@contextmanager
def _embeddings_on_their_own(accelerator: Any, model: Any) -> Iterator[None]:
    """Under FSDP2, keeps modules that hold the input embedding (`BertEmbeddings`) from being sharded as one unit.

    accelerate shards the input embedding by itself after the modules its policy names, and torch refuses to shard what
    is sharded already. The other parameters of such a module belong to the unit of the whole model then.
    """
    plugin = accelerator.state.fsdp_plugin if fsdp_version(accelerator) == 2 else None
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if plugin is None or embedding is None:
        yield
        return
    before = plugin.transformer_cls_names_to_wrap
    named = list(before if before is not None else getattr(model, "_no_split_modules", None) or ())
    around = {
        type(module).__name__
        for module in model.modules()
        if type(module).__name__ in named and any(inner is embedding for inner in module.modules())
    }
    if around:
        plugin.transformer_cls_names_to_wrap = [name for name in named if name not in around]
    try:
        yield
    finally:
        plugin.transformer_cls_names_to_wrap = before


def _allow_generation(model: Any) -> None:
    if hasattr(model, "generate"):
        from torch.distributed import fsdp

        # `generate` calls submodules outside `forward`, where FSDP would leave their parameters sharded.
        fsdp.register_fsdp_forward_method(model, "generate")
