"""`finetune sft` and its siblings: in this process, or in several through `accelerate launch`."""

import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import yaml

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
    stem = choose(ALIASES.get(stem, stem), config_names(), "launch configuration or a file")
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
            path = _configuration(launcher)
            if not any(word.startswith(("--use_cpu", "--use-cpu")) for word in program):
                fit_devices(launcher, path)
            launcher["config_file"] = str(path)

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


def fit_devices(launcher: dict[str, str], path: Path) -> None:
    """Sets `num_processes` in `launcher` to the number of accelerators if only a shipped configuration says another.

    Processes on CPUs, on several machines, and on machines without accelerators are left as they are.

    Raises:
        ArgumentError: more processes than accelerators are asked for, or `ddp` with one accelerator.
    """
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    values = values if isinstance(values, dict) else {}
    machines = str(launcher.get("num_machines") or values.get("num_machines") or 1)
    if path.stem == "cpu" or values.get("use_cpu") or machines != "1":
        return
    devices = _accelerators(str(launcher.get("gpu_ids") or values.get("gpu_ids") or "all"))
    if not devices:
        return
    is_shipped = path.parent == shipped_folder("accelerate_configs")
    if is_shipped and values.get("num_processes") != 1:
        launcher.setdefault("num_processes", str(devices))
    number = int(launcher.get("num_processes") or values.get("num_processes") or 1)
    visible = f"{devices} accelerator{'s' if devices > 1 else ''} {'are' if devices > 1 else 'is'} available"
    if number > devices:
        source = "`--num_processes`" if "num_processes" in launcher else f"`num_processes` in {str(path)!r}"
        raise ArgumentError(f"{source} is {number}, but {visible}. Set `--num_processes {devices}`.")
    if number == 1 and is_shipped and path.stem == "ddp":
        raise ArgumentError(
            f"`accelerate_config` is 'ddp', which needs at least 2 processes; {number} would be started, and {visible}."
            " Use `--accelerate_config single_gpu`, or leave it out."
        )


def _accelerators(ids: str) -> int:
    """Returns the number of accelerators that a launcher with these `gpu_ids` ("all" or "0,1") uses."""
    import torch

    available = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    return available if ids == "all" else min(available, len(ids.split(",")))


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
