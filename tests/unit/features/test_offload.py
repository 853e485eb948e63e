"""Offloading moves what backward needs and nothing else, and gradients do not change by a bit."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from finetune.features.offload import offload_activations


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    )


def gradients(model) -> list[torch.Tensor]:
    model.zero_grad()
    ids = torch.arange(40).view(2, 20)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return [p.grad.clone() for p in model.parameters()]


def test_same_gradients(model) -> None:
    expected = gradients(copy.deepcopy(model))
    with offload_activations(model, min_bytes=1, device_types=("cpu",)) as moved:
        found = gradients(model)
    assert moved.tensors > 20 and moved.bytes > 2 * 20 * 32 * 4 * 10
    assert all(map(torch.equal, found, expected))


def test_parameters_small_tensors_and_other_devices_stay(model) -> None:
    weight = model.lm_head.weight
    x = torch.randn(4, 32, requires_grad=True)
    with offload_activations(model, min_bytes=1, device_types=("cpu",)) as moved:
        (x @ weight.T).sum()
    assert moved.tensors == 0
    with offload_activations(model, min_bytes=10**6, device_types=("cpu",)) as moved:
        gradients(model)
    assert moved.tensors == 0
    with offload_activations(model, min_bytes=1) as moved:
        gradients(model)
    assert moved.tensors == 0


def test_evaluation_and_code_outside_save_nothing(model) -> None:
    with offload_activations(model, min_bytes=1, device_types=("cpu",)) as moved:
        with torch.no_grad():
            model(input_ids=torch.arange(4)[None])
        assert moved.tensors == 0
    gradients(model)
    assert moved.tensors == 0
