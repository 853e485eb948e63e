"""PEFT wrapping: what becomes trainable, in which dtype, and what of the caller's objects stays untouched."""

import copy
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from finetune.errors import ArgumentError
from finetune.models.adapters import (
    add_adapters,
    cast_given_adapters,
    prepare_quantized,
    reentrant_checkpointing_kwargs,
    unwrap,
)
from finetune.wrappers import is_peft_model


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


def lora(**kwargs) -> LoraConfig:
    return LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], **kwargs)


def test_only_adapters_train_and_the_config_is_not_touched(model) -> None:
    config = lora()
    before = copy.deepcopy(config.to_dict())
    wrapped = add_adapters(model, config, added_token_ids=[30, 31])
    trainable = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert config.to_dict() == before
    assert any("lora_A" in name for name in trainable)
    assert any("trainable_tokens_delta" in name for name in trainable)
    assert any("lm_head" in name for name in trainable)
    assert not any("base_layer.weight" in name for name in trainable)


def test_plain_wrapping_equals_peft(model) -> None:
    reference = copy.deepcopy(model)
    torch.manual_seed(1)
    ours = add_adapters(model, lora())
    torch.manual_seed(1)
    theirs = get_peft_model(reference, lora())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_adapter_dtype_follows_the_base_under_zero3(model) -> None:
    half = copy.deepcopy(model).to(torch.bfloat16)
    upcast = {p.dtype for n, p in add_adapters(half, lora()).named_parameters() if "lora" in n}
    kept = add_adapters(model.to(torch.bfloat16), lora(), zero_stage=3)
    assert upcast == {torch.float32}
    assert {p.dtype for n, p in kept.named_parameters() if "lora" in n} == {torch.bfloat16}


def test_checkpointed_frozen_blocks_pass_gradients(model) -> None:
    wrapped = add_adapters(model, lora(), activation_checkpointing=True)
    embedded = unwrap(wrapped).get_input_embeddings()(torch.tensor([[1]]))
    assert embedded.requires_grad


def test_quantized_adapters_are_cast(model) -> None:
    model.is_loaded_in_4bit = True
    wrapped = add_adapters(model, lora(use_dora=True), adapter_dtype=torch.bfloat16)
    dtypes = {n.split(".")[-3]: p.dtype for n, p in wrapped.named_parameters() if p.requires_grad}
    assert dtypes["lora_A"] == torch.bfloat16 or torch.bfloat16 in dtypes.values()
    magnitudes = [p.dtype for n, p in wrapped.named_parameters() if "magnitude" in n]
    assert magnitudes and all(dtype == torch.float32 for dtype in magnitudes)


def test_prepare_quantized_leaves_others_alone(model) -> None:
    assert prepare_quantized(model, activation_checkpointing=True) is model
    assert all(p.requires_grad for p in model.parameters())


def test_a_quantized_base_is_frozen_in_the_dtype_it_has(model) -> None:
    half = model.to(torch.bfloat16)
    half.is_loaded_in_4bit = True
    assert prepare_quantized(half, activation_checkpointing=True) is half
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in half.parameters())
    assert half.get_input_embeddings()(torch.tensor([[1]])).requires_grad


def test_adapters_that_a_quantized_model_came_with_are_cast_as_new_ones(model) -> None:
    wrapped = get_peft_model(model, lora(use_dora=True))
    for parameter in wrapped.parameters():
        parameter.data = parameter.data.to(torch.float64)
    cast_given_adapters(wrapped)
    assert {parameter.dtype for parameter in wrapped.parameters()} == {torch.float64}  # its base is not quantized
    model.is_loaded_in_4bit = True
    assert prepare_quantized(wrapped) is wrapped and any(parameter.requires_grad for parameter in wrapped.parameters())
    cast_given_adapters(wrapped)
    dtypes = {name: parameter.dtype for name, parameter in wrapped.named_parameters()}
    assert {dtypes[name] for name in dtypes if "lora_A" in name or "lora_B" in name} == {torch.float32}
    kept = {dtypes[name] for name in dtypes if "magnitude" in name or "lora" not in name}
    assert kept == {torch.float64}


def test_wrong_arguments(model) -> None:
    with pytest.raises(ArgumentError, match="PeftConfig"):
        add_adapters(model, {"r": 2})  # pyright: ignore[reportArgumentType]
    wrapped = add_adapters(model, lora())
    with pytest.raises(ArgumentError, match="already carries"):
        add_adapters(wrapped, lora())


def test_unwrap_sees_through_every_wrapper(model) -> None:
    class HasModule(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.module = inner

    peft_model = get_peft_model(model, lora())
    assert unwrap(nn.DataParallel(torch.compile(peft_model, backend="eager"))) is model
    assert unwrap(nn.DataParallel(peft_model), keep_adapters=True) is peft_model
    assert unwrap(torch.compile(model, backend="eager"), keep_adapters=True) is model
    sharded = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # without a process group
    nn.Module.__init__(sharded)
    sharded._modules["_fsdp_wrapped_module"] = peft_model
    assert unwrap(sharded) is model and unwrap(sharded, keep_adapters=True) is peft_model
    users = HasModule(model)
    assert unwrap(users) is users


def test_prompt_tuning_is_recognised(model) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    wrapped = add_adapters(model, config)
    assert is_peft_model(wrapped) and unwrap(wrapped) is model


def test_recognition_does_not_import_peft() -> None:
    code = (
        "import sys, torch; from finetune.wrappers import is_peft_model;"
        "assert not is_peft_model(torch.nn.Linear(1, 1)); assert 'peft' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_zero3_with_adapters_is_reentrant(model) -> None:
    assert reentrant_checkpointing_kwargs(model, None, 3) == {}
    wrapped = add_adapters(model, lora())
    given = {"every_n_layers": 2}
    assert reentrant_checkpointing_kwargs(wrapped, given, 3) == {"every_n_layers": 2, "use_reentrant": True}
    assert given == {"every_n_layers": 2}
    assert reentrant_checkpointing_kwargs(wrapped, None, 2) == {}
    with pytest.raises(ArgumentError, match="use_reentrant"):
        reentrant_checkpointing_kwargs(wrapped, {"use_reentrant": False}, 3)
    with pytest.raises(ArgumentError, match="selective"):
        reentrant_checkpointing_kwargs(wrapped, {"selective": True}, 3)
    assert reentrant_checkpointing_kwargs(wrapped, {"selective": False}, 3) == {"use_reentrant": True}


def test_four_bit_weights_with_adapters_train(tmp_path, model) -> None:
    """The QLoRA recipe end to end on CPU: load in NF4, prepare, wrap, one step, and only adapters moved."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    from finetune.kernels.fused_head import fuse_head
    from finetune.models.load import load_model
    from finetune.models.traits import check_trainable

    model.save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    loaded = load_model(tmp_path, quantization_config=quantization)
    with pytest.raises(ArgumentError, match="quantized and has no adapters"):
        check_trainable(loaded)
    wrapped = add_adapters(
        prepare_quantized(loaded, activation_checkpointing=True), lora(), activation_checkpointing=True
    )
    check_trainable(wrapped)
    trainable = {n: p.detach().clone() for n, p in wrapped.named_parameters() if p.requires_grad}
    assert trainable and all("lora" in name for name in trainable)
    ids = torch.arange(12).view(2, 6)
    with fuse_head(wrapped):
        wrapped(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=1.0).step()
    moved = [n for n, p in wrapped.named_parameters() if n in trainable and not torch.equal(p, trainable[n])]
    assert moved and all("lora_B" in name for name in moved)


@pytest.mark.parametrize("targets", [["nope"], "nope"])
def test_targets_that_match_no_layer_are_named(model, targets) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=targets)
    message = r"`target_modules` .*nope.* matches no layer of LlamaForCausalLM\. Its linear layers are .*q_proj"
    with pytest.raises(ArgumentError, match=message):
        add_adapters(model, config)


def test_a_misspelt_target_names_the_nearest(model) -> None:
    with pytest.raises(ArgumentError, match="Did you mean `q_proj`"):
        add_adapters(model, LoraConfig(target_modules=["q_prj"]))


def test_an_architecture_without_default_targets_needs_them(model, monkeypatch) -> None:
    monkeypatch.setattr(LlamaConfig, "model_type", "mine")
    with pytest.raises(ArgumentError, match="`target_modules` is not set, and PEFT has no default for Llama"):
        add_adapters(model, LoraConfig())
