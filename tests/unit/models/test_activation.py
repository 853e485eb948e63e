"""Activation checkpointing and `use_cache` leave the model as they found it."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from finetune.errors import ArgumentError
from finetune.models.activation import activation_checkpointing, use_cache


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2
    )
    return LlamaForCausalLM(config).train()


def state(model: nn.Module) -> list:
    return [
        (sorted(module.__dict__), len(module._forward_hooks), getattr(module, "gradient_checkpointing", None))
        for module in model.modules()
    ]


def recomputes(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def gradients(model: nn.Module) -> list[torch.Tensor]:
    model.zero_grad()
    ids = torch.arange(12).view(2, 6)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("wrap", [False, True])
def test_same_gradients_inside_and_no_trace_outside(model, wrap: bool) -> None:
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])) if wrap else model
    before, expected = state(model), gradients(model)
    with activation_checkpointing(model):
        assert recomputes(model)
        inside = gradients(model)
    assert state(model) == before and not recomputes(model)
    assert len(inside) == len(expected) and all(map(torch.equal, inside, expected))


def test_an_exception_restores(model) -> None:
    before = state(model)
    with pytest.raises(KeyError), activation_checkpointing(model, kwargs={"use_reentrant": False}):
        raise KeyError
    assert state(model) == before


def test_placement_arguments_reach_the_model(model) -> None:
    with activation_checkpointing(model, kwargs={"every_n_layers": 2}):
        flags = [layer.gradient_checkpointing for layer in model.model.layers]
    assert flags == [True, False, True, False]


def test_the_users_own_setting_survives(model) -> None:
    model.gradient_checkpointing_enable()
    before = state(model)
    with activation_checkpointing(model, enabled=False):
        assert recomputes(model)
    with activation_checkpointing(model, kwargs={"every_n_layers": 2}):
        pass
    assert state(model) == before and recomputes(model)


def test_unsupported_models_are_told() -> None:
    with pytest.raises(ArgumentError, match="activation_checkpointing"), activation_checkpointing(nn.Linear(2, 2)):
        pass


def test_use_cache_returns(model) -> None:
    model.config.use_cache = True
    with use_cache(model, False):
        assert model.config.use_cache is False
    assert model.config.use_cache is True
    with use_cache(nn.Linear(1, 1), False):
        pass


class Counted(TorchDispatchMode):
    """Counts how often an operator of attention runs."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.calls += "_scaled_dot_product" in name and "backward" not in name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("kwargs", "runs"),
    [
        (None, 2),
        ({"selective": False}, 2),
        ({"selective": True}, 1),
        ({"selective": True, "use_reentrant": False, "every_n_layers": 1}, 1),
    ],
    ids=str,
)
def test_selective_keeps_what_attention_returned(model, kwargs: Any, runs: int) -> None:
    before, expected, given = state(model), gradients(model), copy.deepcopy(kwargs)
    with activation_checkpointing(model, kwargs=kwargs), Counted() as counted:
        inside = gradients(model)
    assert counted.calls == runs * model.config.num_hidden_layers
    assert len(inside) == len(expected) and all(map(torch.equal, inside, expected))
    assert state(model) == before and kwargs == given


@pytest.mark.parametrize("other", [{"use_reentrant": True}, {"context_fn": list}], ids=str)
def test_selective_with_what_it_excludes(model, other: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=r"`selective`.*exclude each other"):
        with activation_checkpointing(model, kwargs={"selective": True, **other}):
            pass
