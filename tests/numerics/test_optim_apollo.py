"""APOLLO: the update rule against a plain transcription of the paper, resume, and the layerwise form."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from finetune.errors import ArgumentError
from finetune.optim.fused_backward import release_optimizer
from finetune.optim.registry import build_optimizer


def arguments(optim="apollo_adamw", optim_args="rank=4, update_proj_gap=3, scale=4", **changes):
    values = {
        "optim": optim,
        "optim_args": optim_args,
        "optim_target_modules": "all-linear",
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-7,
        "seed": 3,
        "fp16": False,
        "gradient_accumulation_steps": 1,
        "max_grad_norm": 0.0,
    }
    return SimpleNamespace(**{**values, **changes})


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 8))


def batches(steps):
    g = torch.Generator().manual_seed(7)
    teacher = torch.randn(8, 8, generator=g)
    for _ in range(steps):
        x = torch.randn(16, 8, generator=g)
        yield x, torch.tanh(x @ teacher)


def train(model, optimizer, data):
    losses = []
    for x, y in data:
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        model.zero_grad()
        losses.append(loss.item())
    return losses


# Which dimension each kind of projection takes away: (of a wide gradient, of a tall or square one).
SIDES = {"std": (0, 1), "reverse_std": (1, 0), "left": (0, 0), "right": (1, 1)}


@pytest.mark.parametrize("proj_type", SIDES)
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (6, 6)])
def test_the_update_rule(shape, scale_type, rank, proj_type):
    """Against the formulas of the paper in float64; the noise itself is drawn in float32."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    holder = nn.Linear(shape[1], shape[0], bias=False)
    holder.weight = p
    optim_args = f"rank={rank}, scale=4, scale_type={scale_type}, proj_type={proj_type}"
    optimizer = build_optimizer(arguments(optim_args=optim_args), holder)
    w, m, v, last = p.detach().clone(), 0.0, 0.0, None
    generator = torch.Generator().manual_seed(3 * 1_000_003 * 1_000_003)
    gone = SIDES[proj_type][int(shape[0] >= shape[1])]
    noise = torch.randn((shape[0], rank) if gone == 0 else (rank, shape[1]), generator=generator)
    noise = (noise / math.sqrt(rank)).double()
    for t in range(1, 5):
        gradient = torch.randn(shape, dtype=torch.float64) * 3**t
        p.grad = gradient.clone()
        optimizer.step()
        low = noise.T @ gradient if gone == 0 else gradient @ noise.T
        m, v = 0.8 * m + 0.2 * low, 0.95 * v + 0.05 * low**2
        adam = m / (v.sqrt() + 1e-7)
        if scale_type == "channel":
            factor = adam.norm(dim=gone, keepdim=True) / (low.norm(dim=gone, keepdim=True) + 1e-8)
        else:
            factor = adam.norm() / (low.norm() + 1e-8)
        update = gradient * factor
        if last is not None and update.norm() > 1.01 * last:
            update = update * 1.01 * last / update.norm()
        last = update.norm()
        w = w - 1e-2 * math.sqrt(1 - 0.95**t) / (1 - 0.8**t) * update * 2.0
        w = w * (1 - 1e-2 * 0.1)
        torch.testing.assert_close(p.detach(), w, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["apollo_adamw", "apollo_adamw_layerwise"])
def test_resumes_to_the_last_bit_from_tensors_only(name, tmp_path):
    def start():
        model = net()
        return model, build_optimizer(arguments(name), model)

    data = list(batches(9))
    model, optimizer = start()
    train(model, optimizer, data[:5])
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    losses = train(model, optimizer, data[5:])
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    model, optimizer = start()
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert train(model, optimizer, data[5:]) == losses


def test_layerwise_equals_the_ordinary_run():
    runs = []
    for name in ("apollo_adamw", "apollo_adamw_layerwise"):
        model = net()
        optimizer = build_optimizer(arguments(name), model)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        for batch in batches(6):
            train(model, optimizer, [batch])
            schedule.step()
        release_optimizer(optimizer)
        runs.append(list(model.parameters()))
        model(torch.ones(2, 8)).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_converges():
    model = net()
    losses = train(model, build_optimizer(arguments(weight_decay=0.0), model), batches(200))
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10])


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"max_grad_norm": 1.0}, "`max_grad_norm=0`"),
        ({"gradient_accumulation_steps": 2}, "`gradient_accumulation_steps=1`"),
        ({"fp16": True}, "`fp16=False`"),
        ({"nonfinite_policy": "skip_step"}, "`nonfinite_policy='raise'`"),
    ],
)
def test_layerwise_refuses_what_it_cannot_do(changes, word):
    with pytest.raises(ArgumentError) as error:
        build_optimizer(arguments("apollo_adamw_layerwise", **changes), net())
    assert word in str(error.value)
    assert "`optim=apollo_adamw`" in str(error.value)
