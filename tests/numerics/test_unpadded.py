"""A classifier whose trunk leaves padding out must give the logits, losses and gradients of the padded one."""

import copy
import functools
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn

from finetune.kernels.packed_scores import RowsUnderWay
from finetune.kernels.unpadded import use_unpadded_trunk, why_not_unpadded

LENGTHS = (9, 1, 14, 3, 40, 6)
COMMON = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "num_labels": 3,
}  # fmt: skip
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DECODER = {"num_key_value_heads": 2, "head_dim": 8, "attention_dropout": 0.0}
NARROW = {"sliding_window": 5}
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "bert": (hf.BertForSequenceClassification, hf.BertConfig, STILL),
    "roberta": (hf.RobertaForSequenceClassification, hf.RobertaConfig, {**STILL, "pad_token_id": 1}),
    "electra": (hf.ElectraForSequenceClassification, hf.ElectraConfig, {**STILL, "embedding_size": 16}),
    "distilbert": (
        hf.DistilBertForSequenceClassification, hf.DistilBertConfig,
        {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "dropout": 0.0, "attention_dropout": 0.0,
         "seq_classif_dropout": 0.0}),
    "llama": (hf.LlamaForSequenceClassification, hf.LlamaConfig, DECODER),
    "qwen2": (hf.Qwen2ForSequenceClassification, hf.Qwen2Config, DECODER),
    "mistral, window": (hf.MistralForSequenceClassification, hf.MistralConfig, {**DECODER, **NARROW}),
    "gemma2, soft cap and window": (
        hf.Gemma2ForSequenceClassification, hf.Gemma2Config,
        {**DECODER, **NARROW, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 8}),
    "gpt2, learned positions": (
        hf.GPT2ForSequenceClassification, hf.GPT2Config,
        {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}),
    "modernbert": (
        hf.ModernBertForSequenceClassification, hf.ModernBertConfig,
        {"local_attention": 8, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}),
}  # fmt: skip


@functools.cache
def _original(name: str) -> nn.Module:
    model_class, config_class, settings = MODELS[name]
    torch.manual_seed(0)
    config = config_class(**{**COMMON, **settings})
    # Only explicit scores honour caps, and they are NaN in float64 where padding sees nothing.
    capped = "attn_logit_softcapping" in settings
    model = model_class._from_config(config, attn_implementation="eager" if capped else "sdpa").train()
    model.to(torch.float32 if capped else torch.float64)
    for parameter in model.parameters():
        if parameter.ndim == 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return model


def make(name: str) -> Any:
    return copy.deepcopy(_original(name))


def batch(model: Any, lengths: tuple[int, ...] = LENGTHS, *, left: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    place = torch.arange(max(lengths))
    ends = torch.tensor(lengths)[:, None]
    mask = (place >= max(lengths) - ends) if left else (place < ends)
    ids = torch.randint(3, 96, mask.shape, generator=generator)
    return {
        "input_ids": ids.masked_fill(~mask, model.config.pad_token_id),
        "attention_mask": mask.long(),
        "labels": torch.randint(0, 3, (len(lengths),), generator=generator),
    }


def results(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns logits, loss and the gradient of every parameter."""
    model.zero_grad()
    outputs = model(**inputs)
    outputs.loss.backward()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return {"logits": outputs.logits.detach(), "loss": outputs.loss.detach(), **found}


def limit(model: Any) -> float:
    return 1e-12 if model.dtype == torch.float64 else 1e-6


def farthest(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    assert found.keys() == wanted.keys()
    return max(float((found[name] - wanted[name]).abs().max()) for name in wanted)


@pytest.mark.parametrize("lengths", [LENGTHS, (7,), (5, 5, 5)], ids=["uneven", "one row", "no padding"])
@pytest.mark.parametrize("name", MODELS)
def test_padding_free_equals_padded(name: str, lengths: tuple[int, ...]) -> None:
    model = make(name)
    inputs = batch(model, lengths)
    padded = results(model, inputs)
    with use_unpadded_trunk(model):
        found = results(model, inputs)
    assert farthest(found, padded) < limit(model)
    after = results(model, inputs)
    assert all(torch.equal(after[name], padded[name]) for name in padded)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_gradient_checkpointing_and_adapters(name: str) -> None:
    model = make(name)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    adapted = get_peft_model(
        model, LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", init_lora_weights=False)
    )
    adapted.double().train()
    for module in adapted.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    inputs = batch(model)
    padded = results(adapted, inputs)
    with use_unpadded_trunk(adapted):
        found = results(adapted, inputs)
    assert farthest(found, padded) < 1e-12
    assert any("lora_A" in weight for weight in found)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_layers_see_real_tokens_only(name: str) -> None:
    model, seen = make(name), []
    inputs = batch(model)
    for layer in find_layers(model):
        layer.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    with use_unpadded_trunk(model):
        model(**inputs)
        model(input_ids=inputs["input_ids"])  # no mask: nothing says what is padding
    assert seen == [(1, sum(LENGTHS))] * 2 + [(len(LENGTHS), max(LENGTHS))] * 2


def test_an_interrupt_between_the_layers_does_not_leak_into_the_next_batch() -> None:
    """Ctrl-C skips the hooks after a forward pass."""
    model = make("bert")
    inputs = batch(model)

    def press(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = use_unpadded_trunk(model)
    interrupt = find_layers(model)[0].register_forward_pre_hook(press)
    with pytest.raises(KeyboardInterrupt):
        model(**inputs)
    interrupt.remove()
    model(input_ids=inputs["input_ids"])
    assert RowsUnderWay.count == 0
    interrupt = find_layers(model)[0].register_forward_pre_hook(press)
    with pytest.raises(KeyboardInterrupt):
        model(**inputs)
    interrupt.remove()
    handle.remove()
    assert RowsUnderWay.count == 0


def find_layers(model: Any) -> Any:
    return model.base_model.layers if hasattr(model.base_model, "layers") else model.base_model.encoder.layer


# ---- The probe ----


def test_a_trunk_that_mixes_tokens_stays_padded() -> None:
    """Each token is moved by the one before it, which in a gathered row may be another row's."""
    model = make("bert").float()
    layer = find_layers(model)[0]
    layer.register_forward_hook(lambda _, __, output: output + 1e-2 * output.roll(1, dims=1))
    assert "hidden states without padding are" in (why_not_unpadded(model) or "")


def test_a_model_that_ignores_its_tokens_proves_nothing() -> None:
    model = make("bert").float()
    model.bert.embeddings.register_forward_hook(lambda _, __, output: torch.ones_like(output))
    assert "nothing can be proven" in (why_not_unpadded(model) or "")


def test_a_model_whose_hidden_states_are_zero_proves_nothing() -> None:
    model = make("bert").float()
    find_layers(model)[-1].register_forward_hook(lambda _, __, output: torch.zeros_like(output))
    assert "zero for every token" in (why_not_unpadded(model) or "")


def test_the_probe_leaves_modes_and_random_numbers_alone() -> None:
    model = make("bert").float().train()
    model.classifier.eval()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    assert why_not_unpadded(model) is None
    assert torch.equal(torch.rand(1), expected)
    assert model.training
    assert not model.classifier.training
    assert model.bert.training


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_rows_padded_on_the_left(name: str, side: str) -> None:
    """Of the side that was not asked for they run padded: BERT's head would read nothing but zeros."""
    model = make(name)
    if (name, side) == ("bert", "left"):
        assert "logits" in (why_not_unpadded(model, side) or "")
        return
    assert why_not_unpadded(model, side) is None
    inputs = batch(model, left=True)
    padded = results(model, inputs)
    with use_unpadded_trunk(model, side):
        assert farthest(results(model, inputs), padded) < limit(model)


@pytest.mark.parametrize("name", MODELS)
def test_the_probe_finds_them_all_fit(name: str) -> None:
    assert why_not_unpadded(make(name).float()) is None
