"""FSDP and accelerate settings."""

import json

import pytest
import transformers
from transformers.trainer_pt_utils import AcceleratorConfig as TransformersConfig

from finetune.arguments import AcceleratorConfig, TrainingArguments
from finetune.errors import ArgumentError

FSDP = [
    {"fsdp": True},
    {"fsdp": "full_shard offload"},
    {"fsdp": ["shard_grad_op", "auto_wrap"]},
    {"fsdp": True, "fsdp_config": {"fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer", "fsdp_version": 2}},
    {"fsdp": True, "fsdp_config": {"cpu_offload": "true", "reshard_after_forward": "false", "min_num_params": 7}},
    {"fsdp": True, "fsdp_config": {"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 100}},
    {"fsdp": True, "fsdp_config": {"activation_checkpointing": True, "state_dict_type": "SHARDED_STATE_DICT"}},
    {"fsdp": "hybrid_shard", "fsdp_config": {"version": 1, "backward_prefetch": "backward_pre"}},
    {"fsdp": True, "fsdp_config": {"version": 1, "limit_all_gathers": True, "use_orig_params": "false"}},
    {"fsdp": None, "fsdp_config": {"version": 1}},
]


@pytest.mark.parametrize("given", FSDP)
def test_fsdp_is_resolved_as_in_transformers(given):
    ours = TrainingArguments("out", **given)
    theirs = transformers.TrainingArguments("out", **json.loads(json.dumps(given)))
    assert (ours.fsdp, ours.fsdp_config, ours.fsdp_plugin_args) == (
        theirs.fsdp,
        theirs.fsdp_config,
        theirs.fsdp_plugin_args,
    )


def test_fsdp_configuration_from_a_file(tmp_path):
    file = tmp_path / "fsdp.json"
    file.write_text('{"fsdp_version": 1}')
    assert TrainingArguments("out", fsdp=True, fsdp_config=str(file)).fsdp_plugin_args["fsdp_version"] == 1
    file.write_text("[1]")
    with pytest.raises(ArgumentError, match="must hold a JSON object"):
        TrainingArguments("out", fsdp=True, fsdp_config=str(file))


def test_accelerator_config_reads_every_form(tmp_path):
    file = tmp_path / "accelerator.json"
    file.write_text('{"split_batches": true}')
    for given in (
        {"split_batches": True},
        str(file),
        TransformersConfig(split_batches=True),
        '{"split_batches": true}',
    ):
        config = TrainingArguments("out", accelerator_config=given).accelerator_config
        assert isinstance(config, AcceleratorConfig)
        assert config.to_dict() == TransformersConfig(split_batches=True).to_dict()
    assert AcceleratorConfig.from_json_file(str(file)).split_batches is True


def test_configured_state_is_reused():
    from accelerate.state import PartialState

    state = PartialState(cpu=True)
    args = TrainingArguments("out", accelerator_config={"use_configured_state": True})
    assert args.distributed_state.__dict__ is state.__dict__


def test_a_parallelism_configuration_is_built_from_a_dict():
    args = TrainingArguments("out", parallelism_config='{"dp_replicate_size": 1}')
    assert type(args.parallelism_config).__name__ == "ParallelismConfig"


def test_deepspeed_is_registered_and_the_configuration_left_alone():
    pytest.importorskip("deepspeed")
    given = {
        "zero_optimization": {"stage": 2},
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
    }
    before = json.loads(json.dumps(given))
    args = TrainingArguments("out", deepspeed=given, use_cpu=True, per_device_train_batch_size=3)
    assert args.deepspeed_plugin.zero_stage == 2
    assert args.hf_deepspeed_config.config["train_micro_batch_size_per_gpu"] == 3
    assert args.deepspeed == given == before


def test_a_deepspeed_configuration_that_is_not_there(tmp_path):
    with pytest.raises(ArgumentError, match=r"`deepspeed='.*ds.json'`: there is no such file"):
        TrainingArguments("out", deepspeed=str(tmp_path / "ds.json"))


def test_deepspeed_that_is_not_installed(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ArgumentError, match="pip install deepspeed"):
        TrainingArguments("out", deepspeed={"zero_optimization": {"stage": 2}})
