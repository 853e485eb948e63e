"""Launches that would exit with code 0 without doing what was asked: each is an error that names its remedy.

Without these checks processes train alone and save over each other, or a model that should be sharded is not.
"""

import json
from pathlib import Path

import pytest
from launching import CONFIGS, run

SCRIPT = Path(__file__).with_name("run_trainer.py")


def launch(config: str | Path, out: Path, **arguments: object) -> str:
    """Runs a training of one step and returns its error output; fails if it succeeds."""
    given = {"max_steps": 1, "report_to": "none", "disable_tqdm": True, **arguments}
    options = json.dumps({"trap": {"model": "linear", "rows": 8, "arguments": given}})
    flags: dict[str, object] = {"mixed_precision": "no"}
    with pytest.raises(RuntimeError, match="exit code") as error:
        run(SCRIPT, out, options, processes=2, config=config, flags=flags, environment={"CUDA_VISIBLE_DEVICES": ""})
    assert not (out / "trap" / "report.json").exists()
    return str(error.value)


def test_a_gpu_configuration_on_a_machine_without_one(tmp_path: Path) -> None:
    """Each of the two processes would be a run of its own."""
    error = launch("ddp", tmp_path)
    assert "ArgumentError" in error and "each would train alone" in error and "`use_cpu=True`" in error


def test_fsdp_that_would_be_ddp(tmp_path: Path) -> None:
    error = launch("fsdp2", tmp_path, use_cpu=True)
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
    error = launch("zero2", tmp_path)
    assert "ArgumentError" in error and "ddp_backend" in error
