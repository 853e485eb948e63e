"""Evaluation rows of several samples beside padded training rows."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

import finetune
from finetune.errors import ArgumentError

TEXTS = ["the cat sat on a mat", "the red sun went down", "birds sang", "rivers that ran past old stone walls"] * 3
ROWS = Dataset.from_dict({"text": TEXTS})


def make(model: Any, tokenizer: Any, out: Path, *, trainer: Any = finetune.SFTTrainer, **kwargs: Any) -> Any:
    options = {
        "eval_packing": True, "max_length": 32, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 2,
        "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "logging_steps": 1, "learning_rate": 1e-2,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, **kwargs.pop("options", {}),
    }  # fmt: skip
    args = finetune.SFTConfig(str(out), **options)
    return trainer(model, args, train_dataset=ROWS, eval_dataset=ROWS, processing_class=tokenizer, **kwargs)


def losses(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize("options", [{"padding_free": False}, {"torch_compile_backend": "eager"}], ids=str)
def test_packed_evaluation_beside_padded_training(
    options: dict[str, Any], tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path
) -> None:
    """The samples of a row do not see each other, so the loss is that of the rows alone."""
    single = make(tiny_llama(512), chat_tokenizer, tmp_path / "a", options={**options, "eval_packing": False})
    single.train()
    packed = make(tiny_llama(512), chat_tokenizer, tmp_path / "b", options=options)
    assert not packed.padding_free
    assert len(packed.eval_dataset) < len(ROWS)
    packed.train()
    assert losses(packed, "loss") == losses(single, "loss")
    assert losses(packed, "eval_loss") == pytest.approx(losses(single, "eval_loss"), rel=1e-5)
    assert packed.evaluate(ROWS)["eval_loss"] == pytest.approx(losses(packed, "eval_loss")[-1], rel=1e-6)
    assert "attention_mask" in next(iter(packed.get_train_dataloader()))
    assert packed.predict(ROWS).predictions.shape[0] == len(ROWS)


def reads_the_mask(self: Any, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
    outputs = model(**inputs)
    return (outputs.loss, outputs) if return_outputs else outputs.loss


class ReadsTheMask(finetune.SFTTrainer):
    compute_loss = reads_the_mask


@pytest.mark.parametrize(
    "given",
    [
        {"compute_metrics": lambda prediction: {}},
        {"preprocess_logits_for_metrics": lambda logits, labels: logits},
        {"trainer": ReadsTheMask},
        {"data_collator": list},
    ],
    ids=["metrics", "logits", "override", "collator"],
)
def test_packed_evaluation_is_refused_where_a_row_per_sample_is_expected(
    given: dict[str, Any], tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(ArgumentError, match=r"`eval_packing=True` makes .*Set `eval_packing=False`"):
        make(tiny_llama(512), chat_tokenizer, tmp_path, **given)


def test_packed_evaluation_is_refused_for_virtual_tokens(tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    from peft import PromptTuningConfig

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ArgumentError, match=r"`eval_packing=True` makes .*virtual tokens"):
        make(tiny_llama(512), chat_tokenizer, tmp_path, peft_config=config)


def test_rows_wrapped_without_borders_are_evaluated_padded(
    tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path
) -> None:
    options = {"packing_strategy": "wrapped", "padding_free": False}
    trainer = make(tiny_llama(512), chat_tokenizer, tmp_path, options=options)
    assert "attention_mask" in next(iter(trainer.get_eval_dataloader()))
    trainer.train()
    assert len(losses(trainer, "eval_loss")) == 2
