"""Weights gathered from a sharded model are copies; tied ones are saved under one name all the same."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from finetune.checkpoint.gathered import without_tied_copies


def llama(*, tied: bool) -> LlamaForCausalLM:
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, tie_word_embeddings=tied, **size))


def gathered(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_copy_of_a_tied_weight_goes() -> None:
    model = llama(tied=True)
    copies = gathered(model)
    kept = without_tied_copies(copies, model)
    assert copies.keys() - kept.keys() == {"lm_head.weight"}
    model.load_state_dict(kept, strict=False)


def test_weights_that_are_not_tied_or_no_longer_equal_stay() -> None:
    model = llama(tied=False)
    model.lm_head.weight.data.copy_(model.model.embed_tokens.weight)
    assert "lm_head.weight" in without_tied_copies(gathered(model), model)
    model = llama(tied=True)
    copies = gathered(model)
    copies["lm_head.weight"][0, 0] += 1
    assert "lm_head.weight" in without_tied_copies(copies, model)


def test_names_inside_an_adapter_wrapper() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(tied=True), LoraConfig(target_modules=["q_proj"]))
    copies = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept = without_tied_copies(copies, model)
    assert copies.keys() - kept.keys() == {"base_model.model.lm_head.weight"}
