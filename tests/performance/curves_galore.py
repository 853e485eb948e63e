"""Training curves of AdamW, GaLore with exact bases and GaLore with randomised bases, over three seeds.

    python tests/performance/curves_galore.py [--steps 150] [--rank 32] [--out tests/performance]

Fine-tunes the demonstration model (one million parameters, pretrained) on its rows: the same data order, learning rate
and schedule for every optimizer. Writes `curves_galore.json` (losses by step, evaluation loss, seconds) and
`curves_galore.png`. A few minutes on one core.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SEEDS = (1, 2, 3)
WINDOW = 10


def optimizers(rank: int) -> dict[str, dict[str, Any]]:
    """Returns the arguments of each curve. `scale=1` gives projected weights the learning rate of the others."""
    galore = f"rank={rank}, update_proj_gap=25, scale=1.0"
    every = {"optim": "galore_adamw", "optim_target_modules": "all-linear"}
    return {
        "AdamW": {"optim": "adamw_torch"},
        "GaLore, exact": {**every, "optim_args": f"{galore}, svd=exact"},
        "GaLore, randomised": {**every, "optim_args": f"{galore}, svd=randomized"},
    }


def train(choice: dict[str, Any], seed: int, steps: int) -> dict[str, Any]:
    """Returns the losses of one training, its evaluation loss, and how long it took."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from finetune import SFTConfig, SFTTrainer
    from finetune.cli.demo import MODEL, TEST, TRAIN

    data: Any = load_dataset("json", data_files={"train": str(TRAIN), "test": str(TEST)})
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            folder,
            max_steps=steps,
            per_device_train_batch_size=16,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            warmup_steps=10,
            max_length=192,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            log_level="error",
            use_cpu=True,
            seed=seed,
            **choice,
        )
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32"),
            args=args,
            train_dataset=data["train"],
            eval_dataset=data["test"],
            processing_class=AutoTokenizer.from_pretrained(MODEL),
        )
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        history = trainer.state.log_history
        losses = [entry["loss"] for entry in history if "loss" in entry]
        energies = [entry["galore_captured_energy"] for entry in history if "galore_captured_energy" in entry]
        return {
            "seed": seed,
            "losses": [round(loss, 5) for loss in losses],
            "final_loss": statistics.fmean(losses[-WINDOW:]),
            "eval_loss": trainer.evaluate()["eval_loss"],
            "captured_energy": energies[-1] if energies else None,
            "seconds": round(seconds, 1),
        }


def plot(curves: dict[str, list[dict[str, Any]]], path: Path, title: str) -> None:
    """Draws the mean over the seeds of each optimizer, smoothed over ten steps, and every seed's own curve faintly."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.6))
    for number, (name, runs) in enumerate(curves.items()):
        smooth = [
            [statistics.fmean(run["losses"][max(0, i - WINDOW + 1) : i + 1]) for i in range(len(run["losses"]))]
            for run in runs
        ]
        for curve in smooth:
            axes.plot(range(1, len(curve) + 1), curve, color=f"C{number}", alpha=0.25, linewidth=0.8)
        mean = [statistics.fmean(values) for values in zip(*smooth, strict=True)]
        axes.plot(range(1, len(mean) + 1), mean, color=f"C{number}", linewidth=1.8, label=name)
    axes.set(xlabel="optimizer step", ylabel=f"training loss (mean of {WINDOW} steps)", yscale="log", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Trains every optimizer with every seed, and writes numbers and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    curves: dict[str, list[dict[str, Any]]] = {}
    for name, choice in optimizers(options.rank).items():
        curves[name] = [train(choice, seed, options.steps) for seed in SEEDS]
        finals = [run["final_loss"] for run in curves[name]]
        evals = [run["eval_loss"] for run in curves[name]]
        print(
            f"{name:20} final loss {statistics.fmean(finals):.4f} ({min(finals):.4f} to {max(finals):.4f}), "
            f"evaluation loss {statistics.fmean(evals):.4f}",
            file=sys.stderr,
            flush=True,
        )
    settings = {"steps": options.steps, "rank": options.rank, "optimizers": optimizers(options.rank)}
    text = json.dumps({**settings, "runs": curves}, indent=1)
    (options.out / "curves_galore.json").write_text(text + "\n", encoding="utf-8")
    title = f"Demonstration model, rank {options.rank} of 128, {len(SEEDS)} seeds"
    plot(curves, options.out / "curves_galore.png", title)


if __name__ == "__main__":
    main()
