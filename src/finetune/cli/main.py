"""The command `finetune`. Nothing heavy is imported before a command is chosen."""

import sys
from collections.abc import Sequence

from finetune.errors import nearest

COMMANDS = {
    "sft": "supervised fine-tuning: `finetune sft --model_name_or_path ... --dataset_name ... --output_dir ...`",
    "classify": "sequence classification: `finetune classify --model_name_or_path ... --dataset_name ...`",
    "demo": "fine-tune the small model that comes with this package, and show what changed",
    "preview": "show what a model would be trained on: `finetune preview --model_name_or_path ... --dataset_name ...`",
    "plan": "estimate the memory a training run needs: `finetune plan --model ... --optim ... --num_processes ...`",
    "report": "write report.html for a finished or running training: `finetune report RUN_FOLDER`",
    "env": "print versions and hardware, for bug reports",
    "doctor": "check that this installation can train",
}


def usage() -> str:
    """Returns the help text."""
    width = max(map(len, COMMANDS))
    lines = [f"  finetune {name.ljust(width)}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: finetune COMMAND [ARGUMENTS]",
            "",
            *lines,
            "",
            "`finetune COMMAND --help` lists the arguments of a command. Training programs also take",
            "`--accelerate_config NAME` (cpu, ddp, fsdp2, zero3, ... or a file) and `--num_processes N`.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command in `argv` (default: the command line) and returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] in ("--version", "version"):
        from finetune import __version__

        print(__version__)
        return 0
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        hint = nearest(name, COMMANDS)
        print(f"error: unknown command {name!r}.{hint} Commands: {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    if name in ("sft", "classify"):
        from finetune.cli.launch import run

        return run(name, rest)
    from finetune.cli import commands
    from finetune.cli.programs import run_program

    return run_program(getattr(commands, name), rest)


if __name__ == "__main__":
    raise SystemExit(main())
