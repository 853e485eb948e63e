"""What TRL 1.16 and this package load by name and train: a model that takes images too, and kept attention outputs."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
from datasets import Dataset

import finetune

TEXTS = ["the cat sat on a mat", "the red sun went down over hills", "birds sang to rivers that ran past"]
OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "max_steps": 3,
    "optim": "sgd",
    "learning_rate": 0.5,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "max_length": 32,
}


def run(library: Any, model: Any, tokenizer: Any, out: Path, **options: Any) -> Any:
    trainer = library.SFTTrainer(
        model=model,
        args=library.SFTConfig(str(out), **{**OPTIONS, **options}),
        train_dataset=Dataset.from_list([{"text": text} for text in TEXTS * 2]),
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_model_that_takes_images_is_loaded_whole_and_trained_the_same(chat_tokenizer: Any, tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    text = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    torch.manual_seed(0)
    transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config={**text, "rope_parameters": rope, "bos_token_id": 1, "eos_token_id": 2},
            vision_config={**vision, "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [0]},
        )
    ).save_pretrained(tmp_path / "base")
    both = [run(each, str(tmp_path / "base"), chat_tokenizer, tmp_path / "out") for each in (trl, finetune)]
    assert type(both[0].model) is type(both[1].model)
    assert losses(both[1]) == pytest.approx(losses(both[0]), abs=1e-5)


def test_selective_checkpointing_is_taken_and_changes_no_loss(
    tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path
) -> None:
    selective = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"selective": True}}
    theirs = losses(run(trl, tiny_llama(512), chat_tokenizer, tmp_path, **selective))
    for options in ({}, {"padding_free": False}, {"packing": True}):
        kept = losses(run(finetune, tiny_llama(512), chat_tokenizer, tmp_path, **options, gradient_checkpointing=False))
        ours = losses(run(finetune, tiny_llama(512), chat_tokenizer, tmp_path, **options, **selective))
        assert ours == kept
        if "packing" not in options:
            assert ours == pytest.approx(theirs, abs=1e-5)
