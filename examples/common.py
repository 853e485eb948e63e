"""What every example takes from its command line: a model, a folder for the results, and how long to train.

The defaults need no network: the small model and the rows that come with the package (`finetune demo` uses them too).
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import finetune

DEMO = Path(finetune.__file__).parent / "demo"


@dataclass
class Options:
    """What was chosen: `model` is a folder or Hub id, `data` a folder with `train.jsonl` and `test.jsonl`."""

    model: str
    data: Path
    output_dir: str
    max_steps: int

    def rows(self, split: str = "train") -> Any:
        """Returns the rows of a split: `prompt` and `completion`, each a list of messages."""
        from datasets import load_dataset

        return load_dataset("json", data_files=str(self.data / f"{split}.jsonl"), split="train")

    def settings(self, **changes: Any) -> dict[str, Any]:
        """Returns arguments for a short run of a small model, with `changes`."""
        return {
            "output_dir": self.output_dir,
            "max_steps": self.max_steps,
            "per_device_train_batch_size": 16,
            "learning_rate": 1e-3,
            "max_length": 192,
            "gradient_checkpointing": False,
            "logging_steps": max(1, self.max_steps // 4),
            "save_strategy": "no",
            "report_to": "none",
            **changes,
        }


def read_options(description: str | None, output_dir: str, argv: Sequence[str] | None = None) -> Options:
    """Returns the options of the command line (or of `argv`)."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO / "model"), help="folder or Hub id (default: the embedded model)")
    parser.add_argument("--data", type=Path, default=DEMO, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--output_dir", default=output_dir)
    parser.add_argument("--max_steps", type=int, default=20, help="optimizer steps (default: 20)")
    return Options(**vars(parser.parse_args(argv)))


def show(trainer: Any) -> None:
    """Prints first and last logged loss as one line of JSON."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(json.dumps({"first_loss": losses[0], "last_loss": losses[-1], "steps": trainer.state.global_step}))
