"""Starts a script in one process or in several, as a user would, and waits for its end. For tests."""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "accelerate_configs"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Returns a folder that `make` has filled, in the first of the parallel test processes that asks for it."""
    base = factory.getbasetemp()
    out = (base.parent if base.name.startswith("popen-") else base) / name
    done = out / "done"
    with FileLock(f"{out}.lock"):
        if not done.exists():
            make(out)
            done.touch()
    return out


def run(
    script: Path,
    *arguments: object,
    processes: int = 1,
    machines: int = 1,
    config: str | Path | None = None,
    flags: dict[str, object] | None = None,
    environment: dict[str, str] | None = None,
    timeout: float = 400,
) -> str:
    """Runs `script` and returns what it printed.

    Args:
        arguments: the words after the script's name.
        processes: of all machines together.
        machines: of which this one plays all, each with a launcher of its own.
        config: of `accelerate launch`: the name of one in `accelerate_configs/`, or a file. None starts one process
            with `python` and several with `torch.distributed.run`.
        flags: further ones for `accelerate launch`.

    Raises:
        RuntimeError: an exit code other than 0, or the time is up; with the end of what was printed.
    """
    program = [str(script), *map(str, arguments)]
    if config is not None:
        path = CONFIGS / f"{config}.yaml" if isinstance(config, str) else config
        given = {"config_file": path, "num_processes": processes, "main_process_port": free_port(), **(flags or {})}
        if machines > 1:
            given |= {"num_machines": machines, "main_process_ip": "127.0.0.1"}
        words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        launcher = ["-m", "accelerate.commands.launch", *words]
    elif processes > 1:
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={free_port()}"]
    else:
        launcher = []
    ranks = [["--machine_rank", str(rank)] for rank in range(machines)] if machines > 1 else [[]]
    return _finish([[sys.executable, *launcher, *rank, *program] for rank in ranks], environment or {}, timeout)


def _finish(commands: list[list[str]], environment: dict[str, str], timeout: float) -> str:
    defaults = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    options: dict[str, Any] = {"env": {**os.environ, **defaults, **environment}, "start_new_session": True}
    end = time.monotonic() + timeout
    with tempfile.TemporaryFile("w+") as errors:
        started = [subprocess.Popen(command, stdout=errors, stderr=errors, **options) for command in commands]
        try:
            while any(process.poll() is None for process in started) and time.monotonic() < end:
                if any(process.returncode for process in started):
                    break
                time.sleep(0.1)
        finally:
            for process in started:
                if process.poll() is None:
                    # The launcher alone would leave its processes behind.
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        errors.seek(0)
        text = errors.read()
    codes = [process.returncode for process in started]
    if any(codes):
        lines = [line for line in text.splitlines() if not re.search(r"(it|examples)/s\]", line)]
        # Whoever fails first takes the others down, who say only that their peer is gone.
        told = ["\n".join(line for line in lines if ("[rank1]" in line) == second)[-6000:] for second in (False, True)]
        raise RuntimeError(f"exit codes {codes} within {timeout} s\n" + "\n".join(told))
    return text
