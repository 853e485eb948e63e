"""Wrappers of models and optimizers are looked through by what they are."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from finetune.wrappers import clips_its_own_gradients, is_peft_model, unwrap_optimizer, unwrap_peft


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4))


@pytest.mark.parametrize("mixed", [False, True])
def test_peft_is_looked_through(model: nn.Module, mixed: bool) -> None:
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["0"]), mixed=mixed)  # type: ignore[arg-type]
    assert is_peft_model(wrapped) and not is_peft_model(model)
    assert unwrap_peft(wrapped) is model and unwrap_peft(model) is model
    assert unwrap_peft(torch.compile(wrapped, backend="eager")) is model
    fsdp1 = nn.Module()  # which needs a process group; this is where it keeps what it wraps
    fsdp1.add_module("_fsdp_wrapped_module", wrapped)
    assert unwrap_peft(fsdp1) is model


def test_other_models_are_left_alone() -> None:
    class HasMethod(nn.Linear):
        def get_base_model(self) -> None: ...

    users = HasMethod(2, 2)
    assert unwrap_peft(users) is users
    compiled = torch.compile(users, backend="eager")
    assert unwrap_peft(compiled) is compiled


def test_optimizers(model: nn.Module) -> None:
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    twice = SimpleNamespace(optimizer=SimpleNamespace(optimizer=plain))
    assert unwrap_optimizer(plain) is plain and unwrap_optimizer(twice) is plain
    assert not clips_its_own_gradients(twice)
    assert clips_its_own_gradients(SimpleNamespace(optimizer=SimpleNamespace(clip_grad_norm=lambda max_norm: max_norm)))
