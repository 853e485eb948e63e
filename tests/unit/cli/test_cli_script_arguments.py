"""Model and adapter flags: names and defaults of TRL, and the configurations they become."""

import dataclasses
from typing import Any

import pytest

from finetune.cli.script_arguments import (
    DatasetConfig,
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    get_peft_config,
    get_quantization_config,
    with_model_options,
)
from finetune.errors import ArgumentError


@pytest.mark.parametrize(
    ("cls", "names"),
    [
        (ModelConfig, ["ModelConfig"]),
        (DatasetMixtureConfig, ["DatasetMixtureConfig"]),
        (ScriptArguments, ["ScriptArguments"]),
    ],
)
def test_fields_and_defaults_are_those_of_trl(cls: type, names: list[str]) -> None:
    trl = pytest.importorskip("trl")
    theirs = {field.name: field.default for name in names for field in dataclasses.fields(getattr(trl, name))}
    assert {field.name: field.default for field in dataclasses.fields(cls)} == theirs


def test_one_data_set_of_a_mixture_has_trls_fields() -> None:
    pytest.importorskip("trl")
    from trl.scripts.utils import DatasetConfig as Theirs

    theirs = {field.name: field.default for field in dataclasses.fields(Theirs)}
    assert {field.name: field.default for field in dataclasses.fields(DatasetConfig)} == theirs


def test_adapter_flags_become_the_configuration_that_trl_makes() -> None:
    trl = pytest.importorskip("trl")
    flags = {
        "use_peft": True,
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "lora_target_modules": ["q_proj", "v_proj"],
        "lora_modules_to_save": ["lm_head"],
        "use_rslora": True,
    }
    ours, theirs = get_peft_config(ModelConfig(**flags)), trl.get_peft_config(trl.ModelConfig(**flags))
    assert ours is not None and ours.to_dict() == theirs.to_dict()
    assert get_peft_config(ModelConfig()) is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["all-linear"], "all-linear"),
        ([r".*\.(q|v)_proj"], r".*\.(q|v)_proj"),
        (["q_proj"], {"q_proj"}),
        (["self_attn.q_proj"], {"self_attn.q_proj"}),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        (r".*_proj", r".*_proj"),
        (None, None),
    ],
)
def test_names_of_layers_stay_names_and_patterns_become_texts(given: Any, expected: Any) -> None:
    from peft import LoraConfig

    args = ModelConfig(use_peft=True, lora_target_modules=given)
    config = get_peft_config(args)
    assert config is not None and config.target_modules == expected
    assert LoraConfig(target_modules=args.lora_target_modules).target_modules == expected


def test_one_name_on_the_command_line_adapts_the_layers_of_that_name(tiny_llama: Any) -> None:
    from peft import get_peft_model

    from finetune import parse_arguments

    (args,) = parse_arguments(ModelConfig, ["--use_peft", "--lora_target_modules", "q_proj"])
    config = get_peft_config(args)
    assert config is not None
    adapted = {
        name.split(".")[-4] for name, _ in get_peft_model(tiny_llama(), config).named_parameters() if "lora_" in name
    }
    assert adapted == {"q_proj"}


def test_quantization_flags_become_the_configuration_that_trl_makes() -> None:
    trl = pytest.importorskip("trl")
    flags = {"load_in_4bit": True, "use_bnb_nested_quant": True, "dtype": "bfloat16", "use_peft": True}
    ours = get_quantization_config(ModelConfig(**flags))
    assert ours is not None and ours.to_dict() == trl.get_quantization_config(trl.ModelConfig(**flags)).to_dict()
    eight = get_quantization_config(ModelConfig(load_in_8bit=True, use_peft=True))
    assert eight is not None and eight.load_in_8bit
    assert get_quantization_config(ModelConfig()) is None


@pytest.mark.parametrize(
    "flags",
    [
        {"load_in_4bit": True, "load_in_8bit": True, "use_peft": True},
        {"use_peft": True, "lora_r": 0},
    ],
)
def test_flags_that_contradict_each_other_are_errors(flags: dict) -> None:
    with pytest.raises(ArgumentError):
        ModelConfig(**flags)


def test_quantized_weights_without_a_flag_for_adapters_are_a_matter_of_the_programs() -> None:
    """A script of one's own may bring a `LoraConfig` of its own."""
    config = get_quantization_config(ModelConfig(load_in_4bit=True))
    assert config is not None and config.load_in_4bit


def test_model_options_are_added_to_a_copy() -> None:
    @dataclasses.dataclass
    class Arguments:
        model_init_kwargs: dict | None = None

    args = Arguments({"dtype": "bfloat16", "low_cpu_mem_usage": True})
    changed = with_model_options(args, ModelConfig(attn_implementation="eager"))
    assert args.model_init_kwargs == {"dtype": "bfloat16", "low_cpu_mem_usage": True}
    assert changed.model_init_kwargs == {
        "dtype": "bfloat16",
        "low_cpu_mem_usage": True,
        "attn_implementation": "eager",
        "revision": "main",
    }
