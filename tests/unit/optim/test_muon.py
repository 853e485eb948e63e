import pytest
import torch
from torch import nn

from finetune.errors import ArgumentError
from finetune.optim.groups import parameter_groups
from finetune.optim.muon import MuonAdamW, muon_parameters


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.mid = nn.Linear(8, 8)
        self.out = nn.Linear(8, 10, bias=False)
        self.out.weight = self.embed.weight


def test_only_hidden_matrices_go_to_muon():
    model = Tied()
    assert muon_parameters(model) == [model.mid.weight]


def test_halves_equal_the_torch_optimizers():
    torch.manual_seed(0)
    a, b = nn.Linear(8, 8), nn.Linear(8, 8)
    b.load_state_dict(a.state_dict())
    ours = MuonAdamW(parameter_groups(a, 0.1), 0.01, muon_params=[a.weight])
    muon = torch.optim.Muon([b.weight], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW([b.bias], lr=0.01, weight_decay=0.0)
    for _ in range(4):
        for model in (a, b):
            model.zero_grad()
            model(torch.ones(2, 8)).square().sum().backward()
        ours.step(), muon.step(), adam.step()
    assert torch.equal(a.weight, b.weight)
    assert torch.equal(a.bias, b.bias)


def test_the_schedule_reaches_both_halves():
    model = nn.Linear(8, 8)
    ours = MuonAdamW(parameter_groups(model, 0.1), 0.01, muon_params=[model.weight])
    before = [p.detach().clone() for p in model.parameters()]
    torch.optim.lr_scheduler.LambdaLR(ours, lambda step: 0.0)
    model(torch.ones(2, 8)).sum().backward()
    ours.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_model_without_hidden_matrices_is_refused():
    model = nn.LayerNorm(4)
    with pytest.raises(ArgumentError, match="adamw_torch"):
        MuonAdamW(parameter_groups(model, 0.1), 0.01, muon_params=[])


def test_a_group_that_nobody_would_step_is_refused():
    model = nn.Linear(4, 4)
    optimizer = MuonAdamW(parameter_groups(model, 0.1), 0.01, muon_params=[model.weight])
    with pytest.raises(ArgumentError, match="takes no parameter groups"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
