"""Special tokens: equal to transformers' alignment, and never an id the embedding does not have."""

import copy

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.trainer_utils import align_special_tokens as reference

from finetune.errors import ArgumentError
from finetune.models.tokens import add_tokens, align_special_tokens, choose_eos_token, choose_pad_token


def tokenizer(**special) -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["<unk>", "<eos>", "<pad>", "<bos>", "<turn>", "a", "b"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", **special)


def model(vocab_size: int = 8, **config) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            **config,
        )
    )


@pytest.mark.parametrize(
    "special",
    [
        {},
        {"eos_token": "<turn>"},
        {"eos_token": "<eos>", "pad_token": "<pad>"},
        {"bos_token": "<bos>", "eos_token": "<turn>", "pad_token": "<turn>"},
    ],
)
@pytest.mark.parametrize("eos", [1, [1, 3], None])
@pytest.mark.parametrize("generation_eos", [1, [1, 4], None, "absent"])
def test_agrees_with_transformers(special, eos, generation_eos) -> None:
    ours = model(eos_token_id=eos)
    ours.generation_config = None if generation_eos == "absent" else GenerationConfig(eos_token_id=generation_eos)
    theirs = copy.deepcopy(ours)
    align_special_tokens(ours, tokenizer(**special))
    reference(theirs, tokenizer(**special))
    assert ours.config.to_dict() == theirs.config.to_dict()
    if ours.generation_config is not None:
        assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()


def test_returns_what_changed_once() -> None:
    net = model(eos_token_id=1)
    tok = tokenizer(eos_token="<turn>")
    assert align_special_tokens(net, tok) == {"eos_token_id": 4}
    assert align_special_tokens(net, tok) == {}
    assert align_special_tokens(torch.nn.Linear(1, 1), tok) == {}


def test_padding_falls_back_to_eos_and_never_adds_a_token() -> None:
    tok, net = tokenizer(eos_token="<eos>"), model()
    assert choose_pad_token(tok, net) == 1
    assert (tok.pad_token, net.config.pad_token_id, net.generation_config.pad_token_id) == ("<eos>", 1, 1)
    assert choose_pad_token(tok, net, "<pad>") == 2
    size = len(tok)
    with pytest.raises(ArgumentError, match="Did you mean `<pad>`"):
        choose_pad_token(tok, net, "<pat>")
    assert len(tok) == size and tok.pad_token == "<pad>"
    with pytest.raises(ArgumentError, match="neither"):
        choose_pad_token(tokenizer())
    with pytest.raises(ArgumentError, match="has 3 rows"):
        choose_pad_token(tok, model(vocab_size=3), "<turn>")


def test_eos_is_added_to_the_stop_tokens() -> None:
    tok, net = tokenizer(eos_token="<eos>"), model()
    net.generation_config.eos_token_id = 1
    assert choose_eos_token(tok, "<turn>", net) == 4
    assert net.config.eos_token_id == 4 and net.generation_config.eos_token_id == [4, 1]


def test_new_tokens_get_rows_and_spare_rows_are_used_first() -> None:
    tok, net = tokenizer(), model(vocab_size=8)
    old = net.get_input_embeddings().weight.detach().clone()
    assert add_tokens(net, tok, ["<x>", "a"]) == [7]
    assert torch.equal(net.get_input_embeddings().weight, old)
    assert add_tokens(net, tok, ["<y>", "<z>", "<y>"]) == [8, 9]
    assert net.get_input_embeddings().weight.shape[0] == net.lm_head.weight.shape[0] == 10
    assert torch.equal(net.get_input_embeddings().weight[:8], old)
    assert add_tokens(net, tok, ["<y>"]) == []
