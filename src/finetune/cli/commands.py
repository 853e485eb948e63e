"""The commands that do not train: each is a function of its arguments, run by `run_program`."""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from finetune.errors import FinetuneError

REQUIRED = ("torch", "transformers", "accelerate", "datasets", "safetensors", "huggingface_hub", "numpy")
OPTIONAL = {
    "peft": "LoRA: pip install peft",
    "bitsandbytes": "8-bit optimizers, 4-bit models: pip install bitsandbytes",
    "liger_kernel": "Liger kernels: pip install liger-kernel",
    "deepspeed": "ZeRO: pip install deepspeed",
    "matplotlib": "curves as PNG: pip install matplotlib",
    "tensorboard": "TensorBoard logs: pip install tensorboard",
    "sklearn": "classification metrics: pip install scikit-learn scipy",
}
_DISTRIBUTIONS = {"sklearn": "scikit-learn"}


def demo(argv: Sequence[str] | None = None) -> None:
    """Runs the demonstration."""
    from finetune.cli.demo import run_demo

    parser = argparse.ArgumentParser(prog="finetune demo", description="Fine-tune the embedded model and compare.")
    parser.add_argument("--output_dir", default="runs/demo", help="where everything is written (default: runs/demo)")
    parser.add_argument("--seed", type=int, default=42, help="seed of the training (default: 42)")
    options = parser.parse_args(argv)
    run_demo(Path(options.output_dir), seed=options.seed)


def report(argv: Sequence[str] | None = None) -> None:
    """Writes report.html, and on request the curves as pictures, into a run folder."""
    parser = argparse.ArgumentParser(prog="finetune report", description="Write report.html from trainer_state.json.")
    parser.add_argument("run_folder", type=Path, help="a folder given as --output_dir, or one of its checkpoints")
    parser.add_argument("--plots", choices=("svg", "png"), help="write each curve to RUN_FOLDER/plots too")
    options = parser.parse_args(argv)
    from finetune.reporting.plots import save_plots
    from finetune.reporting.report import report_from_run

    print(report_from_run(options.run_folder))
    if not options.plots:
        return
    paths = save_plots(options.run_folder, format=options.plots)
    for path in paths:
        print(path)
    if not paths:
        print("No curve has two points yet; no pictures written.", file=sys.stderr)


def env(argv: Sequence[str] | None = None) -> None:
    """Prints versions and hardware."""
    argparse.ArgumentParser(prog="finetune env", description="Print versions and hardware.").parse_args(argv)
    print(f"finetune {version('finetune')}, Python {platform.python_version()}, {platform.platform()}")
    for name in (*REQUIRED, *OPTIONAL, "triton"):
        print(f"{name:16}{version(name) or 'not installed'}")
    import torch

    print(f"{'cpu':16}{os.cpu_count()} cores, {torch.get_num_threads()} threads")
    print(f"{'accelerator':16}{_accelerators()}")


def doctor(argv: Sequence[str] | None = None) -> None:
    """Checks the installation; raises `FinetuneError` if training would not work."""
    argparse.ArgumentParser(prog="finetune doctor", description="Check the installation.").parse_args(argv)
    problems: list[str] = []
    for name in REQUIRED:
        installed = version(name)
        print(f"{'ok' if installed else 'MISSING':9}{name} {installed}")
        if not installed:
            problems.append(f"{name} is missing: pip install {name}")
    for name, purpose in OPTIONAL.items():
        installed = version(name)
        print(f"{'ok' if installed else 'absent':9}{name} {installed or '(' + purpose + ')'}")
    problems += _unmet_requirements()
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    for what, folder in (("working folder", Path.cwd()), ("cache", cache)):
        from finetune.cli.programs import write_problem

        problem = write_problem(folder)
        print(f"{'NO' if problem else 'ok':9}{what} {folder} can be written")
        if problem:
            problems.append(f"The {what} {folder} cannot be written: {problem}")
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    print(f"{'ok' if free > 2 else 'LOW':9}{free:.0f} GiB free on the disk of the working folder")
    if not problems:
        import torch

        torch.ones(2, 2, requires_grad=True).sum().backward()
        print(f"{'ok':9}torch computes gradients; accelerator: {_accelerators()}")
        return
    raise FinetuneError("; ".join(problems))


def preview(argv: Sequence[str] | None = None) -> None:
    """Shows rows of a dataset as the model is trained on them."""
    from finetune.cli.preview import run_preview

    run_preview(argv)


def plan(argv: Sequence[str] | None = None) -> None:
    """Estimates the memory a training run needs, without weights or a device."""
    from finetune.cli.plan import run_plan

    run_plan(argv)


def version(name: str) -> str:
    """Returns the installed version of a package given by its import name, or ""."""
    try:
        return importlib.metadata.version(_DISTRIBUTIONS.get(name, name))
    except importlib.metadata.PackageNotFoundError:
        return ""


def _unmet_requirements() -> list[str]:
    from packaging.requirements import Requirement

    found = []
    for line in importlib.metadata.requires("finetune") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        installed = version(requirement.name)
        if installed and not requirement.specifier.contains(installed, prereleases=True):
            found.append(f"{requirement.name} {installed} is installed, {requirement.specifier} is needed")
    return found


def _accelerators() -> str:
    import torch

    if not torch.accelerator.is_available():
        return "none, the CPU is used"
    kind = torch.accelerator.current_accelerator()
    names = ""
    if kind is not None and kind.type == "cuda":
        names = ": " + ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return f"{torch.accelerator.device_count()} x {kind}{names}"
