"""The same run by transformers.Trainer and by ours: losses, gradient norms, rates, epochs, weights and events."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import finetune

COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "num_train_epochs": 2,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "weight_decay": 0.1,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "seed": 7,
}


class Recorder(transformers.TrainerCallback):
    """Notes every event with the names of its keyword arguments."""

    def __init__(self) -> None:
        self.events: list[tuple[str, tuple[str, ...]]] = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def note(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.events.append((name, tuple(sorted(kwargs))))

        return note


def run(library: Any, make_model: Any, dataset: Any, out: Path, eval_dataset: Any = None, **overrides: Any) -> Any:
    recorder = Recorder()
    trainer = library.Trainer(
        model=make_model(),
        args=library.TrainingArguments(str(out), **{**COMMON, **overrides}),
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        callbacks=[recorder],
    )
    output = trainer.train()
    return trainer, output, recorder.events


TIMED = ("runtime", "per_second", "preparation_time")


def untimed(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in entry.items() if not k.endswith(TIMED)} for entry in history]


def assert_same_run(theirs: Any, ours: Any) -> None:
    assert untimed(ours[0].state.log_history) == untimed(theirs[0].state.log_history)
    assert ours[1].training_loss == theirs[1].training_loss
    assert ours[1].global_step == theirs[1].global_step
    expected = dict(theirs[0].model.named_parameters())
    for name, parameter in ours[0].model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    assert ours[2] == theirs[2]


CASES = {
    "plain": {},
    "no accumulation": {"gradient_accumulation_steps": 1},
    "max_steps across epochs": {"max_steps": 5},
    "no clipping": {"max_grad_norm": 0.0},
    "cosine": {"lr_scheduler_type": "cosine"},
    "log every 2": {"logging_steps": 2},
    "last batch dropped": {"dataloader_drop_last": True, "per_device_train_batch_size": 3},
    "sequential": {"train_sampling_strategy": "sequential"},
    "data seed": {"data_seed": 3},
    "first step logged": {"logging_first_step": True, "logging_steps": 3},
    "sgd": {"optim": "sgd"},
    "label smoothing off by tokens": {"include_num_input_tokens_seen": "all", "logging_steps": 1},
}


@pytest.mark.parametrize("case", CASES)
def test_llama_run_is_bitwise_the_same(case: str, tiny_llama: Any, padded_dataset: Any, tmp_path: Path) -> None:
    dataset = padded_dataset(20)
    theirs = run(transformers, tiny_llama, dataset, tmp_path / "a", **CASES[case])
    ours = run(finetune, tiny_llama, dataset, tmp_path / "b", **CASES[case])
    assert_same_run(theirs, ours)


def classification_rows(rows: int) -> Any:
    from datasets import Dataset

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 128, (rows, 12), generator=generator).tolist()
    return Dataset.from_dict(
        {"input_ids": ids, "attention_mask": [[1] * 12] * rows, "labels": [i % 3 for i in range(rows)]}
    )


def test_bert_run_with_dropout_is_bitwise_the_same(tiny_bert: Any, tmp_path: Path) -> None:
    dataset = classification_rows(22)
    theirs = run(transformers, tiny_bert, dataset, tmp_path / "a", gradient_accumulation_steps=1)
    ours = run(finetune, tiny_bert, dataset, tmp_path / "b", gradient_accumulation_steps=1)
    assert_same_run(theirs, ours)


def test_accumulation_does_not_multiply_the_loss_of_models_that_average(tiny_bert: Any, tmp_path: Path) -> None:
    """BERT drops `num_items_in_batch`: transformers then reports, and follows, 4 times the loss. We do not."""
    dataset = classification_rows(16)
    options = {"max_steps": 1, "max_grad_norm": 0.0, "optim": "sgd", "lr_scheduler_type": "constant"}
    options |= {"warmup_steps": 0, "weight_decay": 0.0}
    theirs = run(transformers, tiny_bert, dataset, tmp_path / "a", **options)[0].state.log_history[0]
    ours = run(finetune, tiny_bert, dataset, tmp_path / "b", **options)[0].state.log_history[0]
    assert theirs["loss"] == pytest.approx(4 * ours["loss"], rel=1e-6)
    assert theirs["grad_norm"] == pytest.approx(4 * ours["grad_norm"], rel=1e-5)


def test_the_gradient_does_not_depend_on_how_a_batch_is_cut(tiny_bert: Any, tmp_path: Path) -> None:
    dataset = classification_rows(24)
    options = {"train_sampling_strategy": "sequential", "max_steps": 3}

    def eval_mode_dropout() -> Any:
        return tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)

    runs = [
        run(finetune, eval_mode_dropout, dataset, tmp_path / str(size), **options, per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size)[0].state.log_history
        for size in (1, 2, 8)
    ]  # fmt: skip
    for other in runs[1:]:
        for mine, first in zip(untimed(other), untimed(runs[0]), strict=True):
            assert {k: v for k, v in mine.items() if k != "total_flos"} == pytest.approx(
                {k: v for k, v in first.items() if k != "total_flos"}, rel=1e-5
            )


def test_evaluation_during_training_fires_the_same_events(tiny_bert: Any, tmp_path: Path) -> None:
    dataset = classification_rows(16)
    options = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4, "eval_on_start": True}
    options |= {"gradient_accumulation_steps": 1}
    theirs = run(transformers, tiny_bert, dataset, tmp_path / "a", eval_dataset=dataset, **options)
    ours = run(finetune, tiny_bert, dataset, tmp_path / "b", eval_dataset=dataset, **options)
    assert ours[2] == theirs[2]
    for mine, other in zip(untimed(ours[0].state.log_history), untimed(theirs[0].state.log_history), strict=True):
        assert mine.keys() == other.keys()
        assert mine == pytest.approx(other, abs=1e-6)


def test_gradient_checkpointing_changes_nothing(tiny_llama: Any, padded_dataset: Any, tmp_path: Path) -> None:
    dataset = padded_dataset(12)
    plain = run(finetune, tiny_llama, dataset, tmp_path / "a")
    recomputed = run(finetune, tiny_llama, dataset, tmp_path / "b", gradient_checkpointing=True)
    expected = untimed(plain[0].state.log_history)
    assert untimed(recomputed[0].state.log_history) == expected
    assert not recomputed[0].model.is_activation_checkpointing
