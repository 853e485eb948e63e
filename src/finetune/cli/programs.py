"""The programs of `trainers/`: where they are, how they run, and what they check before anything is loaded."""

import atexit
import errno
import importlib.util
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import Any

from finetune import environment
from finetune.errors import ArgumentError, CheckpointError, FinetuneError, nearest
from finetune.files import checkpoint_step

PACKAGE = Path(__file__).resolve().parents[1]
PROGRAMS = {"sft": "sft.py", "classify": "sequence_classification.py"}
_WEIGHTS = ("model*.safetensors", "adapter_model*.safetensors", "pytorch_model*.bin", "adapter_model*.bin")

Program = Callable[[Sequence[str] | None], Any]


def shipped_folder(name: str) -> Path:
    """Returns the folder `trainers` or `accelerate_configs`: the checkout's if there is one, else the wheel's."""
    checkout = PACKAGE.parents[1]
    if (checkout / "pyproject.toml").is_file() and (checkout / name).is_dir():
        return checkout / name
    return PACKAGE / {"trainers": "_programs", "accelerate_configs": "_accelerate_configs"}[name]


def program_path(name: str) -> Path:
    """Returns the file of the program `name` ("sft")."""
    return shipped_folder("trainers") / PROGRAMS[name]


def load_program(name: str) -> ModuleType:
    """Returns the program as a module with `parse(argv)` and `main(argv)`."""
    path = program_path(name)
    spec = importlib.util.spec_from_file_location(f"finetune_program_{name}", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_program(main: Program, argv: Sequence[str] | None = None) -> int:
    """Runs `main(argv)` and returns the exit code; an error of this package is one line on stderr, not a traceback.

    0: done, 1: something given is wrong, 2: an argument is wrong, 75: a signal came and a checkpoint was saved
    (`--enable_jit_checkpoint`), 130: Ctrl-C. Other exceptions pass through: they
    are defects, and their traceback is wanted.
    """
    try:
        main(argv)
        if environment.world_size() > 1:
            _leave()
    except FinetuneError as error:
        rank = environment.rank()
        who = "error" if rank == 0 else f"error in process {rank}"
        print(f"{who}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ArgumentError) else 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except SystemExit as end:  # argparse, after `--help` or an unknown argument
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _leave() -> None:
    """Ends one of several processes whose work is done: gloo's threads now and then abort the interpreter's end."""
    atexit._run_exitfuncs()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def finish_program(trainer: Any, result: Any, card: dict[str, Any], evaluate: bool = False) -> None:
    """Ends a program after `result = trainer.train(...)`: saves model, state and metrics, and pushes if asked.

    `card` are arguments of `create_model_card`.

    Raises:
        Preempted: a signal ended training; its checkpoint is all that was saved.
    """
    if trainer.was_preempted:
        from finetune.checkpoint.preemption import Preempted

        trainer.accelerator.print(
            f"Stopped by a signal at step {trainer.state.global_step} of {trainer.state.max_steps}, which is saved. "
            "The same command with `--resume_from_checkpoint auto` goes on."
        )
        trainer.end()
        raise Preempted
    trainer.save_model()
    trainer.save_state()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    if evaluate:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.accelerator.print(f"Model saved to {trainer.args.output_dir}")
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**card)
    trainer.end()


def parse_program(
    config: type, argv: Sequence[str] | None = None, *, prog: str | None = None, description: str | None = None
) -> tuple[Any, Any, Any, Any]:
    """Returns (ScriptArguments, `config`, ModelConfig, DatasetMixtureConfig) of the command line of a program.

    They are checked as far as is possible without a model and a dataset; raises as `check_before_start`.
    """
    from finetune.arguments import parse_arguments
    from finetune.cli.script_arguments import DatasetMixtureConfig, ModelConfig, ScriptArguments

    types = (ScriptArguments, config, ModelConfig, DatasetMixtureConfig)
    script_args, training_args, model_args, dataset_args = parse_arguments(
        types, argv, prog=prog, description=description
    )
    check_before_start(
        training_args,
        model_args.model_name_or_path,
        model_args=model_args,
        script_args=script_args,
        dataset_args=dataset_args,
    )
    return script_args, training_args, model_args, dataset_args


def check_before_start(
    args: Any, model: str | None, *, model_args: Any = None, script_args: Any = None, dataset_args: Any = None
) -> None:
    """Raises for what would fail later, or destroy something, before a model or dataset is read.

    `args` are training arguments, `model` is `--model_name_or_path`; the others are the further arguments of a program
    (`ModelConfig`, `ScriptArguments`, `DatasetMixtureConfig`), checked where given.

    Raises:
        ArgumentError: no model or dataset is given, or two datasets; weights that nothing would train; or
            `output_dir` cannot be written or holds a finished run.
        CheckpointError: the checkpoint to resume from does not exist.
        ModelLoadError: the model folder does not exist, or holds only an adapter.
    """
    if not model:
        raise ArgumentError("No model given. Give a folder or a Hub id: `--model_name_or_path`.")
    if model_args is not None and (model_args.load_in_8bit or model_args.load_in_4bit) and not model_args.use_peft:
        bits = "load_in_8bit" if model_args.load_in_8bit else "load_in_4bit"
        raise ArgumentError(f"`{bits}` freezes the weights, so nothing would be trained. Add `--use_peft`.")
    if script_args is not None:
        from finetune.cli.datasets import check_one_source

        check_one_source(script_args, dataset_args)
    check_output_dir(args)
    check_resume(args.resume_from_checkpoint)
    from finetune.models.paths import check_model_path, refuse_adapter_folder

    check_model_path(model)
    refuse_adapter_folder(model)


def ignore_bias_buffers(model: Any) -> None:
    """Leaves the boolean buffers of `model` out of what DDP sends around (`--ignore_bias_buffers`).

    Old models of GPT-2's kind hold their causal masks as such; torch's DDP reads the names from the model.
    """
    import torch

    names = [name for name, buffer in model.named_buffers() if buffer.dtype == torch.bool]
    model._ddp_params_and_buffers_to_ignore = names


def check_resume(value: Any) -> None:
    """Raises `CheckpointError` when the folder to resume from does not exist."""
    folder = Path(str(value))
    if str(value).lower() in ("none", "false", "", "true", "auto") or folder.is_dir():
        return
    beside = [str(each) for each in folder.parent.glob("checkpoint-*")]
    raise CheckpointError(
        f"`resume_from_checkpoint` is {str(value)!r}, but there is no such folder.{nearest(str(folder), beside)} Give "
        "a checkpoint, or `auto` for the newest in `output_dir`."
    )


def check_output_dir(args: Any) -> None:
    """Raises `ArgumentError` when `args.output_dir` cannot be written, or holds what would be overwritten."""
    folder = Path(args.output_dir).expanduser()
    problem = write_problem(folder)
    if problem:
        raise ArgumentError(f"`output_dir` is {str(folder)!r}, which cannot be written: {problem}. Choose another.")
    if args.resume_from_checkpoint or args.overwrite_output_dir:
        return
    found = finished_run(folder)
    if found:
        raise ArgumentError(
            f"`output_dir` {str(folder)!r} holds an earlier run ({', '.join(found)}), which would be overwritten. "
            "Choose another folder, continue it with `--resume_from_checkpoint auto`, or give `--overwrite_output_dir`."
        )


def finished_run(folder: Path) -> list[str]:
    """Returns up to three names in `folder` that a new run would write over: checkpoints and weights."""
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [name for name in names if checkpoint_step(name) is not None and (folder / name).is_dir()]
    found += [name for pattern in _WEIGHTS for name in names if fnmatch(name, pattern)]
    return found if len(found) <= 3 else [*found[:2], f"and {len(found) - 2} more"]


def write_problem(folder: Path) -> str:
    """Returns why no file can be made in `folder`, or "". Leaves nothing behind, and does not make the folder.

    Tried in the nearest folder that exists: processes that start together must not make and remove one another's.
    """
    there = folder.absolute()
    try:
        while not there.exists():
            there = there.parent
        if not there.is_dir():
            return f"{os.strerror(errno.ENOTDIR)} ({there})"
        with tempfile.TemporaryDirectory(prefix=".write-test-", dir=there):
            return ""
    except OSError as error:
        return f"{error.strerror or error} ({there})"


def choose(name: str, allowed: Sequence[str], what: str) -> str:
    """Returns `name` if it is allowed; raises `ArgumentError` with the nearest one otherwise."""
    if name in allowed:
        return name
    raise ArgumentError(f"{name!r} is not a {what}.{nearest(name, allowed)} Allowed: {', '.join(allowed)}.")
