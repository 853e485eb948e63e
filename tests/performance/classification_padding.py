"""Classification, padded against padding-free: processor seconds of a step, shuffled and grouped by length.

    OMP_NUM_THREADS=1 python tests/performance/classification_padding.py

BERT of MiniLM-L6's shape with random weights, batch 16, float32, rows of log-normal length (median 32, 8 to 128
tokens), AdamW. The sides take turns; the median of their runs is printed.
"""

import statistics
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

import finetune

STEPS, TURNS, BATCH = 8, 3, 16


def make_rows() -> Dataset:
    make = torch.Generator().manual_seed(0)
    lengths = torch.exp(torch.randn(STEPS * BATCH, generator=make) * 0.7 + 3.466).round().clamp(8, 128).int().tolist()
    ids = [torch.randint(5, 30000, (length,), generator=make).tolist() for length in lengths]
    return Dataset.from_dict({"input_ids": ids, "label": [index % 2 for index in range(len(ids))]})


def make_tokenizer() -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"[PAD]": 0})), pad_token="[PAD]")


def measure(sampling: str, padding_free: bool, folder: str) -> dict[str, float]:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    args = finetune.SequenceClassificationConfig(
        folder, padding_free=padding_free, train_sampling_strategy=sampling, per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH, max_steps=STEPS, logging_steps=STEPS, save_strategy="no", report_to="none",
        disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = finetune.SequenceClassificationTrainer(
        BertForSequenceClassification(config), args, train_dataset=make_rows(), processing_class=make_tokenizer()
    )
    found = {}
    for name, work in (("train", trainer.train), ("evaluate", lambda: trainer.evaluate(trainer.train_dataset))):
        start = time.process_time()
        work()
        found[name] = (time.process_time() - start) / STEPS
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for sampling in ("random", "group_by_length"):
            turns = [{free: measure(sampling, free, folder) for free in (False, True)} for _ in range(TURNS)]
            for name in ("train", "evaluate"):
                padded, free = (statistics.median(turn[side][name] for turn in turns) for side in (False, True))
                print(f"{sampling}, {name}: {padded:.3f} s padded, {free:.3f} s padding-free, {padded / free:.2f}x")


if __name__ == "__main__":
    main()
