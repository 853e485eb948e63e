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


# ---- Random in ways that no checkpoint can repeat: resumed all the same, with a warning ----


class OwnGenerator(Dataset):
    """Rows drawn by a generator of the dataset's own, which nobody seeds."""

    def __init__(self, shift: int = 0) -> None:
        self.own, self.shift, self.num_read = random.Random(), shift, 0

    def __len__(self) -> int:
        return NUM_ROWS

    def __getitem__(self, i: int) -> dict[str, Any]:
        self.num_read += 1
        ids = [5 + (i + self.shift) % 50, *(self.own.randrange(5, 100) for _ in range(5))]
        return {"input_ids": ids, "labels": ids, "attention_mask": [1] * 6}


class MaskedStream(Stream):
    """A stream whose rows are masked as they are read: in the workers, where there are any."""

    def __init__(self, shift: int = 0, own: bool = False) -> None:
        super().__init__()
        self.shift, self.draw = shift, random.Random().random if own else random.random

    def __iter__(self) -> Any:
        while self.read < NUM_ROWS:
            self.read += 1
            ids = [5 + self.read + self.shift] * 6
            labels = [token if self.draw() < 0.5 else -100 for token in ids]
            yield {"input_ids": ids, "labels": labels, "attention_mask": [1] * 6}
        self.read = 0


class CountedStream(MaskedStream):
    """The same rows each time."""

    def __init__(self, shift: int = 0) -> None:
        super().__init__(shift)
        self.draw = lambda: 0.0


def run_on(data: Any, make_model: Any, out: Path, *callbacks: Any, **options: Any) -> finetune.Trainer:
    return finetune.Trainer(
        make_model(),
        finetune.TrainingArguments(str(out), **{**helpers.COMMON, "max_steps": 6, **options}),
        train_dataset=data,
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize(
    ("data", "options"),
    [
        (OwnGenerator, {}),
        (OwnGenerator, {"train_sampling_strategy": "sequential"}),
        (lambda: MaskedStream(own=True), {}),
        (MaskedStream, {"dataloader_num_workers": 1}),
        (MaskedStream, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}),
    ],
)
def test_rows_that_cannot_be_drawn_again_do_not_stop_a_resume(
    data: Any, options: dict[str, Any], tiny_llama: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_on(data(), tiny_llama, tmp_path, helpers.Interrupt(3), **options).train()
    seen: list[list[int]] = []

    class Firsts(finetune.Trainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            seen.append(inputs["input_ids"][:, 0].tolist())
            return super().training_step(model, inputs, num_items_in_batch)

    args = finetune.TrainingArguments(str(tmp_path), **{**helpers.COMMON, "max_steps": 6, **options})
    resumed = Firsts(tiny_llama(), args, train_dataset=data())
    assert resumed.train(resume_from_checkpoint=True).global_step == 6
    assert "their generator is not in the checkpoint" in caplog.text
    resumed_rows, seen[:] = list(seen), []
    Firsts(
        tiny_llama(), finetune.TrainingArguments(str(tmp_path / "whole"), **args_of(args)), train_dataset=data()
    ).train()
    assert resumed_rows == seen[6:], "the same rows, each marked by its first token"


def args_of(args: Any) -> dict[str, Any]:
    names = ("max_steps", "dataloader_num_workers", "dataloader_persistent_workers", "train_sampling_strategy")
    return {**helpers.COMMON, **{name: getattr(args, name) for name in names}}


@pytest.mark.parametrize(
    ("data", "options"),
    [
        (CountedStream, {}),
        (CountedStream, {"dataloader_num_workers": 1}),
        (CountedStream, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}),
    ],
)
def test_other_rows_are_still_refused(data: Any, options: dict[str, Any], tiny_llama: Any, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_on(data(), tiny_llama, tmp_path, helpers.Interrupt(3), **options).train()
    with pytest.raises(finetune.CheckpointError, match="does not continue with the batch"):
        run_on(data(shift=1), tiny_llama, tmp_path, **options).train(resume_from_checkpoint=True)


def test_a_save_reads_random_rows_once(tiny_llama: Any, tmp_path: Path) -> None:
    data = OwnGenerator()
    run_on(data, tiny_llama, tmp_path, async_save=False).train()
    without = OwnGenerator()
    run_on(without, tiny_llama, tmp_path / "without", save_strategy="no").train()
    assert data.num_read - without.num_read == 2 * 32, "six checkpoints, and one comparison"


def test_a_loader_of_ones_own_without_a_data_set(tiny_llama: Any, tmp_path: Path) -> None:
    """Any sized iterable trains, saves and resumes; where its rows stand is not compared."""
    batches = [{"input_ids": torch.full((2, 6), 5 + i), "labels": torch.full((2, 6), 5 + i)} for i in range(12)]

    class Own(finetune.Trainer):
        def get_train_dataloader(self) -> Any:
            return batches

    def build(out: Path, *callbacks: Any) -> finetune.Trainer:
        args = finetune.TrainingArguments(str(out), **{**helpers.COMMON, "num_train_epochs": 1})
        return Own(tiny_llama(), args, callbacks=list(callbacks))

    whole = build(tmp_path / "whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "cut", helpers.Interrupt(4)).train()
    resumed = build(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    helpers.assert_equal(helpers.everything(resumed)["weights"], helpers.everything(whole)["weights"])
