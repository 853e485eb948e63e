import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from finetune.checkpoint.preemption import PREEMPTED_EXIT_CODE, Preempted, PreemptionGuard


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_first_signal_sets_the_flag(name: str) -> None:
    before = signal.getsignal(getattr(signal, name))
    with PreemptionGuard() as guard:
        assert not guard.requested()
        os.kill(os.getpid(), getattr(signal, name))
        assert guard.requested() and guard.received == getattr(signal, name)
    assert signal.getsignal(getattr(signal, name)) is before


def test_handlers_come_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError), PreemptionGuard():
        raise ValueError
    assert signal.getsignal(signal.SIGTERM) is before


def test_outside_the_main_thread_it_says_so(caplog: pytest.LogCaptureFixture) -> None:
    def run() -> None:
        with PreemptionGuard() as guard:
            assert not guard.requested()

    thread = threading.Thread(target=run)
    thread.start(), thread.join()
    assert "main thread" in caplog.text


def test_any_process_stops_all() -> None:
    def accelerator(others: int) -> SimpleNamespace:
        return SimpleNamespace(
            num_processes=2, device=torch.device("cpu"), reduce=lambda flag, reduction: flag + others
        )

    guard = PreemptionGuard()
    assert not guard.requested(accelerator(0)) and guard.requested(accelerator(1))
    guard.received = 15
    assert guard.requested(accelerator(0))


SCRIPT = """
import os, signal, sys, time
from finetune.checkpoint.preemption import Preempted, PreemptionGuard
with PreemptionGuard() as guard:
    print("ready", flush=True)
    while not guard.requested():
        time.sleep(0.01)
    print("saving", flush=True)
    if sys.argv[1] == "twice":
        time.sleep(30)
raise Preempted
"""


@pytest.mark.parametrize(("mode", "code"), [("once", PREEMPTED_EXIT_CODE), ("twice", 128 + signal.SIGTERM)])
def test_exit_codes(mode: str, code: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, mode], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == b"ready\n"
    process.terminate()
    assert process.stdout.readline() == b"saving\n"
    if mode == "twice":
        process.terminate()
    assert process.wait(20) == code
    process.stdout.close(), process.stderr.close()
    assert Preempted().code == 75
