"""A classifier trained without padding below its head goes the way of the padded one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

import finetune

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
HEADS = {"bert": "classifier.weight", "llama": "score.weight"}
STILL: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def make_model(name: str, pad: int) -> Any:
    torch.manual_seed(0)
    common: dict[str, Any] = {
        "vocab_size": 512,
        "num_labels": 3,
        "max_position_embeddings": 64,
        "pad_token_id": pad,
        **SIZES,
    }
    if name == "bert":
        return BertForSequenceClassification(BertConfig(**common, **STILL))
    return LlamaForSequenceClassification(LlamaConfig(**common, num_key_value_heads=2))


def rows() -> Dataset:
    """Returns 24 rows of 1 to 20 tokens whose class is their first token's remainder by 3."""
    make = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 21, (24,), generator=make).tolist()
    ids = [torch.randint(5, 200, (length,), generator=make).tolist() for length in lengths]
    return Dataset.from_dict({"input_ids": ids, "label": [row[0] % 3 for row in ids]})


def run(name: str, out: Path, tokenizer: Any, padding_free: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    args = finetune.SequenceClassificationConfig(
        str(out), padding_free=padding_free, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=8,
        learning_rate=5e-3, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
        eval_strategy="steps", eval_steps=4, class_weights="balanced",
    )  # fmt: skip
    model = make_model(name, tokenizer.pad_token_id)
    trainer = finetune.SequenceClassificationTrainer(
        model, args, train_dataset=rows(), eval_dataset=rows(), processing_class=tokenizer
    )
    trainer.train()
    history = [entry[key] for entry in trainer.state.log_history for key in ("loss", "eval_loss") if key in entry]
    return history, {key: value.detach().clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_padded_run_is_the_padding_free_run(name: str, tmp_path: Path, chat_tokenizer: Any) -> None:
    losses, weights = run(name, tmp_path / "free", chat_tokenizer, True)
    wanted, others = run(name, tmp_path / "padded", chat_tokenizer, False)
    assert len(losses) == 8 + 2
    assert losses == pytest.approx(wanted, abs=1e-5)
    started = make_model(name, chat_tokenizer.pad_token_id).state_dict()
    assert float((weights[HEADS[name]] - started[HEADS[name]]).abs().max()) > 1e-2
    assert max(float((weights[key] - others[key]).abs().max()) for key in weights) < 1e-5
