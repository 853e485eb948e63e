"""Training arguments to an `accelerate.Accelerator`, and a check that what runs is what was asked for.

Two things are not accelerate's job here: gradient accumulation (the engine counts windows, so `num_steps` is 1 and
nothing is divided twice) and gradient clipping policy.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from finetune import environment
from finetune.arguments.distributed import require_one_sharding
from finetune.errors import ArgumentError

if TYPE_CHECKING:
    from accelerate import Accelerator

_LOADER_FIELDS = ("split_batches", "dispatch_batches", "even_batches", "use_seedable_sampler", "non_blocking")


def build_accelerator(args: Any, model: nn.Module | None = None) -> Accelerator:
    """Returns the accelerator that `args` (training arguments) describe; `args` is read, never written.

    `model` decides two details: whether DDP has to look for unused parameters, and the tensor-parallel size of a
    model that was sharded while loading. Agrees with `create_accelerator_and_postprocess` of transformers' Trainer.

    Raises:
        ArgumentError: `args` contradict themselves or the launcher.
    """
    from accelerate import Accelerator

    _check_arguments(args)
    accelerator = Accelerator(**accelerator_kwargs(args, model))
    _check_sharding(accelerator, args)
    _sum_in_float32(accelerator)
    if zero_stage(accelerator) is not None and getattr(args, "hf_deepspeed_config", None) is None:
        fill_deepspeed_config(accelerator, args)
    verify_what_runs(accelerator, args)
    return accelerator


def accelerator_kwargs(args: Any, model: nn.Module | None = None) -> dict[str, Any]:
    """Returns the keyword arguments with which `build_accelerator` calls `Accelerator`."""
    from accelerate.utils import GradientAccumulationPlugin, TorchDynamoPlugin

    accumulation = dict(args.accelerator_config.gradient_accumulation_kwargs or {})
    # `features/compiled.py` compiles the layers in place; accelerate, only what its launcher asked for.
    dynamo: Any = None if args.torch_compile_backend is None else "no"
    kwargs: dict[str, Any] = {
        "mixed_precision": args.mixed_precision,
        "deepspeed_plugin": args.deepspeed_plugin,
        "fsdp_plugin": _fsdp_plugin(args),
        "dataloader_config": _loader_configuration(args),
        "gradient_accumulation_plugin": GradientAccumulationPlugin(**{**accumulation, "num_steps": 1}),
        "kwargs_handlers": [_ddp_kwargs(args, model)],
        "dynamo_plugin": TorchDynamoPlugin(backend=dynamo),
    }
    parallelism = _parallelism_config(args, model)
    if parallelism is not None:
        kwargs["parallelism_config"] = parallelism
    return kwargs


@contextmanager
def processes_in_step(accelerator: Any) -> Iterator[None]:
    """Context manager: prepares loaders so that every process gets the same number of batches, of the same size.

    `even_batches=False` would end a short round of batches with processes that wait for the others for ever. What it
    is for, that no row counts twice, holds anyway: the rows that fill up a round are neither trained on nor scored.
    """
    before = accelerator.even_batches
    accelerator.even_batches = True
    try:
        yield
    finally:
        accelerator.even_batches = before


def zero_stage(accelerator: Any) -> int | None:
    """Returns DeepSpeed's ZeRO stage (0 to 3), or None when DeepSpeed does not run."""
    return planned_zero_stage(accelerator.state)


def planned_zero_stage(args: Any) -> int | None:
    """Returns the ZeRO stage that the training arguments ask for, before there is an accelerator; None without one."""
    plugin = getattr(args, "deepspeed_plugin", None)
    return None if plugin is None else int(plugin.zero_stage)


def fsdp_version(accelerator: Any) -> int | None:
    """Returns 1 or 2 when FSDP runs, else None."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    return None if plugin is None else int(getattr(plugin, "fsdp_version", 1))


def fill_deepspeed_config(accelerator: Any, args: Any, *, auto_find_batch_size: bool = False) -> None:
    """Replaces the "auto" entries of a DeepSpeed config that came from the launcher by the values of `args`."""
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    plugin = accelerator.state.deepspeed_plugin
    plugin.hf_ds_config = HfTrainerDeepSpeedConfig(plugin.hf_ds_config.config)
    plugin.deepspeed_config = plugin.hf_ds_config.config
    plugin.hf_ds_config.trainer_config_process(args, auto_find_batch_size)


def verify_what_runs(accelerator: Any, args: Any) -> None:
    """Raises `ArgumentError` when the run is not the distributed, sharded or mixed-precision run that was asked for.

    Each mismatch below ends with exit code 0 if nobody looks: processes that train alone and overwrite each other,
    plain DDP instead of FSDP, float32 instead of bfloat16. Called once after the accelerator was made.
    """
    kind = accelerator.distributed_type.value
    _verify_world(accelerator, kind)
    for wanted, asked_by_args in (("FSDP", args.fsdp), ("DEEPSPEED", args.deepspeed)):
        asked_by_launcher = environment.launched_sharding(wanted)
        if (asked_by_launcher or asked_by_args) and kind != wanted:
            source = "the launcher's configuration" if asked_by_launcher else f"`{wanted.lower()}`"
            raise ArgumentError(
                f"{source} asks for {wanted}, but accelerate runs {kind} with {accelerator.num_processes} "
                f"process(es) on {accelerator.device}: nothing would be sharded. {_SHARDING_REMEDY[wanted]}"
            )
    running = str(accelerator.mixed_precision)
    if running != str(args.mixed_precision) and kind != "DEEPSPEED":
        raise ArgumentError(
            f"`args` ask for mixed precision {args.mixed_precision!r}, but accelerate runs {running!r}. Another "
            "`Accelerator` was made earlier in this process with other settings: make it after the training "
            "arguments, or give both the same precision (`bf16`, `fp16`)."
        )


_SHARDING_REMEDY = {
    "FSDP": (
        "FSDP needs more than one process and an accelerator device (accelerate never shards on CPU, even with "
        "`use_cpu=True`). Launch on GPUs with `accelerate launch --config_file accelerate_configs/fsdp2.yaml "
        "--num_processes N`, or use `accelerate_configs/ddp.yaml` on CPU."
    ),
    "DEEPSPEED": (
        "Start through `accelerate launch --config_file accelerate_configs/zero2.yaml`. On CPU set the environment "
        "variable DS_ACCELERATOR=cpu, `ddp_backend='gloo'` and `use_cpu: false` in the config file."
    ),
}


def _verify_world(accelerator: Any, kind: str) -> None:
    if "WORLD_SIZE" in os.environ and kind not in ("XLA", "TPU"):
        seen = f"accelerate sees {accelerator.num_processes} ({kind} on {accelerator.device})"
        environment.require_whole_world(accelerator.num_processes, seen)
    if accelerator.num_processes == 1 and environment.is_alone_against_orders():
        raise ArgumentError(
            "`accelerate launch` was asked for several processes and started one: it does so for "
            "`distributed_type: MULTI_CPU` without mpirun, and for `--cpu`. Use `distributed_type: MULTI_GPU` "
            "(`accelerate_configs/ddp.yaml`) and pass `use_cpu=True` to the training program instead."
        )


def _check_arguments(args: Any) -> None:
    accumulation = args.accelerator_config.gradient_accumulation_kwargs or {}
    steps = accumulation.get("num_steps", args.gradient_accumulation_steps)
    if steps != args.gradient_accumulation_steps:
        raise ArgumentError(
            f"`accelerator_config` sets `num_steps={steps}` and `gradient_accumulation_steps` is "
            f"{args.gradient_accumulation_steps}. Set only `gradient_accumulation_steps`."
        )
    require_one_sharding(args.fsdp, args.deepspeed or environment.launched_sharding("deepspeed"))


def _check_sharding(accelerator: Any, args: Any) -> None:
    stage, version = zero_stage(accelerator), fsdp_version(accelerator)
    if version is not None:
        plugin = accelerator.state.fsdp_plugin
        if plugin.activation_checkpointing and args.activation_checkpointing:
            raise ArgumentError(
                "activations would be checkpointed twice: by `fsdp_config['activation_checkpointing']` and by "
                "`activation_checkpointing` (`gradient_checkpointing`). Under FSDP keep the one in `fsdp_config`."
            )
        if args.save_only_model and "SHARDED_STATE_DICT" in str(plugin.state_dict_type):
            raise ArgumentError(
                "`save_only_model=True` writes no weights when FSDP saves shards. Set "
                "`fsdp_config['state_dict_type']='FULL_STATE_DICT'` or `save_only_model=False`."
            )
    if stage is None and version is None:
        return
    if args.save_only_model and args.load_best_model_at_end:
        raise ArgumentError(
            f"`save_only_model=True` leaves nothing that {'DeepSpeed' if stage is not None else 'FSDP'} could load "
            "the best model from. Set `load_best_model_at_end=False` or `save_only_model=False`."
        )
    if stage == 3 and args.auto_find_batch_size:
        raise ArgumentError(
            "`auto_find_batch_size=True` does not work with ZeRO-3. Use ZeRO-1 or 2, FSDP, or set "
            "`per_device_train_batch_size` yourself."
        )


def _sum_in_float32(accelerator: Any) -> None:
    """Replaces the precision that accelerate gives FSDP by one that computes in it and adds up in float32, as DDP does.

    accelerate's would round the loss to 3 digits (FSDP2 casts what the model returns), add up gradients in bfloat16,
    and round the angles of rotary embeddings (buffers, FSDP1). A policy of the user's own stays.
    """
    version = fsdp_version(accelerator)
    if version is None:
        return
    import torch
    from torch.distributed import fsdp

    plugin = accelerator.state.fsdp_plugin
    for low in (torch.bfloat16, torch.float16):
        if version == 1:
            given: Any = fsdp.MixedPrecision(param_dtype=low, reduce_dtype=low, buffer_dtype=low)
            wanted: Any = fsdp.MixedPrecision(param_dtype=low, reduce_dtype=torch.float32, buffer_dtype=torch.float32)
        else:
            given = fsdp.MixedPrecisionPolicy(param_dtype=low, reduce_dtype=low, output_dtype=low)
            wanted = fsdp.MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
        if plugin.mixed_precision_policy == given:
            plugin.mixed_precision_policy = wanted


def _loader_configuration(args: Any) -> Any:
    from accelerate.utils import DataLoaderConfiguration

    config = DataLoaderConfiguration(**{name: getattr(args.accelerator_config, name) for name in _LOADER_FIELDS})
    config.data_seed = args.data_seed
    return config


def _fsdp_plugin(args: Any) -> Any:
    if args.fsdp_plugin_args is None:
        return None
    from accelerate.utils import FullyShardedDataParallelPlugin

    return FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)


def _ddp_kwargs(args: Any, model: nn.Module | None) -> Any:
    from accelerate.utils import DistributedDataParallelKwargs

    find_unused = args.ddp_find_unused_parameters
    if find_unused is None:
        # A transformers model has one known graph; recomputation runs it twice, which the search cannot follow.
        is_transformers_model = hasattr(model, "main_input_name") and hasattr(model, "config")
        checkpointed = model is not None and (
            any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
            or _checkpoints_activations(args)
        )
        find_unused = not (is_transformers_model and checkpointed) or _has_idle_parts(args, model)
    options = {
        "bucket_cap_mb": args.ddp_bucket_cap_mb,
        "broadcast_buffers": args.ddp_broadcast_buffers,
        "static_graph": getattr(args, "ddp_static_graph", None),
    }
    given = {name: value for name, value in options.items() if value is not None}
    return DistributedDataParallelKwargs(find_unused_parameters=find_unused, **given)


def _parallelism_config(args: Any, model: nn.Module | None) -> Any:
    """Returns a new parallelism configuration (the one in `args` stays as it is), or None."""
    asked = getattr(args, "parallelism_config", None)
    tensor_parallel: Any = getattr(model, "tp_size", None) or 1
    if tensor_parallel <= 1:
        return asked
    import copy

    from accelerate import ParallelismConfig

    config: Any = getattr(model, "config", None)
    sharded = config.distributed_config.dp_size
    if asked is None:
        return ParallelismConfig(tp_size=tensor_parallel, dp_shard_size=sharded)
    merged = copy.copy(asked)
    merged.tp_size, merged.dp_shard_size = tensor_parallel, sharded
    return merged


def _has_idle_parts(args: Any, model: nn.Module | None) -> bool:
    """Returns whether text leaves a part of the model (its vision tower) without gradients, and DDP may look for it."""
    config, kwargs = getattr(model, "config", None), args.activation_checkpointing_kwargs or {}
    return (hasattr(config, "vision_config") or hasattr(config, "audio_config")) and not kwargs.get("use_reentrant")


def _checkpoints_activations(args: Any) -> bool:
    return args.activation_checkpointing is not False  # unset means yes where several processes train
