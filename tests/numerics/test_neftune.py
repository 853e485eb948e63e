"""NEFTune: transformers' noise for full rows, per-sample noise for packed and padded ones, and no trace afterwards."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.neftune import activate_neftune

from finetune.errors import ArgumentError
from finetune.features.neftune import neftune, sample_lengths

D, T = 16, 12


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32, hidden_size=D, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    return LlamaForCausalLM(config).train()


def ids(rows: int = 2) -> torch.Tensor:
    return torch.randint(0, 32, (rows, T), generator=torch.Generator().manual_seed(1))


def noise_of(model: nn.Module, alpha: float = 5.0, **inputs) -> torch.Tensor:
    """What is added to the embeddings in one forward pass, (B, T, D)."""
    seen = {}
    with neftune(model, alpha):
        embedding = model.get_input_embeddings()
        handle = embedding.register_forward_hook(lambda m, a, out: seen.update(noisy=out, plain=m.weight[a[0]]))
        try:
            model(**inputs, use_cache=False)
        finally:
            handle.remove()
    return (seen["noisy"] - seen["plain"]).detach()


@pytest.mark.parametrize("mask", [None, torch.ones(2, T, dtype=torch.int64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_rows_equal_transformers_to_the_bit(model, mask, dtype) -> None:
    model = model.to(dtype)
    reference = copy.deepcopy(model)
    activate_neftune(reference, 5.0)
    torch.manual_seed(7)
    expected = reference(ids(), attention_mask=mask, use_cache=False).logits
    torch.manual_seed(7)
    with neftune(model, 5.0):
        logits = model(input_ids=ids(), attention_mask=mask, use_cache=False).logits
    assert torch.equal(logits, expected)
    assert not torch.equal(logits, model(input_ids=ids(), attention_mask=mask, use_cache=False).logits)


def test_padded_rows_are_scaled_by_their_own_length(model) -> None:
    mask = torch.ones(2, T, dtype=torch.int64)
    mask[1, 3:] = 0
    torch.manual_seed(7)
    full = noise_of(model, input_ids=ids())
    torch.manual_seed(7)
    padded = noise_of(model, input_ids=ids(), attention_mask=mask)
    torch.testing.assert_close(padded[0], full[0])
    torch.testing.assert_close(padded[1], full[1] * (T / 3) ** 0.5)
    assert padded[1, :3].abs().max() <= 5.0 / (3 * D) ** 0.5


@pytest.mark.parametrize("by", ["cu_seq_lens_q", "position_ids"])
def test_packed_samples_are_scaled_by_their_own_length(model, by: str) -> None:
    boundaries = torch.tensor([0, 6, 10, 12], dtype=torch.int32)
    position_ids = torch.tensor([[*range(6), *range(4), *range(2)]])
    inputs = {"input_ids": ids(1), "position_ids": position_ids}
    if by == "cu_seq_lens_q":
        inputs["cu_seq_lens_q"] = boundaries
    torch.manual_seed(7)
    full = noise_of(model, input_ids=ids(1))
    torch.manual_seed(7)
    packed = noise_of(model, **inputs)
    for start, stop in ((0, 6), (6, 10), (10, 12)):
        scale = (T / (stop - start)) ** 0.5
        torch.testing.assert_close(packed[:, start:stop], full[:, start:stop] * scale)


def test_lengths() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [5, 6, 0, 1, 2, 3]])
    assert sample_lengths(position_ids=positions, shape=(2, 6)).tolist() == [  # pyright: ignore
        [3, 3, 3, 2, 2, 1],
        [2, 2, 4, 4, 4, 4],
    ]
    boundaries = torch.tensor([0, 2, 5], dtype=torch.int32)
    assert sample_lengths(cu_seq_lens=boundaries, shape=(1, 5)).tolist() == [[2, 2, 3, 3, 3]]  # pyright: ignore
    assert sample_lengths(attention_mask=torch.zeros(1, 1, 4, 4), shape=(1, 4)) is None
    assert sample_lengths(shape=(1, 4)) is None


def test_no_noise_in_evaluation(model) -> None:
    model.eval()
    with torch.no_grad(), neftune(model, 5.0):
        assert torch.equal(model(ids()).logits, model(ids()).logits)
    with neftune(model, 0.0):
        model.train()
        assert torch.equal(model(ids()).logits, model(ids()).logits)


@pytest.mark.parametrize("wrap", [False, True])
def test_no_trace_even_after_an_exception(model, wrap: bool) -> None:
    if wrap:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))

    def state():
        return [(name, sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks),
                 len(m._forward_pre_hooks_with_kwargs), len(m._forward_hooks_always_called))
                for name, m in model.named_modules()]  # fmt: skip

    before, expected = state(), model(ids(), use_cache=False).logits
    with pytest.raises(KeyboardInterrupt), neftune(model, 5.0):
        assert not torch.equal(model(input_ids=ids(), use_cache=False).logits, expected)
        raise KeyboardInterrupt
    assert state() == before
    assert torch.equal(model(ids(), use_cache=False).logits, expected)


def test_lengths_of_one_call_do_not_leak_into_the_next(model) -> None:
    mask = torch.ones(2, T, dtype=torch.int64)
    mask[:, 3:] = 0
    seen = []
    with neftune(model, 5.0):
        handle = model.get_input_embeddings().register_forward_hook(lambda m, a, out: seen.append(out))
        model(input_ids=ids(), attention_mask=mask, use_cache=False)
        torch.manual_seed(7)
        model.model(input_ids=ids(), use_cache=False)
        handle.remove()
    torch.manual_seed(7)
    expected = noise_of(model, input_ids=ids())
    torch.testing.assert_close(seen[1] - model.get_input_embeddings().weight[ids()], expected)


def test_wrong_arguments(model) -> None:
    with pytest.raises(ArgumentError, match="neftune_noise_alpha"), neftune(model, -1.0):
        pass
    with pytest.raises(ArgumentError, match="input embeddings"), neftune(nn.Linear(1, 1), 5.0):
        pass
