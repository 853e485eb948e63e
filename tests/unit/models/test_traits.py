"""`ModelTraits` must say what the constructor of transformers' Trainer finds out about the same model."""

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from finetune.errors import ArgumentError
from finetune.models.traits import check_trainable, inspect_model


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )


def bert_config() -> BertConfig:
    return BertConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)


def t5() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8, decoder_start_token_id=0)
    )


MODELS = {
    "llama": llama,
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16)),
    "bert": lambda: BertForSequenceClassification(bert_config()),
    "question answering": lambda: BertForQuestionAnswering(bert_config()),
    "t5": t5,
}


@pytest.mark.parametrize("name", MODELS)
def test_agrees_with_transformers_trainer(name: str, tmp_path) -> None:
    model = MODELS[name]()
    trainer = Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    traits = inspect_model(model)
    assert list(traits.label_names) == trainer.label_names
    assert traits.accepts_loss_kwargs == trainer.model_accepts_loss_kwargs
    assert traits.can_return_loss == trainer.can_return_loss
    assert traits.shifts_labels == trainer._loss_shifts_labels


def test_known_values() -> None:
    causal, encoder_decoder, answers = (inspect_model(MODELS[n]()) for n in ("llama", "t5", "question answering"))
    assert causal.shifts_labels and causal.label_names == ("labels",)
    assert not encoder_decoder.shifts_labels
    assert answers.label_names == ("start_positions", "end_positions") and not answers.shifts_labels


def test_wrappers_change_nothing() -> None:
    from peft import LoraConfig, get_peft_model

    model = llama()
    plain = inspect_model(model)
    assert inspect_model(nn.DataParallel(model)) == plain
    assert inspect_model(torch.compile(model, backend="eager")) == plain
    assert inspect_model(get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))) == plain


def test_a_plain_module_has_no_loss_of_its_own() -> None:
    class Regression(nn.Module):
        def forward(self, x, labels=None): ...

    traits = inspect_model(Regression())
    assert traits.label_names == ("labels",)
    assert not traits.accepts_loss_kwargs and not traits.shifts_labels and not traits.can_return_loss
    assert inspect_model(Regression(), ["y"]).label_names == ("y",)


def test_untrainable_models_are_refused() -> None:
    with pytest.raises(ArgumentError, match="AutoModelForCausalLM"):
        check_trainable(BertModel(bert_config()))
    frozen = llama().requires_grad_(False)
    with pytest.raises(ArgumentError, match="peft_config"):
        check_trainable(frozen)
    check_trainable(llama())


def test_quantized_models_need_adapters() -> None:
    model = llama()
    model.is_quantized = True

    class Quantizer:
        is_trainable = True
        is_qat_trainable = False

    model.hf_quantizer = Quantizer()
    with pytest.raises(ArgumentError, match="quantized and has no adapters"):
        check_trainable(model)
    Quantizer.is_qat_trainable = True
    check_trainable(model)
    Quantizer.is_trainable = False
    with pytest.raises(ArgumentError, match="cannot be trained"):
        check_trainable(model)
