"""Optimizer state that waits elsewhere between steps: same bits, same checkpoints."""

import copy

import pytest
import torch
from torch import nn

from finetune import TrainingArguments
from finetune.errors import ArgumentError
from finetune.optim.apollo import ApolloAdamW, ApolloSettings
from finetune.optim.galore import GaLoreSettings
from finetune.optim.galore_rules import GaLoreAdamW
from finetune.optim.state_offload import offload_state


class Parked(torch.Tensor):
    """Stands for host memory: an optimizer that got one of these would have read state that is not on its device."""


def park(tensor, device):
    return tensor.as_subclass(Parked)


def fetch(tensor, device):
    assert tensor.device == device
    return tensor.as_subclass(torch.Tensor)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.1)


def galore(model):
    groups = [{"params": list(model.parameters()), "weight_decay": 0.0}]
    return GaLoreAdamW(groups, lr=0.1, targets=[model.weight], settings=GaLoreSettings(rank=2, update_proj_gap=2))


def steps(model, optimizer, count):
    torch.manual_seed(1)
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
    return model.weight.detach().clone()


def kinds(optimizer):
    return {type(value) for state in optimizer.state.values() for value in state.values() if value.dim() > 0}


@pytest.mark.parametrize("make", [adamw, galore])
def test_same_bits_and_state_waits_elsewhere(make):
    torch.manual_seed(0)
    plain = nn.Linear(8, 6)
    moved = copy.deepcopy(plain)
    wanted = steps(plain, make(plain), 4)
    optimizer, seen = make(moved), []
    offload_state(optimizer, park=park, fetch=fetch)
    offload_state(optimizer)  # a second call does nothing, so it does not complain of the CPU either
    optimizer.register_step_pre_hook(lambda owner, *_: seen.append(kinds(owner)))
    assert torch.equal(steps(moved, optimizer, 4), wanted)
    # Everything was there when a step began, and nothing after it.
    assert seen == [set(), *[{torch.Tensor}] * 3] and kinds(optimizer) == {Parked}


def test_refusals():
    model = nn.Linear(2, 2)
    with pytest.raises(ArgumentError, match="on a CPU run moves nothing"):
        offload_state(adamw(model))
    with pytest.raises(ArgumentError, match=r"not object.*`offload_optimizer`"):
        offload_state(object())


def layerwise_galore(model):
    groups = [{"params": list(model.parameters()), "weight_decay": 0.0}]
    return GaLoreAdamW(groups, lr=0.1, targets=[model.weight], settings=GaLoreSettings(rank=2), in_backward=True)


def layerwise_apollo(model):
    groups = [{"params": list(model.parameters()), "weight_decay": 0.0}]
    return ApolloAdamW(groups, targets=[model.weight], settings=ApolloSettings(rank=2), in_backward=True)


@pytest.mark.parametrize("make", [layerwise_galore, layerwise_apollo])
def test_optimizers_that_work_inside_backward_are_refused(make):
    with pytest.raises(ArgumentError, match=r"while backward runs.*`offload_optimizer_state=False`.*`_layerwise`"):
        offload_state(make(nn.Linear(8, 6)), park=park, fetch=fetch)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_the_argument_is_refused_before_anything_loads(tmp_path):
    with pytest.raises(ArgumentError, match=r"`offload_optimizer_state=True`.*host memory"):
        TrainingArguments(str(tmp_path), offload_optimizer_state=True)


@pytest.mark.gpu
def test_on_a_gpu_state_is_pinned_host_memory():
    model = nn.Linear(64, 64, device="cuda")
    optimizer = adamw(model)
    offload_state(optimizer)
    model(torch.ones(1, 64, device="cuda")).sum().backward()
    optimizer.step()
    kept = [v for s in optimizer.state.values() for v in s.values() if v.dim() > 0]
    assert kept and all(v.device.type == "cpu" and v.is_pinned() for v in kept)
    optimizer.step()
