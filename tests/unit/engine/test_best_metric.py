"""A metric that no evaluation reports is found before the first step."""

from pathlib import Path
from typing import Any

import pytest

import finetune
from finetune.engine.best_metric import check_best_metric


class Adds(finetune.TrainerCallback):
    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        metrics["eval_bleu"] = 1.0


class Evaluates(finetune.Trainer):
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        return {**super().evaluate(*args, **kwargs), "eval_bleu": 1.0}


def build(make_model: Any, dataset: Any, out: Path, name: str | None, **options: Any) -> finetune.Trainer:
    kind, strategy = options.pop("kind", finetune.Trainer), options.pop("strategy", "steps")
    sets = dataset if not options.pop("several", False) else {"a": dataset, "b": dataset}
    args = finetune.TrainingArguments(
        str(out), use_cpu=True, report_to="none", disable_tqdm=True, max_steps=1, eval_strategy=strategy, save_steps=1,
        eval_steps=1 if strategy == "steps" else None, metric_for_best_model=name,
    )  # fmt: skip
    return kind(make_model(), args, train_dataset=dataset, eval_dataset=sets, **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("bleu", {}, r"will not report `eval_bleu`, but `eval_loss`\."),
        ("losss", {}, "Did you mean `eval_loss`"),
        ("loss", {"several": True}, "`eval_a_loss`, `eval_b_loss`.*With several evaluation sets"),
        ("entropy", {}, "`eval_entropy`"),
    ],
)
def test_what_cannot_be_reported_is_refused_before_the_first_step(
    name: str, options: dict[str, Any], message: str, tiny_llama: Any, padded_dataset: Any, tmp_path: Path
) -> None:
    trainer = build(tiny_llama, padded_dataset(4), tmp_path, name, **options)
    with pytest.raises(finetune.ArgumentError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (None, {}),
        ("loss", {}),
        ("eval_loss", {}),
        ("eval_runtime", {}),
        ("bleu", {"strategy": "no"}),
        ("b_loss", {"several": True}),
        ("bleu", {"compute_metrics": lambda prediction: {"bleu": 1.0}}),
        ("bleu", {"callbacks": [Adds]}),
        ("bleu", {"kind": Evaluates}),
    ],
)
def test_what_may_be_reported_is_not(
    name: str | None, options: dict[str, Any], tiny_llama: Any, padded_dataset: Any, tmp_path: Path
) -> None:
    check_best_metric(build(tiny_llama, padded_dataset(4), tmp_path, name, **options))


def test_metrics_and_sets_given_after_the_constructor_count(
    tiny_llama: Any, padded_dataset: Any, tmp_path: Path
) -> None:
    trainer = build(tiny_llama, padded_dataset(4), tmp_path, "bleu")
    trainer.compute_metrics = lambda prediction: {"bleu": 1.0}
    trainer.train()
    assert trainer.state.best_metric == 1.0


def test_token_metrics_of_sft_count(tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"text": "the cat sat on a mat"}] * 2
    args = finetune.SFTConfig(
        str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, max_steps=1, max_length=32,
        eval_strategy="steps", eval_steps=1, metric_for_best_model="mean_token_accuracy",
    )  # fmt: skip
    trainer = finetune.SFTTrainer(
        tiny_llama(vocab_size=512), args, train_dataset=rows, eval_dataset=rows, processing_class=chat_tokenizer
    )
    trainer.train()
    assert trainer.state.best_metric is not None
