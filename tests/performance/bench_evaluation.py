"""Evaluation with metrics, 2,000 rows: time against TRL and transformers, and memory as rows are added.

    python tests/performance/bench_evaluation.py --fast --out results/evaluation.json

Two questions. `built-in metrics`: `SFTTrainer.evaluate()` of both, which report loss, token accuracy and entropy.
`compute_metrics`: token accuracy by a user's function; TRL keeps the predicted ids of all rows for it (at its best,
with `preprocess_logits_for_metrics`; without, all logits, which for 2,000 rows would be some 8 GB), ours adds up sums.
2,000 rows are evaluated with a narrow model (width 128, two layers), so that five pairs take half an hour.
Memory is that of 1,000 rows against 125. `--fast` takes 32 rows and a larger model (12.5M parameters) for the times,
and 24 and 96 rows for the memory: kept logits of 72 more rows would be 250 MiB.
"""

from typing import Any

from harness import OURS, Bench, Pause, clocked, reset_peak, resident_mib
from training import arguments, classes, library_of, load_library
from workloads import make_llama, token_rows, tokenizer


def predicted_ids(logits: Any, labels: Any) -> Any:
    """Returns the ids with the highest logit, so that not all logits are kept."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def token_accuracy(prediction: Any) -> dict[str, float]:
    """Returns the share of supervised tokens predicted rightly."""
    guesses, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    kept = labels != -100
    return {"token_accuracy": float((guesses == labels)[kept].mean())}


class TokenAccuracy:
    """The same as sums, for ours."""

    def batch_sums(self, logits: Any, labels: Any) -> dict[str, Any]:
        guesses, targets = logits[:, :-1].argmax(-1), labels[:, 1:]
        kept = targets != -100
        return {"right": ((guesses == targets) & kept).sum(), "count": kept.sum()}

    def from_sums(self, sums: dict[str, Any]) -> dict[str, float]:
        return {"token_accuracy": sums["right"].item() / sums["count"].item()}


def work(side: str, settings: dict[str, Any], pause: Pause) -> None:
    from datasets import concatenate_datasets

    rows = concatenate_datasets([token_rows(settings["rows"], vocab_size=8192)] * settings.get("times", 1))
    options: dict[str, Any] = {}
    if settings["metrics"] and library_of(side) == OURS:
        options = {"compute_metrics": TokenAccuracy()}
    elif settings["metrics"]:
        options = {"compute_metrics": token_accuracy, "preprocess_logits_for_metrics": predicted_ids}
    trainer_class, _ = classes(side)
    trainer = trainer_class(
        model=make_llama(settings["shape"], 8192),
        args=arguments(side, {"bf16": False, "completion_only_loss": True, "per_device_eval_batch_size": 8}),
        train_dataset=rows.select(range(8)),
        eval_dataset=rows,
        processing_class=tokenizer(),
        **options,
    )
    while True:
        base = resident_mib()
        reset_peak()
        measured = clocked(trainer.evaluate)
        # Not the built-in token accuracy: TRL's is a mean over batches, ours over tokens.
        wanted = ("eval_loss", "eval_token_accuracy")
        losses = [measured[name] for name in wanted if name in measured]
        kept = {name: measured[name] for name in ("seconds", "cpu_seconds", "page_faults")}
        pause({**kept, "losses": losses, "peak_mib": resident_mib("VmHWM") - base})


def main() -> None:
    bench = Bench("evaluation", "Evaluation with metrics", work, __doc__, load_library)
    rows, shape = (32, "small") if bench.fast else (2000, "narrow")
    for name, metrics in (("built-in metrics", False), ("compute_metrics", True)):
        if not bench.wanted(name):
            continue
        shared: dict[str, Any] = {"rows": rows, "metrics": metrics, "shape": shape}
        case = bench.case(name, {"trl": shared, "finetune": shared}, settings=shared)
        case.ratio("cpu_seconds", "trl")
        case.losses_agree(1e-3, "trl")
        case.bar(f"rows/s against TRL, {rows:,} rows, {name}", case.ratios("seconds", "trl"), at_least=2.0)
    if bench.wanted("memory"):
        few, many = (24, 96) if bench.fast else (125, 1000)
        # The same rows several times: other rows would have a longer one among them, and a larger largest batch.
        shared = {"rows": few, "metrics": True, "shape": "tiny"}
        sides = {f"finetune {count} rows": {**shared, "times": count // few} for count in (few, many)}
        case = bench.case("memory", sides)
        small, large = (case.values(side, "peak_mib") for side in sides)
        grown = [more - less for less, more in zip(small, large, strict=True)]
        case.bar(f"MiB more for {many:,} rows than for {few:,}", grown, at_most=32)
    bench.finish()


if __name__ == "__main__":
    main()
