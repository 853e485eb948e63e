"""Ranks without a process group, and between two real processes."""

import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch

from finetune.distributed import ranks

PROGRAM = textwrap.dedent(
    """
    import sys
    import torch
    import torch.distributed as dist
    from finetune.distributed import ranks

    rank, folder = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    assert (ranks.world_size(), ranks.process_index()) == (2, rank)
    assert ranks.is_world_process_zero() is (rank == 0)
    assert ranks.broadcast_object({"from": rank}) == {"from": 0}
    assert ranks.highest(torch.tensor([rank, -rank])).tolist() == [1, 0]
    ranks.store().set(f"said/{rank}", "yes")
    assert ranks.store().get(f"said/{1 - rank}") == b"yes"
    dist.barrier()
    # Gloo's thread may still be at work when the interpreter ends, and then it aborts.
    dist.destroy_process_group()
    """
)


def test_alone() -> None:
    assert (ranks.world_size(), ranks.process_index()) == (1, 0)
    assert ranks.is_world_process_zero()
    assert ranks.broadcast_object("x") == "x"


def test_sums() -> None:
    alone = SimpleNamespace(num_processes=1)
    value = torch.ones(2)
    assert ranks.sum_over_processes(value, alone) is value
    four = SimpleNamespace(num_processes=4, reduce=lambda tensor, reduction: {"sum": tensor * 4}[reduction])
    assert ranks.sum_over_processes(value, four).tolist() == [4, 4]
    assert ranks.sum_dtype(torch.device("mps")) == torch.float32
    assert ranks.sum_dtype(torch.device("cpu")) == torch.float64


def test_two_processes_know_each_other(tmp_path) -> None:
    command = [sys.executable, "-c", PROGRAM]
    started = [subprocess.Popen([*command, str(rank), str(tmp_path)]) for rank in (0, 1)]
    try:
        assert [process.wait(timeout=60) for process in started] == [0, 0]
    except subprocess.TimeoutExpired:
        pytest.fail("a process waits for ever")
    finally:
        for process in started:
            process.kill()
