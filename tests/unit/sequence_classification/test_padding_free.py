"""`padding_free` of sequence classification: where it acts, where it refuses, and that nothing of it stays behind."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig
from transformers import BertConfig, BertForSequenceClassification

import finetune
from finetune.errors import ArgumentError
from finetune.kernels.attention import ATTENTION_NAME
from finetune.kernels.packed_scores import RowsUnderWay
from finetune.sequence_classification import padding

TEXTS = [
    "the sun",
    "birds sang to the sun over the hills",
    "a stone",
    "old stone walls",
    "red",
    "play every single day",
]
ROWS = Dataset.from_dict({"text": TEXTS * 2, "label": [1, 1, 0, 0, 1, 1] * 2})


class Stop(Exception):
    pass


class Stopping(finetune.SequenceClassificationTrainer):
    """Fails in the second step, inside the model."""

    calls = 0

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == 2:
            layer = model.bert.encoder.layer[1]
            hook = layer.register_forward_pre_hook(fail)
            try:
                return super().compute_loss(model, inputs, *args, **kwargs)
            finally:
                hook.remove()
        return super().compute_loss(model, inputs, *args, **kwargs)


def fail(*_: Any) -> None:
    raise Stop


def make_model(**settings: Any) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "num_labels": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = BertConfig(vocab_size=512, max_position_embeddings=64, **{**sizes, **settings})
    return BertForSequenceClassification(config)


def make(
    out: Path,
    tokenizer: Any,
    model: Any = None,
    kind: Any = finetune.SequenceClassificationTrainer,
    peft_config: Any = None,
    **arguments: Any,
) -> Any:
    settings = {
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "max_steps": 3, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "use_cpu": True, "class_names": ["bad", "good"],
    }  # fmt: skip
    args = finetune.SequenceClassificationConfig(str(out), **{**settings, **arguments})
    return kind(
        make_model() if model is None else model, args, train_dataset=ROWS, eval_dataset=ROWS,
        processing_class=tokenizer, peft_config=peft_config,
    )  # fmt: skip


def rows_seen(trainer: Any) -> list[int]:
    """Returns a list that fills with the rows of each batch that reaches the first layer."""
    seen: list[int] = []
    layers = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    layers.bert.encoder.layer[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
    return seen


def hooks_of(model: Any) -> list[tuple[str, int, int]]:
    return [(name, len(each._forward_hooks), len(each._forward_pre_hooks)) for name, each in model.named_modules()]


# ---- Where it acts ----


@pytest.mark.parametrize("wanted", [None, True])
def test_it_acts_in_training_evaluation_and_prediction(
    wanted: bool | None, tmp_path: Path, chat_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make(tmp_path, chat_tokenizer, padding_free=wanted)
    assert "batches: padding-free" in capsys.readouterr().out.splitlines()
    for work in (trainer.train, trainer.evaluate, lambda: trainer.predict(ROWS)):
        seen = rows_seen(trainer)
        work()
        assert seen == [1] * 3


def test_all_processes_do_what_the_first_one_found(
    tmp_path: Path, chat_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under FSDP the others may hold no weights to try."""
    said: list[Any] = []
    monkeypatch.setattr(padding, "broadcast_object", lambda mine: said.append(mine) or "the first says no")
    trainer = make(tmp_path, chat_tokenizer)
    seen = rows_seen(trainer)
    trainer.train()
    assert said == [None] and seen == [4] * 3
    with pytest.raises(ArgumentError, match=r"`padding_free=True` is not possible: the first says no"):
        make(tmp_path, chat_tokenizer, padding_free=True)
    monkeypatch.setattr(padding, "why_not_unpadded", lambda *_: "no weights here")
    monkeypatch.setattr(padding, "broadcast_object", lambda mine: None)
    make(tmp_path, chat_tokenizer, padding_free=True)


def test_false_pads_and_says_nothing(tmp_path: Path, chat_tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make(tmp_path, chat_tokenizer, padding_free=False)
    assert "batches:" not in capsys.readouterr().out
    seen = rows_seen(trainer)
    trainer.train()
    assert seen == [4] * 3


def test_adapters_are_looked_through(tmp_path: Path, chat_tokenizer: Any) -> None:
    trainer = make(tmp_path, chat_tokenizer, padding_free=True, peft_config=LoraConfig(target_modules="all-linear"))
    seen = rows_seen(trainer)
    trainer.train()
    assert seen == [1] * 3


def test_metrics_and_predictions_are_those_of_padded_batches(tmp_path: Path, chat_tokenizer: Any) -> None:
    free, padded = (make(tmp_path, chat_tokenizer, padding_free=value) for value in (True, False))
    found, wanted = free.evaluate(), padded.evaluate()
    assert found["eval_loss"] == pytest.approx(wanted["eval_loss"], abs=1e-6)
    assert found["eval_accuracy"] == wanted["eval_accuracy"]
    logits, others = free.predict(ROWS).predictions, padded.predict(ROWS).predictions
    assert abs(logits - others).max() < 1e-6


# ---- Where it refuses ----

REFUSALS = {
    "compiled": ({"torch_compile": True}, {}, None, "compiled layers want few different shapes"),
    "multiple": ({"pad_to_multiple_of": 8}, {}, None, "`pad_to_multiple_of` asks for padding"),
    "every layer": ({}, {"output_hidden_states": True}, None, "asks for every layer as padded"),
    "virtual tokens": ({}, {}, PromptTuningConfig(num_virtual_tokens=2, task_type="SEQ_CLS"), "virtual tokens before"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_is_said(
    name: str, tmp_path: Path, chat_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, settings, peft_config, reason = REFUSALS[name]
    with pytest.raises(ArgumentError, match=f"`padding_free=True` is not possible: .*{reason}"):
        make(tmp_path, chat_tokenizer, make_model(**settings), peft_config=peft_config, padding_free=True, **arguments)
    capsys.readouterr()
    trainer = make(tmp_path, chat_tokenizer, make_model(**settings), peft_config=peft_config, **arguments)
    said = capsys.readouterr().out
    assert "batches: padded, because" in said
    assert reason in said
    assert not trainer._padding_free


def test_a_model_whose_rows_would_mix_stays_padded(
    tmp_path: Path, chat_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model()
    model.bert.encoder.layer[0].register_forward_hook(lambda _, __, output: output + 1e-2 * output.roll(1, dims=1))
    trainer = make(tmp_path, chat_tokenizer, model)
    assert "batches: padded, because hidden states without padding are" in capsys.readouterr().out
    seen = rows_seen(trainer)
    trainer.train()
    assert seen == [4] * 3


# ---- Nothing stays behind ----


@pytest.mark.parametrize("fails", [False, True])
def test_no_trace(fails: bool, tmp_path: Path, chat_tokenizer: Any) -> None:
    model = make_model()
    hooks, attention, names = hooks_of(model), model.config._attn_implementation, list(model.state_dict())
    trainer = make(tmp_path, chat_tokenizer, model, Stopping if fails else finetune.SequenceClassificationTrainer)
    assert trainer._padding_free
    assert hooks_of(model) == hooks
    if fails:
        with pytest.raises(Stop):
            trainer.train()
        trainer.evaluate()  # and it is put on again
    else:
        trainer.train()
    assert hooks_of(model) == hooks
    assert model.config._attn_implementation == attention
    assert list(model.state_dict()) == names
    assert RowsUnderWay.count == 0


def test_checkpoints_do_not_name_the_attention(tmp_path: Path, chat_tokenizer: Any) -> None:
    trainer = make(tmp_path, chat_tokenizer, padding_free=True, save_strategy="steps", save_steps=3)
    trainer.train()
    text = (tmp_path / "checkpoint-3" / "config.json").read_text()
    assert json.loads(text)["id2label"] == {"0": "bad", "1": "good"}
    assert ATTENTION_NAME not in text
