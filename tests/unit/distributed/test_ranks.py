"""Ranks without a process group, and turn-taking between two real processes."""

import subprocess
import sys
import textwrap

import pytest

from finetune.distributed import ranks

PROGRAM = textwrap.dedent(
    """
    import os, sys, time
    import torch.distributed as dist
    from finetune.distributed import ranks

    rank, folder = int(sys.argv[1]), sys.argv[2]
    os.environ.update(LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    assert (ranks.world_size(), ranks.process_index(), ranks.local_process_index()) == (2, rank, rank)
    assert ranks.is_world_process_zero() is (rank == 0)
    log = open(f"{folder}/log", "a", buffering=1)
    with ranks.main_process_first(local=False):
        if rank == 0:
            time.sleep(0.5)
        print(f"prepared by {rank}", file=log)
    assert ranks.broadcast_object({"from": rank}) == {"from": 0}
    try:
        with ranks.main_process_first():
            if rank == 0:
                raise KeyError("broken")
    except KeyError:
        print("raised on 0", file=log)
    # Gloo's thread may still be at work when the interpreter ends, and then it aborts.
    dist.destroy_process_group()
    """
)


def test_alone() -> None:
    assert (ranks.world_size(), ranks.process_index(), ranks.local_process_index()) == (1, 0, 0)
    assert ranks.is_world_process_zero() and ranks.is_local_process_zero()
    with ranks.main_process_first():
        ranks.wait_for_everyone()
    assert ranks.broadcast_object("x") == "x"


def test_launched_world_size(monkeypatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert ranks.launched_world_size() == 1
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert ranks.launched_world_size() == 4


def test_the_first_process_goes_first_and_an_exception_frees_the_others(tmp_path) -> None:
    command = [sys.executable, "-c", PROGRAM]
    started = [subprocess.Popen([*command, str(rank), str(tmp_path)]) for rank in (0, 1)]
    try:
        assert [process.wait(timeout=60) for process in started] == [0, 0]
    except subprocess.TimeoutExpired:
        pytest.fail("a process waits for ever")
    finally:
        for process in started:
            process.kill()
    assert (tmp_path / "log").read_text().splitlines() == ["prepared by 0", "prepared by 1", "raised on 0"]
