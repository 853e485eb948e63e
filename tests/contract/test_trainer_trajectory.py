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


def test_bert_run_with_dropout_is_bitwise_the_same(tiny_bert: Any, tmp_path: Path) -> None:
    from datasets import Dataset

    generator = torch.Generator().manual_seed(0)
    dataset = Dataset.from_dict(
        {
            "input_ids": torch.randint(5, 128, (22, 12), generator=generator).tolist(),
            "attention_mask": [[1] * 12] * 22,
            "labels": [i % 3 for i in range(22)],
        }
    )
    theirs = run(transformers, tiny_bert, dataset, tmp_path / "a")
    ours = run(finetune, tiny_bert, dataset, tmp_path / "b")
    assert_same_run(theirs, ours)


def test_evaluation_during_training_fires_the_same_events(tiny_bert: Any, tmp_path: Path) -> None:
    from datasets import Dataset

    generator = torch.Generator().manual_seed(0)
    rows = {
        "input_ids": torch.randint(5, 128, (16, 12), generator=generator).tolist(),
        "labels": [i % 3 for i in range(16)],
    }
    dataset = Dataset.from_dict(rows)
    options = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4, "eval_on_start": True}
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
    assert [e.get("loss") for e in recomputed[0].state.log_history] == [e.get("loss") for e in plain[0].state.log_history]
    assert not recomputed[0].model.is_gradient_checkpointing
