"""Adapters under ZeRO-3 are checkpointed the only way that works there, and everything else as it was asked for."""

from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.arguments import TrainingArguments
from finetune.engine import features
from finetune.errors import ArgumentError


def entered(monkeypatch: pytest.MonkeyPatch, stage: int, **kwargs: Any) -> dict[str, Any] | None:
    """Returns the checkpointing arguments that reach a LoRA model under ZeRO `stage`."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(vocab_size=8, **size)), LoraConfig(target_modules=["q_proj"]))
    args: Any = TrainingArguments(
        "unused", use_cpu=True, report_to="none", activation_checkpointing=True,
        activation_checkpointing_kwargs=kwargs or None,
    )  # fmt: skip
    args.__dict__["deepspeed_plugin"] = SimpleNamespace(zero_stage=stage) if stage else None
    seen: list[Any] = []

    def spy(model: Any, enabled: bool, kwargs: Any) -> Any:
        seen.append(kwargs)
        return ExitStack()

    monkeypatch.setattr(features, "activation_checkpointing", spy)
    with ExitStack() as stack:
        features.enter(stack, model, args, None, None, recomputes=True)
    return seen[0]


def test_adapters_under_zero_3_are_checkpointed_reentrantly(monkeypatch: pytest.MonkeyPatch) -> None:
    assert entered(monkeypatch, 3) == {"use_reentrant": True}
    assert entered(monkeypatch, 2) == {} == entered(monkeypatch, 0)
    assert entered(monkeypatch, 2, use_reentrant=False) == {"use_reentrant": False}
    with pytest.raises(ArgumentError, match="need reentrant checkpointing"):
        entered(monkeypatch, 3, use_reentrant=False)
