"""Kills a training with SIGKILL at random places, during its saves too, until it ends: the end is always the same."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.checkpoint.manifest import find_problem

STEPS = 9  # two epochs of 18 rows by 4, the second one entered in the middle of a window


class Server:
    """Runs trainings in forks of one process that has imported everything."""

    def __init__(self, log: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("crash_server.py"))], text=True, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"),
        )  # fmt: skip

    def ask(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.log.read_text()[-3000:]
        return json.loads(line)

    def train(
        self, out: Path, result: Path, kill_at: int | None = None, after_seconds: float | None = None, **arguments: Any
    ) -> int:
        """Returns the exit code of one training: -9 when it was killed."""
        job = {"out": str(out), "result": str(result), "kill_at": kill_at, "arguments": arguments, "steps": STEPS}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        pid = self.ask()["pid"]
        timer = threading.Timer(after_seconds or 0.0, os.kill, (pid, signal.SIGKILL))
        if after_seconds is not None:
            timer.start()
        status = self.ask()["status"]
        timer.cancel()
        return status


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server") / "log")
    yield server
    assert server.process.stdin is not None
    server.process.stdin.close()
    server.process.wait(60)


@pytest.fixture(scope="module")
def expected(server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, int]:
    """The end of a run that nothing interrupted, and how often it touches a file."""
    folder = tmp_path_factory.mktemp("whole")
    assert server.train(folder / "run", folder / "end.pt") == 0, server.log.read_text()[-3000:]
    return torch.load(folder / "end.pt"), int((folder / "end.touches").read_text())


def crash_until_done(
    server: Server, folder: Path, seed: int, touches: int, kills: int, same: Any, expected: Any, **arguments: Any
) -> int:
    """Returns how often the run was killed before it ended as expected."""
    rng = random.Random(seed)
    out, result, killed = folder / "run", folder / "end.pt", 0
    for attempt in range(10 * kills):
        when = {"kill_at": rng.randrange(1, touches // 2)} if attempt % 3 else {"after_seconds": rng.uniform(0.3, 2)}
        status = server.train(out, result, **(when if killed < kills else {}), **arguments)
        assert status in (0, -signal.SIGKILL), server.log.read_text()[-3000:]
        there = sorted(out.glob("checkpoint-*"))
        assert all(find_problem(path) is None for path in there), "whatever has the name of a checkpoint is complete"
        if status == 0:
            break
        killed += 1
    assert same(torch.load(result), expected), f"after {killed} kills with seed {seed}"
    assert not (out / ".staging").exists() and len(list(out.glob("checkpoint-*"))) == 2
    return killed


@pytest.mark.parametrize("asynchronous", [pytest.param(False, marks=pytest.mark.slow), True])
def test_killed_a_few_times(server: Server, expected: Any, tmp_path: Path, same: Any, asynchronous: bool) -> None:
    killed = crash_until_done(
        server, tmp_path, 1, expected[1], kills=3, same=same, expected=expected[0], async_save=asynchronous
    )
    assert killed >= 2


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_killed_often(server: Server, expected: Any, tmp_path: Path, same: Any, seed: int, asynchronous: bool) -> None:
    killed = crash_until_done(
        server, tmp_path, 100 + seed, expected[1], kills=8, same=same, expected=expected[0], async_save=asynchronous
    )
    assert killed >= 3


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_killed_at_every_touch_of_a_file_during_one_save(
    server: Server, expected: Any, tmp_path: Path, same: Any, part: int
) -> None:
    """Every place of the second save, in eight parts: each leaves a run that ends as if nothing had happened."""
    per_save = expected[1] // STEPS
    for number in range(per_save + 4 + part, 2 * per_save + 8, 8):
        folder = tmp_path / str(number)
        status = server.train(folder / "run", folder / "end.pt", kill_at=number)
        assert status == -signal.SIGKILL, server.log.read_text()[-3000:]
        assert server.train(folder / "run", folder / "end.pt") == 0, server.log.read_text()[-3000:]
        assert same(torch.load(folder / "end.pt"), expected[0]), number
