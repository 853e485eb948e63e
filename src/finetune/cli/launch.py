"""`finetune sft` and its siblings: in this process, or in several through `accelerate launch`."""

import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from finetune.cli.programs import choose, load_program, program_path, run_program, shipped_folder
from finetune.errors import ArgumentError

# TRL's names, and others that people type.
ALIASES = {
    "multi_gpu": "ddp",
    "multi_node": "ddp_multi_node",
    "fsdp": "fsdp2",
    "deepspeed_zero1": "zero1",
    "deepspeed_zero2": "zero2",
    "deepspeed_zero3": "zero3",
}
# Arguments of `accelerate launch` that are taken from the command line; everything else is the program's.
LAUNCHER_VALUES = (
    "accelerate_config",
    "config_file",
    "num_processes",
    "num_machines",
    "machine_rank",
    "main_process_ip",
    "main_process_port",
    "gpu_ids",
    "mixed_precision",
    "rdzv_backend",
    "fsdp_state_dict_type",
    "fsdp_offload_params",
    "fsdp_transformer_layer_cls_to_wrap",
    "zero_stage",
    "offload_optimizer_device",
    "offload_param_device",
)


def config_names() -> list[str]:
    """Returns the names of the shipped configurations: "cpu", "ddp", ..."""
    return sorted(path.stem for path in shipped_folder("accelerate_configs").glob("*.yaml"))


def config_path(name: str) -> Path:
    """Returns the file of a configuration given by its path, its name, or TRL's name for it."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml", ".json") and os.sep in name:
        raise ArgumentError(f"`accelerate_config` is {name!r}, which does not exist.")
    stem = path.stem if path.suffix in (".yaml", ".yml") else name
    stem = choose(ALIASES.get(stem, stem), config_names(), "launch configuration and no file")
    return shipped_folder("accelerate_configs") / f"{stem}.yaml"


def split_arguments(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Returns the launcher's arguments and the program's.

    >>> split_arguments(["--num_processes", "2", "--output_dir", "out", "--gpu_ids=0,1"])
    ({'num_processes': '2', 'gpu_ids': '0,1'}, ['--output_dir', 'out'])
    """
    launcher: dict[str, str] = {}
    program: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in LAUNCHER_VALUES:
            program.append(word)
            continue
        if not equals:
            value = next(words, "")
        if not value or value.startswith("--"):
            raise ArgumentError(f"`--{name}` needs a value.")
        launcher[name] = value
    return launcher, program


def run(name: str, argv: Sequence[str]) -> int:
    """Runs the program `name` and returns its exit code; several processes if a launcher argument is among `argv`."""
    if any(word in ("-h", "--help") for word in argv):
        return run_program(partial(load_program(name).main, prog=f"finetune {name}"), argv)
    launcher: dict[str, str] = {}
    program: list[str] = []

    def prepare(words: Sequence[str] | None) -> None:
        found, rest = split_arguments(words or [])
        launcher.update(found)
        program.extend(rest)
        if launcher:
            launcher["config_file"] = str(_configuration(launcher))

    code = run_program(prepare, argv)
    if code:
        return code
    if not launcher:
        return run_program(partial(load_program(name).main, prog=f"finetune {name}"), program)
    return _launch(name, launcher, program)


def _configuration(launcher: dict[str, str]) -> Path:
    """Returns the configuration file to use, and takes its name out of `launcher`."""
    asked = launcher.pop("accelerate_config", None) or launcher.pop("config_file", None)
    number = launcher.get("num_processes", "1")
    if not number.isdigit() or int(number) < 1:
        raise ArgumentError(f"`--num_processes` is {number!r}; it must be a whole number, at least 1.")
    if asked:
        return config_path(asked)
    import torch

    several = int(number) > 1
    if torch.accelerator.is_available():
        return config_path("ddp" if several else "single_gpu")
    return config_path("cpu")


def _launch(name: str, launcher: dict[str, str], program: list[str]) -> int:
    if Path(launcher["config_file"]).stem == "cpu":
        # accelerate's launcher starts one process for CPU configurations, so the file says MULTI_GPU.
        os.environ["ACCELERATE_USE_CPU"] = "true"
    # Here, once, what can be checked before processes start: each of them would print the same error.
    code = run_program(partial(load_program(name).parse, prog=f"finetune {name}"), program)
    if code:
        return code
    flags = [word for key, value in launcher.items() for word in (f"--{key}", value)]
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, str(program_path(name)), *program]
    try:
        return subprocess.run(command, check=False).returncode
    except KeyboardInterrupt:
        return 130
