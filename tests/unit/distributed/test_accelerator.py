"""The accelerator equals the one transformers' Trainer builds, and a run that is not what was asked for is refused."""

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from finetune.distributed.accelerator import (
    _sum_in_float32,
    accelerator_kwargs,
    build_accelerator,
    fsdp_version,
    planned_zero_stage,
    verify_what_runs,
    zero_stage,
)
from finetune.errors import ArgumentError


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)


def arguments(tmp_path, **kwargs) -> TrainingArguments:
    return TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], **kwargs)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"bf16": True, "data_seed": 3, "ddp_bucket_cap_mb": 7, "ddp_broadcast_buffers": False},
        {"gradient_checkpointing": True, "gradient_accumulation_steps": 4},
        {"ddp_find_unused_parameters": False, "torch_compile": True, "torch_compile_backend": "eager"},
        {"accelerator_config": {"split_batches": True, "dispatch_batches": False, "use_seedable_sampler": False,
                                "gradient_accumulation_kwargs": {"sync_each_batch": True}}},
    ],
)  # fmt: skip
def test_agrees_with_transformers(tmp_path, kwargs) -> None:
    model = llama()
    theirs = Trainer(model, arguments(tmp_path, **copy.deepcopy(kwargs))).accelerator
    args = arguments(tmp_path, **kwargs)
    before = copy.deepcopy(args.to_dict())
    built = accelerator_kwargs(args, model)
    ours = build_accelerator(args, model)
    assert args.to_dict() == before
    assert vars(ours.dataloader_config) == vars(theirs.dataloader_config)
    assert ours.mixed_precision == theirs.mixed_precision
    assert ours.gradient_state.plugin_kwargs == theirs.gradient_state.plugin_kwargs
    assert vars(ours.ddp_handler) == vars(theirs.ddp_handler)
    # Layers are compiled in place here, so accelerate has nothing to compile.
    assert built["dynamo_plugin"].backend.value == "NO"
    assert built["gradient_accumulation_plugin"].num_steps == 1 and built["fsdp_plugin"] is None
    assert zero_stage(ours) is None and fsdp_version(ours) is None and planned_zero_stage(args) is None


def test_contradictions_are_refused(tmp_path) -> None:
    accumulation = {"gradient_accumulation_kwargs": {"num_steps": 8}}
    with pytest.raises(ArgumentError, match="gradient_accumulation_steps"):
        build_accelerator(arguments(tmp_path, accelerator_config=accumulation))
    args = arguments(tmp_path)
    args.fsdp, args.deepspeed = True, "zero2.json"
    with pytest.raises(ArgumentError, match="exclude each other"):
        build_accelerator(args)


def fake(kind: DistributedType, num_processes: int, precision: str = "no") -> SimpleNamespace:
    return SimpleNamespace(
        distributed_type=kind, num_processes=num_processes, mixed_precision=precision, device="cpu", state=None
    )


def test_two_processes_that_train_alone(tmp_path, monkeypatch) -> None:
    args = arguments(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ArgumentError, match=r"started 2 processes.*use_cpu=True"):
        verify_what_runs(fake(DistributedType.NO, 1), args)
    verify_what_runs(fake(DistributedType.MULTI_CPU, 2), args)


def test_one_process_where_several_were_asked_for(tmp_path, monkeypatch) -> None:
    args = arguments(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    verify_what_runs(fake(DistributedType.NO, 1), args)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ArgumentError, match="MULTI_CPU"):
        verify_what_runs(fake(DistributedType.NO, 1), args)


@pytest.mark.parametrize(("flag", "word"), [("FSDP", "fsdp2"), ("DEEPSPEED", "zero2")])
def test_sharding_that_does_not_happen(tmp_path, monkeypatch, flag: str, word: str) -> None:
    args = arguments(tmp_path)
    monkeypatch.setenv(f"ACCELERATE_USE_{flag}", "true")
    with pytest.raises(ArgumentError, match=word):
        verify_what_runs(fake(DistributedType.MULTI_CPU, 2), args)
    monkeypatch.setenv("WORLD_SIZE", "2")
    verify_what_runs(fake(DistributedType[flag], 2), args)


def test_precision_that_is_not_what_was_asked_for(tmp_path) -> None:
    args = arguments(tmp_path, bf16=True)
    with pytest.raises(ArgumentError, match="'bf16'"):
        verify_what_runs(fake(DistributedType.NO, 1, "no"), args)
    verify_what_runs(fake(DistributedType.NO, 1, "bf16"), args)


def test_rules_of_sharded_runs(tmp_path) -> None:
    from finetune.distributed.accelerator import _check_sharding

    def sharded(stage=None, **fsdp):
        plugin = SimpleNamespace(**{"fsdp_version": 2, "activation_checkpointing": False, "state_dict_type": "FULL",
                                    **fsdp})  # fmt: skip
        deepspeed = None if stage is None else SimpleNamespace(zero_stage=stage)
        state = SimpleNamespace(deepspeed_plugin=deepspeed, fsdp_plugin=plugin if stage is None else None)
        return SimpleNamespace(state=state)

    base = {"activation_checkpointing": False, "save_only_model": False, "load_best_model_at_end": False,
            "auto_find_batch_size": False}  # fmt: skip
    for accelerator, change, match in (
        (sharded(activation_checkpointing=True), {"activation_checkpointing": True}, "twice"),
        (sharded(state_dict_type="StateDictType.SHARDED_STATE_DICT"), {"save_only_model": True}, "FULL_STATE_DICT"),
        (sharded(stage=2), {"save_only_model": True, "load_best_model_at_end": True}, "DeepSpeed"),
        (sharded(stage=3), {"auto_find_batch_size": True}, "ZeRO-3"),
    ):
        _check_sharding(accelerator, SimpleNamespace(**base))
        with pytest.raises(ArgumentError, match=match):
            _check_sharding(accelerator, SimpleNamespace(**{**base, **change}))


@pytest.mark.parametrize("version", [1, 2])
def test_fsdp_computes_in_bf16_and_adds_up_in_float32(version: int) -> None:
    from accelerate.utils import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(fsdp_version=version)
    plugin.set_mixed_precision("bf16")
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    _sum_in_float32(accelerator)
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
    if version == 1:
        assert policy.buffer_dtype == torch.float32
    else:
        assert policy.output_dtype is None, "the loss would be rounded to 3 digits"
    own = type(policy)(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    plugin.mixed_precision_policy = own
    _sum_in_float32(accelerator)
    assert plugin.mixed_precision_policy is own, "the user's own"
