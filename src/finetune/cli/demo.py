"""`finetune demo`: fine-tune the embedded model on the embedded instructions, and measure what it learned."""

import json
import time
from pathlib import Path
from typing import Any

from finetune.cli.programs import PACKAGE, finished_run, write_problem
from finetune.errors import ArgumentError

DEMO = PACKAGE / "demo"
MODEL, TRAIN, TEST = DEMO / "model", DEMO / "train.jsonl", DEMO / "test.jsonl"
SHOWN = 3
_LONGEST_ANSWER = 64

Row = dict[str, Any]


def run_demo(output_dir: Path, *, seed: int = 42, max_steps: int = -1) -> dict[str, Any]:
    """Returns the measurements that it also prints and writes to `output_dir/metrics.json`.

    Writes the model to `output_dir/model` and the report to `output_dir/report.html`. `max_steps` shortens the
    training, for tests.

    Raises:
        ArgumentError: `output_dir` cannot be written, or holds a run that is not a demonstration.
    """
    start = time.perf_counter()
    _check(output_dir)
    print("Loading the embedded model ...", flush=True)

    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from finetune import SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
    data: Any = load_dataset("json", data_files={"train": str(TRAIN), "test": str(TEST)})
    trainer = SFTTrainer(
        model=model,
        args=_arguments(output_dir, seed, max_steps),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
    )
    rows = list(data["test"])
    print(f"{len(data['train'])} training rows; {len(rows)} test rows, none of which is among them.", flush=True)
    print("Before: writing an answer to each test row ...", flush=True)
    before = answers(trainer.model, tokenizer, rows)
    loss_before = trainer.evaluate()["eval_loss"]
    print(f"Before: exact match {exact_match(before, rows):.0%}, evaluation loss {loss_before:.3f}", flush=True)

    trained = trainer.train()
    print("After: writing an answer to each test row ...", flush=True)
    after = answers(trainer.model, tokenizer, rows)
    loss_after = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(output_dir / "model"))
    metrics = {
        "exact_match_before": exact_match(before, rows),
        "exact_match_after": exact_match(after, rows),
        "eval_loss_before": loss_before,
        "eval_loss_after": loss_after,
        "train_rows": len(data["train"]),
        "test_rows": len(rows),
        "train_steps": trainer.state.global_step,
        "train_seconds": trained.metrics["train_runtime"],
        "total_seconds": time.perf_counter() - start,
        "seed": seed,
    }
    samples = _samples(rows, before, after)
    _write(output_dir, trainer, metrics, samples)
    _show(output_dir, metrics, samples)
    return metrics


def _arguments(output_dir: Path, seed: int, max_steps: int) -> Any:
    from finetune import SFTConfig

    return SFTConfig(
        str(output_dir),
        num_train_epochs=3,
        max_steps=max_steps,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=50,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        max_length=192,
        gradient_checkpointing=False,
        eval_strategy="epoch",
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        seed=seed,
    )


def answers(model: Any, tokenizer: Any, rows: list[Row]) -> list[str]:
    """Returns the most likely answer to each row's prompt, written token by token (greedy), 50 rows at a time."""
    import torch

    was_training = model.training
    model.eval()
    written: list[str] = []
    for start in range(0, len(rows), 50):
        prompts = [
            tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
            for row in rows[start : start + 50]
        ]
        batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False).to(
            model.device
        )
        with torch.no_grad():
            tokens = model.generate(**batch, max_new_tokens=_LONGEST_ANSWER, do_sample=False)
        written += tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    model.train(was_training)
    return written


def exact_match(written: list[str], rows: list[Row]) -> float:
    """Returns the share of answers equal to the wanted one, character by character."""
    return sum(text == row["completion"][0]["content"] for text, row in zip(written, rows, strict=True)) / len(rows)


def _check(output_dir: Path) -> None:
    problem = write_problem(output_dir)
    if problem:
        raise ArgumentError(f"`output_dir` is {str(output_dir)!r}, which cannot be written: {problem}. Choose another.")
    if not (output_dir / "metrics.json").is_file() and finished_run(output_dir):
        raise ArgumentError(f"`output_dir` {str(output_dir)!r} holds another run. Choose another folder.")


def _samples(rows: list[Row], before: list[str], after: list[str]) -> list[dict[str, str]]:
    """Returns `SHOWN` rows for people to read; a wrong answer is among them if there is one."""
    wanted = [row["completion"][0]["content"] for row in rows]
    wrong = [index for index in range(len(rows)) if after[index] != wanted[index]][:1]
    right = [index for index in range(len(rows)) if index not in wrong][: SHOWN - len(wrong)]
    return [
        {
            "prompt": rows[index]["prompt"][0]["content"],
            "before": before[index],
            "after": after[index],
            "wanted": wanted[index],
        }
        for index in [*right, *wrong]
    ]


def _write(output_dir: Path, trainer: Any, metrics: dict[str, Any], samples: list[dict[str, str]]) -> None:
    from finetune.reporting.report import write_report

    (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    write_report(
        output_dir,
        trainer.state.log_history,
        config=trainer.args.to_sanitized_dict(),
        extra={
            "title": "finetune demo",
            "notes": "A small language model, pretrained without any JSON, is fine-tuned to turn a sentence about a "
            "person into a JSON record. Exact match is measured on rows that are not among the training rows.",
            "results": metrics,
            "generations": samples,
        },
    )


def _show(output_dir: Path, metrics: dict[str, Any], samples: list[dict[str, str]]) -> None:
    for sample in samples:
        print("\nPrompt:  " + sample["prompt"].replace("\n", "\n         "))
        print(f"Before:  {sample['before']}\nAfter:   {sample['after']}")
        if sample["after"] != sample["wanted"]:
            print(f"Wanted:  {sample['wanted']}")
    print(
        f"\n                  before    after"
        f"\nexact match    {metrics['exact_match_before']:>9.1%}{metrics['exact_match_after']:>9.1%}"
        f"   on {metrics['test_rows']} rows it was not trained on"
        f"\nevaluation loss{metrics['eval_loss_before']:>9.3f}{metrics['eval_loss_after']:>9.3f}"
        f"\n\n{metrics['train_steps']} steps in {metrics['train_seconds']:.0f} s, "
        f"{metrics['total_seconds']:.0f} s in total."
        f"\nModel:   {output_dir / 'model'}"
        f"\nReport:  {output_dir / 'report.html'}"
        f"\nNumbers: {output_dir / 'metrics.json'}"
    )
