"""Windows of micro-batches without a label: their loss is 0, they change no weight, and the log says so."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

import finetune

LABELLED, UNLABELLED = [-100, 6, 7, 8], [-100] * 4


def rows_of(labels: list[list[int]], **columns: Any) -> Dataset:
    ids = [[5, 6 + i % 3, 7, 8] for i in range(len(labels))]
    return Dataset.from_dict({"input_ids": ids, "labels": labels, **columns})


def trained(model: Any, tokenizer: Any, out: Path, rows: Dataset, **options: Any) -> tuple[list[float], dict[str, Any]]:
    """Returns the losses of plain SGD over the rows as they are, in their order, and the weights."""
    keywords = {name: options.pop(name) for name in ("compute_loss_func",) if name in options}
    settings = {
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1,
        "num_train_epochs": 1, "per_device_train_batch_size": 1, "optim": "sgd", "learning_rate": 0.1,
        "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential",
        "dataset_kwargs": {"skip_prepare_dataset": True}, **options,
    }  # fmt: skip
    trainer = finetune.SFTTrainer(
        model, finetune.SFTConfig(str(out), **settings), train_dataset=rows, processing_class=tokenizer, **keywords
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: value.clone() for name, value in model.state_dict().items()}


def mean(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(outputs["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten())


CASES: dict[str, dict[str, Any]] = {
    "fused": {},
    "padded": {"padding_free": False},
    "padding-free": {"padding_free": True},
    "smoothed": {"label_smoothing_factor": 0.1},
    "dft": {"loss_type": "dft"},
    "function": {"compute_loss_func": mean},
    "counts per process": {"average_tokens_across_devices": False},
}


@pytest.mark.parametrize("case", CASES)
def test_what_has_no_labels_changes_nothing(
    case: str, tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path, caplog: Any
) -> None:
    """The second window has no labels, and the last window one micro-batch without."""
    rows = rows_of([LABELLED, LABELLED, UNLABELLED, UNLABELLED, UNLABELLED, LABELLED])
    options = {**CASES[case], "gradient_accumulation_steps": 2}
    losses, weights = trained(tiny_llama(512), chat_tokenizer, tmp_path, rows, **options)
    assert losses[1] == 0.0
    assert "1 of the updates after step 1, up to step 2, had no label in the loss" in caplog.text
    assert caplog.text.count("no label in the loss") == 1
    alone, expected = trained(tiny_llama(512), chat_tokenizer, tmp_path, rows.select([0, 1, 5]), **options)
    assert [losses[0], losses[2]] == pytest.approx(alone, rel=1e-6) and min(alone) > 0
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)


def test_rows_with_weights(tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    rows = rows_of([LABELLED, UNLABELLED], token_weights=[[0.0, 1.0, 0.5, 1.0]] * 2)
    losses, _ = trained(tiny_llama(512), chat_tokenizer, tmp_path, rows)
    assert losses[0] > 1 and losses[1] == 0.0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_plain_trainer(accumulation: int, tiny_bert: Any, tmp_path: Path) -> None:
    """A classifier averages over its own micro-batch, whatever it is told."""
    labels = [0, 1, -100, -100, 2, 1] if accumulation == 2 else [0, -100, 2]
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7 + i] for i in range(len(labels))], "labels": labels})
    options: dict[str, Any] = {
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulation, "logging_steps": 1,
        "num_train_epochs": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        "optim": "sgd", "learning_rate": 0.1, "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    found = []
    for kept in (range(len(labels)), [index for index, label in enumerate(labels) if label != -100]):
        model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        trainer = finetune.Trainer(
            model, finetune.TrainingArguments(str(tmp_path), **options), train_dataset=rows.select(kept)
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found.append((losses, {name: value.clone() for name, value in model.state_dict().items()}))
    (losses, weights), (alone, expected) = found
    assert losses[1] == 0.0 and [losses[0], losses[2]] == alone
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())
