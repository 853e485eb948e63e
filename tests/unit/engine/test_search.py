"""What a hyperparameter search compares by default."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

import finetune

ROWS = [{"text": text} for text in ("the cat sat on a mat", "the red sun went down", "birds sang to rivers")]


def search(make_model: Any, tokenizer: Any, out: Path, **options: Any) -> tuple[float, dict[str, float]]:
    """Returns the objective of a search with one trial, and the metrics of its evaluations."""
    data = Dataset.from_list(ROWS)
    several = options.pop("several", False)
    trainer = finetune.SFTTrainer(
        model=make_model(vocab_size=512),
        args=finetune.SFTConfig(
            str(out), max_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, max_length=32
        ),
        train_dataset=data,
        eval_dataset={"one": data, "two": data} if several else data,
        processing_class=tokenizer,
        **options,
    )
    trainer.model_init = lambda: make_model(vocab_size=512)
    best: Any = trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-3)}, n_trials=1
    )
    found: dict[str, float] = {}
    for entry in trainer.state.log_history:
        found |= entry
    return best.objective, found


def test_token_metrics_are_no_part_of_the_objective(tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    objective, metrics = search(tiny_llama, chat_tokenizer, tmp_path)
    assert metrics["eval_num_tokens"] > 1
    assert objective == metrics["eval_loss"]


def test_metrics_of_ones_own_are(tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    objective, _ = search(tiny_llama, chat_tokenizer, tmp_path, compute_metrics=lambda prediction: {"quality": 0.25})
    assert objective == 0.25


def test_the_losses_of_several_sets_are_added(tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    objective, metrics = search(tiny_llama, chat_tokenizer, tmp_path, several=True)
    assert objective == pytest.approx(metrics["eval_one_loss"] + metrics["eval_two_loss"])
