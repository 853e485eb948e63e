"""What users override in `SFTTrainer`, written as for TRL: the same losses as under TRL."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from torch.nn.functional import cross_entropy

import finetune

ROWS = [{"prompt": "the cat " + word, "completion": " sat on " * (i % 3 + 1)} for i, word in enumerate("abcdefgh")]


def shifted_loss(logits: Any, labels: Any) -> Any:
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def from_logits_beside_labels(self: Any, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
    outputs = model(**inputs)
    loss = shifted_loss(outputs.logits, inputs["labels"])
    return (loss, outputs) if return_outputs else loss


def from_named_inputs(self: Any, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
    outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    loss = shifted_loss(outputs.logits, inputs["labels"])
    return (loss, outputs) if return_outputs else loss


def one_loss_per_row(self: Any, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
    outputs = [model(**{name: inputs[name][i : i + 1] for name in inputs}) for i in range(len(inputs["input_ids"]))]
    loss = torch.stack([each.loss for each in outputs]).mean()
    return (loss, outputs[0]) if return_outputs else loss


def a_penalty_on_the_logits(self: Any, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
    loss, outputs = super(type(self), self).compute_loss(model, inputs, return_outputs=True, **kwargs)
    loss = loss + 1e-2 * outputs.logits.pow(2).mean()
    return (loss, outputs) if return_outputs else loss


class Perplexity(transformers.TrainerCallback):
    """Calls the model that trains, as callbacks that sample or measure do."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        tokens = torch.tensor([[5, 6, 7]])
        with torch.no_grad():
            outputs = model(input_ids=tokens, labels=tokens)
        assert outputs.logits.shape[:2] == (1, 3)
        assert outputs.loss == pytest.approx(shifted_loss(outputs.logits, tokens))


def losses(library: Any, tiny_llama: Any, tokenizer: Any, out: Path, *, override: Any = None, **kwargs: Any) -> Any:
    options = {
        "per_device_train_batch_size": 2, "max_steps": 3, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 3,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False,
        "learning_rate": 1e-2, "optim": "sgd", **kwargs.pop("options", {}),
    }  # fmt: skip
    methods = {} if override is None else {"compute_loss": override}
    trainer = type("Mine", (library.SFTTrainer,), methods)(
        model=tiny_llama(vocab_size=512),
        args=library.SFTConfig(str(out), **options),
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(ROWS[:4]),
        processing_class=copy.deepcopy(tokenizer),
        **kwargs,
    )
    trainer.train()
    return [entry.get("loss", entry.get("eval_loss")) for entry in trainer.state.log_history[:-1]]


@pytest.mark.parametrize(
    "override", [from_logits_beside_labels, from_named_inputs, one_loss_per_row, a_penalty_on_the_logits]
)
def test_a_compute_loss_written_for_trl(override: Any, tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    expected = losses(trl, tiny_llama, chat_tokenizer, tmp_path / "a", override=override)
    assert losses(finetune, tiny_llama, chat_tokenizer, tmp_path / "b", override=override) == pytest.approx(expected)


def test_a_callback_gets_the_logits_of_the_model_in_training(
    tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path
) -> None:
    losses(finetune, tiny_llama, chat_tokenizer, tmp_path, callbacks=[Perplexity()])


@pytest.mark.parametrize(
    "options",
    [
        {"compute_metrics": lambda prediction: {"rows": float(len(prediction.predictions))}},
        {"override": lambda self, *args, **kwargs: super(type(self), self).compute_loss(*args, **kwargs)},
        {"override": a_penalty_on_the_logits},
    ],
    ids=["metrics", "override", "override that reads logits"],
)
def test_labels_are_smoothed_whoever_reads_the_logits(
    options: dict[str, Any], tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path
) -> None:
    options = {**options, "options": {"label_smoothing_factor": 0.3}}
    expected = losses(trl, tiny_llama, chat_tokenizer, tmp_path / "a", **copy.deepcopy(options))
    assert losses(finetune, tiny_llama, chat_tokenizer, tmp_path / "b", **options) == pytest.approx(expected)
