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


class Counts:
    """Metrics that keep what they were given."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, prediction: Any) -> dict[str, float]:
        self.shapes.append(prediction.label_ids.shape)
        return {"rows": float(len(prediction.predictions))}


@pytest.mark.parametrize(
    "options",
    [
        {"packing": True, "eval_packing": None},
        {"packing": True, "eval_packing": False},
        {"padding_free": True, "eval_packing": None},
        {"packing": True, "packing_strategy": "wrapped", "eval_packing": None},
    ],
    ids=str,
)
def test_metrics_get_a_row_of_predictions_for_each_row(
    options: dict[str, Any], tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path
) -> None:
    counts = Counts()
    trainer = make(tiny_llama(512), chat_tokenizer, tmp_path, options=options, compute_metrics=counts)
    assert trainer.evaluate()["eval_rows"] == len(ROWS)
    longest = max(len(row["input_ids"]) for row in trainer.eval_dataset)
    assert counts.shapes == [(len(ROWS), longest)]
    if "packing_strategy" not in options:  # wrapped rows run into each other
        plain = make(tiny_llama(512), chat_tokenizer, tmp_path, options=options)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)
    trainer.train()
    assert losses(trainer, "eval_rows") == [len(ROWS)] * 2
    assert trainer.evaluate(ROWS)["eval_rows"] == len(ROWS)


@pytest.mark.parametrize("reader", ["compute_metrics", "preprocess_logits_for_metrics"])
def test_packed_evaluation_is_refused_for_metrics_beside_packed_training_too(
    reader: str, tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(ArgumentError, match=r"`eval_packing=True` makes .*Set `eval_packing=False`"):
        make(tiny_llama(512), chat_tokenizer, tmp_path, options={"packing": True}, **{reader: lambda *_: {}})


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
