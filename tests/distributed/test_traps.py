"""Launches that would exit with code 0 without doing what was asked: each is an error that names its remedy.

Without these checks processes train alone and save over each other, or a model that should be sharded is not.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "accelerate_configs"


def launch(config: Path, out: Path, **arguments: object) -> str:
    """Runs a training of one step and returns its error output; fails if it succeeds."""
    given = {"max_steps": 1, "report_to": "none", "disable_tqdm": True, **arguments}
    options = json.dumps({"model": "llama", "rows": 8, "arguments": given})
    flags = ["--config_file", str(config), "--num_processes", "2", "--main_process_port", "0"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, "--mixed_precision", "no"]
    done = subprocess.run(
        [*command, str(HERE / "run_trainer.py"), str(out), options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0, "it trained"
    assert not (out / "report.json").exists()
    return done.stderr


def test_a_gpu_configuration_on_a_machine_without_one(tmp_path: Path) -> None:
    """Each of the two processes would be a run of its own."""
    error = launch(CONFIGS / "ddp.yaml", tmp_path)
    assert "ArgumentError" in error and "each would train alone" in error and "`use_cpu=True`" in error


def test_fsdp_that_would_be_ddp(tmp_path: Path) -> None:
    error = launch(CONFIGS / "fsdp2.yaml", tmp_path, use_cpu=True)
    assert "asks for FSDP, but accelerate runs MULTI_CPU" in error and "nothing would be sharded" in error


def test_a_launcher_that_starts_one_process_for_two(tmp_path: Path) -> None:
    config = tmp_path / "cpu.yaml"
    text = (CONFIGS / "cpu.yaml").read_text()
    config.write_text(text.replace("distributed_type: MULTI_GPU", "distributed_type: MULTI_CPU"))
    assert config.read_text() != text
    error = launch(config, tmp_path, use_cpu=True)
    assert "was asked for several processes and started one" in error and "accelerate_configs/ddp.yaml" in error


@pytest.mark.slow
def test_zero_without_gpus_and_without_gloo(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    error = launch(CONFIGS / "zero2.yaml", tmp_path)
    assert "ArgumentError" in error and "ddp_backend" in error
