"""A prepared model that is not shared out as was asked is refused."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from finetune.distributed.verify import verify_prepared
from finetune.errors import ArgumentError


def running(processes: int = 2, *, stage: int | None = None, fsdp: int | None = None) -> Any:
    deepspeed = None if stage is None else SimpleNamespace(zero_stage=stage)
    plugin = None if fsdp is None else SimpleNamespace(fsdp_version=fsdp)
    return SimpleNamespace(
        num_processes=processes, state=SimpleNamespace(deepspeed_plugin=deepspeed, fsdp_plugin=plugin)
    )


@pytest.fixture
def group() -> Any:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_processes_that_exchange_nothing(group: None) -> None:
    model = nn.Linear(2, 2)
    verify_prepared(running(1), model)
    with pytest.raises(ArgumentError, match="each process would train alone"):
        verify_prepared(running(2), model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    verify_prepared(running(2), wrapped)
    verify_prepared(running(2), torch.compile(wrapped, backend="eager"))
    model._tp_size = 2  # pyright: ignore[reportArgumentType]
    verify_prepared(running(2), model)


def test_a_zero_stage_that_is_not_the_one_asked_for() -> None:
    engine = SimpleNamespace(zero_optimization_stage=lambda: 2)
    verify_prepared(running(stage=2), engine)
    for model in (engine, nn.Linear(2, 2)):
        with pytest.raises(ArgumentError, match="ZeRO stage 3 was asked for"):
            verify_prepared(running(stage=3), model)


def test_fsdp_that_shards_nothing(group: None) -> None:
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(2, 2))
    for version in (1, 2):
        with pytest.raises(ArgumentError, match=f"FSDP{version} was asked for"):
            verify_prepared(running(fsdp=version), model)
    fully_shard(model[0], mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    verify_prepared(running(fsdp=2), model)
