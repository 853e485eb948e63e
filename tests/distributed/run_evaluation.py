"""Evaluates in every way with 13 rows in batches of 4, and writes what came out; started once or per process.

python run_evaluation.py OUT
"""

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

spec = importlib.util.spec_from_file_location("fixtures", Path(__file__).parents[1] / "conftest.py")
assert spec is not None and spec.loader is not None
fixtures: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fixtures)

ROWS = 13
OPTIONS: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "per_device_eval_batch_size": 4}


def padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)

    def fill(name: str, value: int) -> torch.Tensor:
        return torch.tensor([list(row[name]) + [value] * (width - len(row[name])) for row in rows])

    return {name: fill(name, -100 if name == "labels" else 0) for name in ("input_ids", "attention_mask", "labels")}


def trainer_for(out: Path, compute_metrics: Any = None, collator: Any = padded, **options: Any) -> Any:
    import finetune

    model = fixtures.make_tiny_llama()
    with torch.no_grad():
        model.lm_head.weight *= 30
    args = finetune.TrainingArguments(str(out), **{**OPTIONS, **options})
    return finetune.Trainer(model=model, args=args, compute_metrics=compute_metrics, data_collator=collator)


def evaluations(out: Path) -> dict[str, Any]:
    from datasets import Dataset

    from finetune.data.loading.collate import DataCollatorForLanguageModeling
    from finetune.engine.sum_metrics import TokenMetrics

    rows = fixtures.make_token_rows(ROWS)
    data = Dataset.from_list(rows)
    found: dict[str, Any] = {}

    def look(prediction: Any) -> dict[str, float]:
        hits = (prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]).sum()
        return {
            "rows": float(len(prediction.label_ids)),
            "hits": float(hits),
            "ids": float(prediction.inputs[prediction.inputs >= 0].sum()),
            "losses": float(len(prediction.losses)),
        }

    found["kept"] = trainer_for(out, look, include_for_metrics=["inputs", "loss"]).evaluate(data)
    found["sums"] = trainer_for(out, TokenMetrics()).evaluate(data)
    found["few rows"] = trainer_for(out, TokenMetrics()).evaluate(data.select(range(2)))
    uneven = {"accelerator_config": {"even_batches": False}, "include_for_metrics": ["inputs", "loss"]}
    found["uneven"] = trainer_for(out, look, **uneven).evaluate(data)
    found["uneven, few rows"] = trainer_for(out, look, **uneven).evaluate(data.select(range(2)))
    flat = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    found["padding-free"] = trainer_for(out, collator=flat).evaluate(data)
    found["padding-free stream"] = trainer_for(out, collator=flat).evaluate(data.to_iterable_dataset())
    found["stream"] = trainer_for(out, TokenMetrics()).evaluate(data.to_iterable_dataset())

    totals = {"rows": 0}

    def by_batch(prediction: Any, compute_result: bool) -> dict[str, float]:
        totals["rows"] += len(prediction.label_ids)
        return {"rows": float(totals["rows"])} if compute_result else {}

    found["batches"] = trainer_for(out, by_batch, batch_eval_metrics=True).evaluate(data)
    predicted = trainer_for(out).predict(data)
    found["predict"] = {
        **{f"dimension {i}": size for i, size in enumerate(predicted.predictions.shape)},
        "sum": float(predicted.predictions[predicted.label_ids >= 0].sum()),
        "labels": int(predicted.label_ids.clip(0).sum()),
        "test_loss": predicted.metrics["test_loss"],
    }
    return found


class Poisoned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return {"loss": (self.weight * x).mean()}


def poisoned_trainer(out: Path, policy: str) -> Any:
    """Returns a trainer whose row 6, the first of the second process's second batch when there are two, is NaN."""
    from datasets import Dataset

    import finetune

    rows = Dataset.from_dict({"x": [float("nan") if i == 6 else 1.0 for i in range(8)], "labels": [0] * 8})
    args = finetune.TrainingArguments(
        str(out), **OPTIONS, per_device_train_batch_size=2, logging_steps=1, train_sampling_strategy="sequential",
        save_strategy="no", nonfinite_policy=policy, num_train_epochs=1, max_grad_norm=0.0,
    )  # fmt: skip
    return finetune.Trainer(model=Poisoned(), args=args, train_dataset=rows)


def skipped(out: Path) -> float:
    """Returns the weight after a run that drops the poisoned update; there is no gradient norm that would show it."""
    trainer = poisoned_trainer(out, "skip_step")
    trainer.train()
    return float(trainer.model.weight)


def poisoned(out: Path) -> str:
    """Returns the error about the poisoned row. Ends the process group: the last thing to do."""
    trainer = poisoned_trainer(out, "raise")
    try:
        trainer.train()
    except ArithmeticError as error:
        trainer.end()
        return str(error)
    raise AssertionError("nothing was raised")


def searched(out: Path) -> dict[str, Any]:
    import optuna

    import finetune

    class Prune(optuna.pruners.BasePruner):
        def prune(self, study: Any, trial: Any) -> bool:
            return trial.number == 1

    data = fixtures.make_padded_dataset(8)
    args = finetune.TrainingArguments(
        str(out), **OPTIONS, per_device_train_batch_size=2, eval_strategy="epoch", save_strategy="no"
    )
    trainer = finetune.Trainer(
        model_init=fixtures_model, args=args, train_dataset=data, eval_dataset=data
    )  # fmt: skip
    best = trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True)},
        n_trials=3,
        sampler=optuna.samplers.RandomSampler(seed=0),
        pruner=Prune(),
    )
    return {} if best is None else {"id": best.run_id, "objective": best.objective, **best.hyperparameters}


def fixtures_model() -> Any:
    return fixtures.make_tiny_llama()


def main(out: Path) -> None:
    from accelerate import PartialState

    report: dict[str, Any] = {"found": evaluations(out), "search": searched(out)}
    state = PartialState()
    report["processes"] = state.num_processes
    report["skipped"] = skipped(out)
    report["poisoned"] = poisoned(out)
    (out / f"report_{state.process_index}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # Not through the interpreter's end: gloo's threads now and then abort it there.
    sys.stdout.flush()
    os._exit(0)
