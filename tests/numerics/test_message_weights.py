"""Turns with a `weight`: from the rows through collator, packing and both losses, against the definition in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

import finetune
from finetune.data.preparation.mapped import has_other_weights

# (question, answer, weight of the answer) for each turn of each row.
CHATS = [
    [("what is your name", "tell me", 0.25), ("tell me more", "the red sun went down", 1.0)],
    [("the cat", "sat on a mat", 3.0)],
    [("walls where children play", "every day", 0.0), ("boats", "made of paper", 0.5), ("and", "birds sang", None)],
]


def rows() -> list[dict[str, Any]]:
    made = []
    for chat in CHATS:
        messages: list[dict[str, Any]] = []
        for question, answer, weight in chat:
            messages += [{"role": "user", "content": question, "weight": None}]
            messages += [{"role": "assistant", "content": answer, "weight": weight}]
        made.append({"messages": messages})
    return made


def reference(model: Any, tokenizer: Any, *, dft: bool = False) -> tuple[torch.Tensor, int]:
    """Returns sum of weight * nll, and the number of trained tokens, each row alone and its logits in full."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for chat in CHATS:
        ids: list[int] = []
        weights: list[float] = []
        for question, answer, weight in chat:
            opening = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
            for text, value in ((opening, 0.0), (f"{answer}<|im_end|>", 1.0 if weight is None else weight), ("\n", 0)):
                part = tokenizer(text, add_special_tokens=False)["input_ids"]
                ids += part
                weights += [value] * len(part)
        log_probs = torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1], -1)
        nll = -log_probs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        factor = torch.exp(-nll.detach()) if dft else 1.0
        total = total + (torch.tensor(weights[1:]) * factor * nll).sum()
        count += sum(weight > 0 for weight in weights[1:])
    return total, count


LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {"padding_free": False},
    "padding-free": {"padding_free": True},
    "packed": {"packing": True, "max_length": 128},
    "dft": {"loss_type": "dft"},
    "padded to a multiple": {"pad_to_multiple_of": 16},
}


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stream", [False, True])
def test_weights_reach_the_loss(
    layout: str, plain: bool, stream: bool, tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    model = tiny_llama(vocab_size=512).double()
    data: Any = Dataset.from_list(rows())
    settings = {"use_cpu": True, "report_to": "none", "gradient_checkpointing": False, "per_device_train_batch_size": 3}
    args = finetune.SFTConfig(str(tmp_path), **{"max_length": 96, "max_steps": 1, **settings, **LAYOUTS[layout]})
    trainer = finetune.SFTTrainer(
        model, args, None, data.to_iterable_dataset() if stream else data, processing_class=chat_tokenizer
    )
    if plain:
        monkeypatch.setattr(type(trainer), "_why_not_fused", lambda self: "asked for")
    expected, count = reference(model, chat_tokenizer, dft=layout == "dft")
    (expected / count).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with trainer.model_features():
        loss = torch.zeros((), dtype=torch.float64)
        for batch in trainer.get_train_dataloader():
            assert "token_weights" in batch
            loss = loss + trainer.compute_loss(model, dict(batch), num_items_in_batch=count)
        loss.backward()
    torch.testing.assert_close(loss, expected / count, rtol=1e-12, atol=1e-12)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-9, atol=1e-12)


def test_tokenized_rows_bring_their_own(tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    data = [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8], "token_weights": [1, 0.5, 0.0, 2.0]}]
    args = finetune.SFTConfig(str(tmp_path), use_cpu=True, report_to="none", padding_free=False)
    model = tiny_llama(vocab_size=512)
    trainer = finetune.SFTTrainer(model, args, None, Dataset.from_list(data), processing_class=chat_tokenizer)
    (batch,) = trainer.get_train_dataloader()
    assert batch["labels"].tolist() == [[-100, 6, -100, 8]]
    assert batch["token_weights"].tolist() == [[1, 0.5, 0, 2]]
    trainer.train()


def test_only_rows_with_other_weights_pay_for_them(tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    message = {"role": "assistant", "content": "a", "weight": 1.0}
    assert has_other_weights(Dataset.from_list([{"messages": [message]}, {"messages": [{**message, "weight": 0.5}]}]))
    assert has_other_weights(Dataset.from_list([{"messages": [message, {**message, "weight": 0}]}])) is False
    assert has_other_weights(Dataset.from_list([{"messages": "[]"}])) is None
    args = finetune.SFTConfig(str(tmp_path), use_cpu=True, report_to="none")
    data = [{"messages": [{"role": "user", "content": "the cat", "weight": None}, message]}] * 2
    trainer = finetune.SFTTrainer(
        tiny_llama(vocab_size=512), args, None, Dataset.from_list(data), processing_class=chat_tokenizer
    )
    assert "token_weights" not in trainer.train_dataset.column_names


def test_a_loss_that_cannot_weigh_is_refused(tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    trainer = finetune.SFTTrainer(
        tiny_llama(vocab_size=512),
        finetune.SFTConfig(str(tmp_path), use_cpu=True, report_to="none", max_steps=1),
        train_dataset=Dataset.from_list(rows()),
        processing_class=chat_tokenizer,
        compute_loss_func=lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum(),
    )
    with pytest.raises(finetune.ArgumentError, match="weight"):
        trainer.train()
