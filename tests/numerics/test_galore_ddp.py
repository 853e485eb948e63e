"""GaLore under DistributedDataParallel: two processes take the steps of one process with the whole batch.

Run as a program, this file is one of the two processes.
"""

import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from finetune.optim.registry import build_optimizer


def arguments(optim, svd):
    return SimpleNamespace(
        optim=optim,
        optim_args=f"rank=4, update_proj_gap=2, scale=0.5, svd={svd}, stagger=true",
        optim_target_modules="all-linear",
        learning_rate=1e-2,
        weight_decay=0.1,
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=1e-6,
        seed=3,
        fp16=False,
    )


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 8))


def batches(steps=5, rows=32):
    g = torch.Generator().manual_seed(7)
    return [(torch.randn(rows, 8, generator=g), torch.randn(rows, 8, generator=g)) for _ in range(steps)]


def train(model, optimizer, data, accumulate, max_norm):
    for x, y in data:
        for xs, ys in zip(x.chunk(accumulate), y.chunk(accumulate), strict=True):
            ((model(xs) - ys).square().mean() / accumulate).backward()
        if max_norm:
            clip = optimizer.clip_grad_norm
            clip(max_norm) if clip else nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        model.zero_grad()


def worker(optim, svd, out):
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo")
    # Different weights on purpose: the first rank's must win, for the weights DDP ignores as well.
    model = net(seed=rank)
    optimizer = build_optimizer(arguments(optim, svd), model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    data = [(x.chunk(2)[rank], y.chunk(2)[rank]) for x, y in batches()]
    train(wrapped, optimizer, data, accumulate=1, max_norm=None)
    grads = [n for n, p in model.named_parameters() if p.grad is not None]
    torch.save({"weights": model.state_dict(), "grads": grads}, f"{out}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("optim", "svd"),
    [("galore_adamw", "randomized"), ("galore_adamw_layerwise", "randomized"), ("galore_adafactor_layerwise", "exact")],
)
def test_two_processes_equal_one(optim, svd, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, __file__, optim, svd, str(tmp_path)]
    ranks = [
        subprocess.Popen(
            command, env={**environment, "RANK": str(r)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for r in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], outputs

    model = net()
    optimizer = build_optimizer(arguments(optim, svd), model)
    train(model, optimizer, batches(), accumulate=1, max_norm=None)
    first, second = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2))
    for name, expected in model.state_dict().items():
        assert torch.equal(first["weights"][name], second["weights"][name]), name
        torch.testing.assert_close(first["weights"][name], expected, rtol=0, atol=2e-6)
    start = net().state_dict()
    assert all((first["weights"][n] - start[n]).abs().max() > 1e-3 for n in start)


if __name__ == "__main__":
    torch.set_num_threads(1)
    worker(*sys.argv[1:])
