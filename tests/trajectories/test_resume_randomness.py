"""Exact resume of runs whose batches are drawn at random: masks of a masked language model, augmented rows."""

import importlib.util
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

import finetune

spec = importlib.util.spec_from_file_location("resume_helpers", Path(__file__).with_name("test_resume.py"))
assert spec is not None and spec.loader is not None
helpers: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(helpers)

NUM_ROWS = 22


def augmented(i: int) -> dict[str, Any]:
    """A row that comes out differently each time, by three generators."""
    length = 6 + i % 5
    ids = torch.randint(5, 100, (length,)).tolist()
    ids[random.randrange(length)] = int(np.random.randint(5, 100))
    return {"input_ids": ids, "labels": ids, "attention_mask": [1] * length}


class Rows(Dataset):
    def __len__(self) -> int:
        return NUM_ROWS

    def __getitem__(self, i: int) -> dict[str, Any]:
        return augmented(i)


class Stream(IterableDataset):
    """Rows in order; their position is the number of rows read."""

    def __init__(self) -> None:
        self.read = 0

    def __iter__(self) -> Any:
        while self.read < NUM_ROWS:
            self.read += 1
            yield augmented(self.read - 1)
        self.read = 0

    def state_dict(self) -> dict[str, Any]:
        return {"read": self.read}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.read = state["read"]


def pad(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pads to the longest row, on a side that is drawn."""
    width, left = max(len(row["input_ids"]) for row in rows), random.random() < 0.5

    def fill(values: list[int], value: int) -> list[int]:
        padding = [value] * (width - len(values))
        return padding + values if left else values + padding

    values = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {name: torch.tensor([fill(row[name], value) for row in rows]) for name, value in values.items()}


CASES: dict[str, dict[str, Any]] = {
    "shuffled": {},
    "no accumulation": {"gradient_accumulation_steps": 1},
    "in order": {"train_sampling_strategy": "sequential"},
    "balanced": {"train_sampling_strategy": "batch_rebalance"},
    "a stream": {"stream": True, "max_steps": 11},
}


@pytest.mark.parametrize(("case", "at"), [*((case, 8) for case in CASES), ("shuffled", 1), ("shuffled", 5)])
def test_random_rows_and_collator(case: str, at: int, tiny_llama: Any, tmp_path: Path) -> None:
    options = dict(CASES[case])
    stream = options.pop("stream", False)

    def build(out: Path, *callbacks: Any) -> finetune.Trainer:
        return finetune.Trainer(
            tiny_llama(attention_dropout=0.1),
            finetune.TrainingArguments(str(out), **{**helpers.COMMON, **options}),
            data_collator=pad,
            train_dataset=Stream() if stream else Rows(),
            callbacks=list(callbacks),
        )

    whole = build(tmp_path / "whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "cut", helpers.Interrupt(at)).train()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(99)
    resumed = build(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    helpers.assert_equal(helpers.everything(resumed), helpers.everything(whole))


@pytest.mark.parametrize("at", [2])
def test_masked_language_model(at: int, chat_tokenizer: Any, tmp_path: Path) -> None:
    """The usual collator draws other masks in every epoch; a resumed run must draw the same ones."""
    from transformers import BertConfig, BertForMaskedLM, DataCollatorForLanguageModeling

    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = chat_tokenizer
    if tokenizer.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": "<mask>"})
    texts = [f"the cat sat on the mat {'and slept ' * (i % 4)}" for i in range(18)]
    rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in texts]

    def build(out: Path, *callbacks: Any) -> finetune.Trainer:
        torch.manual_seed(0)
        return finetune.Trainer(
            BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), intermediate_size=32, **sizes)),
            finetune.TrainingArguments(str(out), **helpers.COMMON),
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3),
            train_dataset=rows,
            callbacks=list(callbacks),
        )

    whole = build(tmp_path / "whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "cut", helpers.Interrupt(at)).train()
    torch.manual_seed(99)
    resumed = build(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    helpers.assert_equal(helpers.everything(resumed), helpers.everything(whole))
