"""Trains tiny models, one after the other, and writes what happened; started by the tests, once or per process.

python run_trainer.py OUT '{"NAME": {"model": "llama", "rows": 18, "arguments": {...}}, ...}'

Each run leaves `OUT/NAME/report.json` and the model in `OUT/NAME/model`.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

spec = importlib.util.spec_from_file_location("fixtures", Path(__file__).parents[1] / "conftest.py")
assert spec is not None and spec.loader is not None
fixtures: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fixtures)


def main(out: Path, runs: dict[str, dict[str, Any]]) -> None:
    from accelerate.state import AcceleratorState, GradientState

    for name, options in runs.items():
        # Each run is a program of its own; the process group stays.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        trainer = train(out / name, options)
        trainer.accelerator.wait_for_everyone()
    trainer.end()


def model_and_rows(options: dict[str, Any]) -> tuple[Any, Any]:
    if options["model"] == "llama":
        model = fixtures.make_tiny_llama()
        dataset = fixtures.make_padded_dataset(options["rows"])
        if "labelled" in options:  # the first so many rows; the others have labels that are all ignored
            dataset = dataset.map(
                lambda row, index: row if index < options["labelled"] else {"labels": [-100] * len(row["labels"])},
                with_indices=True,
            )
        return model, dataset
    if options["model"] == "linear":
        return torch.nn.Linear(1, 1), [{"input": torch.ones(1)}] * options["rows"]
    from datasets import Dataset

    ids = torch.randint(5, 128, (options["rows"], 12), generator=torch.Generator().manual_seed(0)).tolist()
    dataset = Dataset.from_dict({"input_ids": ids, "labels": [i % 3 for i in range(options["rows"])]})
    return fixtures.make_tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), dataset


def train(out: Path, options: dict[str, Any]) -> Any:
    """Returns the trainer after a run."""
    import finetune

    model, dataset = model_and_rows(options)

    def compute_metrics(prediction: Any) -> dict[str, float]:
        return {"rows": float(len(prediction.label_ids)), "labels": float(prediction.label_ids.clip(0).sum())}

    trainer = finetune.Trainer(
        model=model,
        args=finetune.TrainingArguments(str(out), **options["arguments"]),
        train_dataset=dataset,
        eval_dataset=dataset.select(range(options["eval_rows"])) if "eval_rows" in options else dataset,
        compute_metrics=compute_metrics if options.get("metrics") else None,
    )
    result = trainer.train(resume_from_checkpoint=options.get("resume"))
    metrics = trainer.evaluate()
    trainer.save_model(str(out / "model"))
    if trainer.is_world_process_zero():
        report = {
            "history": trainer.state.log_history,
            "loss": result.training_loss,
            "eval": metrics,
            "processes": trainer.accelerator.num_processes,
            "kind": str(trainer.accelerator.distributed_type),
        }
        (out / "report.json").write_text(json.dumps(report))
    return trainer


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    # Not through the interpreter's end: gloo's threads now and then abort it there.
    sys.stdout.flush()
    os._exit(0)
