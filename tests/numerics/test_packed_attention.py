"""A packed row must equal its samples computed one by one: logits, losses, gradients, for every kind of score."""

import copy
import functools

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn

from finetune.errors import ArgumentError
from finetune.kernels import packed_scores
from finetune.kernels.attention import (
    ATTENTION_NAME,
    packed_unsupported_reason,
    use_packed_attention,
)
from finetune.kernels.isolation import probe_isolation, require_isolation
from finetune.kernels.packed_buckets import plan_of
from finetune.kernels.packed_scores import packed_attention
from finetune.sft.build import can_be_padding_free
from finetune.wrappers import unwrap_peft

LENGTHS = (9, 1, 14, 3, 8, 40, 6)
COMMON = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "attention_dropout": 0.0,
}  # fmt: skip
SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
MODELS = {
    "llama, grouped heads": (hf.LlamaForCausalLM, hf.LlamaConfig, {}),
    "mistral, window": (hf.MistralForCausalLM, hf.MistralConfig, {"sliding_window": 5}),
    "qwen2, some layers windowed": (
        hf.Qwen2ForCausalLM, hf.Qwen2Config, {"use_sliding_window": True, "sliding_window": 4, **SLIDING}),
    "gemma2, soft cap and window": (
        hf.Gemma2ForCausalLM, hf.Gemma2Config,
        {"attn_logit_softcapping": 0.5, "sliding_window": 5, "query_pre_attn_scalar": 8, **SLIDING}),
    "gemma3, tied": (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, {"sliding_window": 6, **SLIDING}),
    "gpt-oss, sinks": (
        hf.GptOssForCausalLM, hf.GptOssConfig,
        {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 5, "rope_parameters":
         {"rope_type": "default", "rope_theta": 1e4}, **SLIDING}),
    "qwen2-moe, window in the mask only": (
        hf.Qwen2MoeForCausalLM, hf.Qwen2MoeConfig,
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2, "num_experts": 4,
         "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}),
    "phimoe, one window for all layers in the mask only": (
        hf.PhimoeForCausalLM, hf.PhimoeConfig,
        {"sliding_window": 5, "num_local_experts": 2, "num_experts_per_tok": 2, "router_jitter_noise": 0.0,
         "input_jitter_noise": 0.0}),
    "gpt2, learned positions": (
        hf.GPT2LMHeadModel, hf.GPT2Config,
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "attn_pdrop": 0.0, "embd_pdrop": 0.0,
         "resid_pdrop": 0.0}),
}  # fmt: skip


@functools.cache
def _original(name: str) -> nn.Module:
    model_class, config_class, kwargs = MODELS[name]
    common = {"vocab_size": 96} if config_class is hf.GPT2Config else COMMON
    torch.manual_seed(0)
    # Explicit scores are the reference: they honour windows, caps and sinks alike.
    model = model_class._from_config(config_class(**{**common, **kwargs}), attn_implementation="eager").train()
    for parameter in model.parameters():
        if parameter.ndim == 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return model


def make(name: str = "llama, grouped heads") -> nn.Module:
    return copy.deepcopy(_original(name))


def samples() -> list[torch.Tensor]:
    make = torch.Generator().manual_seed(1)
    return [torch.randint(3, 96, (n,), generator=make) for n in LENGTHS]


def packed() -> dict:
    rows = samples()
    labels = torch.cat([torch.cat([torch.tensor([-100]), row[1:]]) for row in rows])[None]
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    return {
        "input_ids": torch.cat(rows)[None],
        "labels": labels,
        "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None],
        "cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": max(LENGTHS), "max_length_k": max(LENGTHS),
    }  # fmt: skip


def padded() -> dict:
    rows = samples()
    pad = functools.partial(nn.utils.rnn.pad_sequence, batch_first=True)
    return {
        "input_ids": pad(rows, padding_value=0),
        "labels": pad(rows, padding_value=-100),
        "attention_mask": pad([torch.ones_like(row) for row in rows]),
    }


def one_by_one(model: nn.Module) -> tuple[torch.Tensor, dict]:
    """The reference: each sample alone, the sum of losses over the count of all."""
    model.zero_grad()
    count = sum(n - 1 for n in LENGTHS)
    logits = []
    for row in samples():
        out = model(input_ids=row[None], labels=row[None], num_items_in_batch=count, use_cache=False)
        logits.append(out.logits[0])
        out.loss.backward()
    return torch.cat(logits).detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def in_one_row(model: nn.Module, **kwargs) -> tuple[torch.Tensor, dict]:
    model.zero_grad()
    out = model(**packed(), num_items_in_batch=sum(n - 1 for n in LENGTHS), **kwargs)
    out.loss.backward()
    return out.logits[0].detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs, tolerance: float) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=tolerance, atol=tolerance)
    assert ours[1].keys() == theirs[1].keys()
    largest = max(gradient.abs().max() for gradient in theirs[1].values())
    for name, expected in theirs[1].items():
        difference = (ours[1][name] - expected).abs().max()
        assert difference < 1e-6 * largest, (name, difference / largest)
        assert difference < 1e-5 * expected.abs().max() + 1e-9, (name, difference / expected.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_packed_equals_one_by_one(name: str) -> None:
    model = make(name)
    expected = one_by_one(model)
    with use_packed_attention(model):
        assert_same(in_one_row(model), expected, 3e-6)
        assert probe_isolation(model).isolated


@pytest.mark.parametrize("name", ["llama, grouped heads", "gemma2, soft cap and window"])
def test_float64(name: str) -> None:
    model = make(name).double()
    expected = one_by_one(model)
    with use_packed_attention(model):
        logits, gradients = in_one_row(model)
    # Rotary tables and norms are float32 inside these models, whatever the weights are.
    assert_same((logits, gradients), expected, 1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_padded_batches_and_generation_are_untouched(name: str) -> None:
    model = make(name).eval()
    inputs = padded()
    kept = inputs["attention_mask"].bool()
    prompt = {"input_ids": inputs["input_ids"][5:6, :8], "attention_mask": inputs["attention_mask"][5:6, :8]}
    with torch.no_grad():
        expected = model(**inputs)
        tokens = model.generate(**prompt, max_new_tokens=4, do_sample=False)
        with use_packed_attention(model):
            found = model(**inputs)
            assert torch.equal(model.generate(**prompt, max_new_tokens=4, do_sample=False), tokens)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.logits[kept], expected.logits[kept], rtol=3e-5, atol=3e-6)


def test_a_cache_does_not_open_the_walls() -> None:
    model = make()
    expected = one_by_one(model)
    with use_packed_attention(model):
        assert_same(in_one_row(model, use_cache=True), expected, 3e-6)
        assert model(**packed(), use_cache=True).past_key_values is None


def test_recomputed_activations() -> None:
    model = make("mistral, window")
    expected = one_by_one(model)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with use_packed_attention(model):
            assert_same(in_one_row(model), expected, 3e-6)


def test_adapters() -> None:
    model = get_peft_model(make(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    expected = one_by_one(model)
    with use_packed_attention(model):
        assert_same(in_one_row(model), expected, 3e-6)


def test_a_mixed_peft_model_is_looked_through() -> None:
    """It has no `get_base_model`."""
    inner = make()
    mixed = get_peft_model(inner, LoraConfig(r=2, target_modules=["q_proj"]), mixed=True)
    assert unwrap_peft(mixed) is inner and unwrap_peft(inner) is inner
    assert packed_unsupported_reason(mixed) is None


def test_bfloat16_autocast() -> None:
    model = make()
    expected, _ = one_by_one(model)
    with use_packed_attention(model), torch.autocast("cpu", torch.bfloat16):
        logits = model(**packed()).logits[0]
    assert (logits.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_removal_restores() -> None:
    model = make()
    before = [(config, config._attn_implementation) for config in (model.config,)]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    expected = model(**padded()).logits
    with pytest.raises(KeyError), use_packed_attention(model):
        assert model.config._attn_implementation == ATTENTION_NAME
        raise KeyError
    handle = use_packed_attention(model)
    handle.remove()
    handle.remove()
    assert [(config, config._attn_implementation) for config in (model.config,)] == before
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert torch.equal(model(**padded()).logits, expected)


def test_an_exception_inside_a_row_does_not_leak_into_the_next_batch() -> None:
    model = make()
    with use_packed_attention(model):
        with pytest.raises(IndexError):
            model(**{**packed(), "input_ids": packed()["input_ids"] + 1000})
        with torch.no_grad():
            found = model(**padded()).loss
    torch.testing.assert_close(found, make()(**padded()).loss.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("removed", [False, True])
def test_an_interrupt_inside_a_row_does_not_leak_either(removed: bool) -> None:
    """Ctrl-C skips the hooks after a forward pass."""
    model, handles = make(), []

    def press(*_) -> None:
        raise KeyboardInterrupt

    handles.append(use_packed_attention(model))
    interrupt = model.model.layers[0].register_forward_pre_hook(press)
    with pytest.raises(KeyboardInterrupt):
        model(**packed())
    interrupt.remove()
    if removed:
        handles.pop().remove()
        handles.append(use_packed_attention(model))
    with torch.no_grad():
        model.generate(packed()["input_ids"][:, :4], max_new_tokens=2)
        found = model(**padded()).loss
    handles.pop().remove()
    assert packed_scores.RowsUnderWay.count == 0
    torch.testing.assert_close(found, make()(**padded()).loss.detach(), rtol=1e-5, atol=1e-6)


def test_masks_and_rows_do_not_mix() -> None:
    model = make()
    with use_packed_attention(model), pytest.raises(ArgumentError, match="attention_mask"):
        model(**packed(), attention_mask=torch.ones(1, sum(LENGTHS)))


def test_buckets() -> None:
    plan = plan_of((0, 3, 4, 6))
    assert plan.buckets == ((3, 2, 1),)
    assert plan.gather.tolist() == [0, 1, 2, 4, 5, 5, 3, 3, 3]
    assert plan.scatter.tolist() == [0, 1, 2, 6, 3, 4]
    long = plan_of((0, 100, 190, 230, 262))
    assert long.buckets == ((100, 90), (40, 32)) and long.sizes == [200, 80]
    assert plan_of((0, 2, 2, 3)).buckets == ((2, 1),)


def test_bidirectional_models() -> None:
    torch.manual_seed(0)
    config = hf.BertConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                           intermediate_size=64, max_position_embeddings=64, attention_probs_dropout_prob=0.0,
                           hidden_dropout_prob=0.0)  # fmt: skip
    model = hf.BertForTokenClassification(config)
    expected = torch.cat([model(row[None]).logits[0] for row in samples()])
    row = {name: value for name, value in packed().items() if name != "labels"}
    with use_packed_attention(model):
        torch.testing.assert_close(model(**row).logits[0], expected, rtol=1e-5, atol=1e-6)
        assert probe_isolation(model).isolated


def test_the_probe_sees_a_leak() -> None:
    model = make()
    with use_packed_attention(model):
        assert require_isolation(model).influence <= 1e-6
        modes = [module.training for module in model.modules()]
        attention = model.model.layers[0].self_attn

        def leak(module, args, output):
            mixed = output[0] + 1e-2 * output[0].mean(1, keepdim=True)
            return (mixed, *output[1:])

        hook = attention.register_forward_hook(leak)
        found = probe_isolation(model)
        assert not found.isolated and found.influence > found.limit and found.sample_changed != found.sample_moved
        with pytest.raises(ArgumentError, match=r"changing sample \d moved.*padding_free=False"):
            require_isolation(model)
        hook.remove()
        assert [module.training for module in model.modules()] == modes
    # One causal row without boundaries: later samples see earlier ones.
    model.config._attn_implementation = "sdpa"
    original = model.model.forward
    model.model.forward = lambda **kw: original(input_ids=kw["input_ids"])
    assert not probe_isolation(model).isolated


def test_the_probe_sees_positions_that_do_not_start_at_zero() -> None:
    """RoBERTa counts them from behind the index of its padding, so a packed row would get other embeddings."""
    torch.manual_seed(0)
    config = hf.RobertaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                              intermediate_size=64, max_position_embeddings=64, pad_token_id=1,
                              is_decoder=True)  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        model = hf.RobertaForCausalLM(config).to(dtype)
        with use_packed_attention(model):
            found = probe_isolation(model)
            assert not found.isolated and found.influence <= found.limit < found.position_error
            with pytest.raises(ArgumentError, match=r"count positions from 0.*padding_free=False"):
                require_isolation(model)


def test_the_probe_sees_samples_that_are_not_what_they_are_alone() -> None:
    """A model that ignores `position_ids` counts positions through the whole row: nothing leaks, yet all is moved."""
    model = make("gpt2, learned positions")
    with use_packed_attention(model):
        assert probe_isolation(model).packed_error < 1e-5
        original = model.transformer.forward
        model.transformer.forward = lambda position_ids=None, **given: original(**given)
        found = probe_isolation(model)
        assert not found.isolated and found.influence <= found.limit and found.position_error == 0.0
        with pytest.raises(ArgumentError, match=r"sample [12] are .* away from those of the sample alone"):
            require_isolation(model)


def test_the_probe_does_not_pass_a_model_that_reacts_to_nothing() -> None:
    model = make()
    nn.init.zeros_(model.get_input_embeddings().weight)
    with pytest.raises(ArgumentError, match="nothing can be proven"):
        probe_isolation(model)


def test_models_that_cannot() -> None:
    assert "not a transformers model" in (packed_unsupported_reason(nn.Linear(1, 1)) or "")
    t5 = hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=32, d_model=16, d_ff=16, num_layers=1, num_heads=2,
                                                   d_kv=8, decoder_start_token_id=0))  # fmt: skip
    assert "encoder-decoder" in (packed_unsupported_reason(t5) or "")
    mamba = hf.MambaForCausalLM(hf.MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(ArgumentError, match="padding_free=False"):
        use_packed_attention(mamba)


def test_an_attention_of_the_users_own_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    for name in ("sdpa", "eager", "flash_attention_2", None):
        monkeypatch.setattr(model.config, "_attn_implementation_internal", name)
        assert packed_unsupported_reason(model) is None, name
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "my_attention")
    with pytest.raises(ArgumentError, match=r"its attention is 'my_attention'.*padding_free=False"):
        use_packed_attention(model)
    assert not can_be_padding_free(model)


def test_short_samples_in_bfloat16_are_attended_in_float32() -> None:
    """On a CPU it is faster and has less rounding: the result is the float32 one, rounded once at the end."""
    make_one = torch.Generator().manual_seed(0)
    layer = torch.nn.Module()
    q, k, v = (torch.randn(1, 2, 10, 8, generator=make_one).bfloat16() for _ in range(3))
    boundaries = torch.tensor([0, 4, 10], dtype=torch.int32)
    wide, _ = packed_attention(layer, q.float(), k.float(), v.float(), None, cu_seq_lens_q=boundaries)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            low, _ = packed_attention(layer, q, k, v, None, cu_seq_lens_q=boundaries)
        assert low.dtype == torch.bfloat16
        assert torch.equal(low, wide.bfloat16())


def test_windows_that_only_the_mask_tells() -> None:
    """They must act: without the window, the longest sample is another one."""
    for name in (name for name in MODELS if "mask only" in name):
        model = make(name)
        expected, _ = one_by_one(model)
        with use_packed_attention(model):
            model.config.sliding_window = 1000
            assert (in_one_row(model)[0] - expected).abs().max() > 1e-3
    module = make("qwen2-moe, window in the mask only").model.layers[0].self_attn
    del module.layer_idx
    row = [torch.zeros(1, 4, 6, 8) for _ in range(3)]
    with pytest.raises(ArgumentError, match="which layer it is"):
        packed_attention(module, *row, None, cu_seq_lens_q=torch.tensor([0, 6]))


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch):
    """For tensors that say they are on a GPU: a kernel that notes what it is given, and autocast. Returns the notes."""
    notes = []

    def kernel(query, key, value, *_, scale, window_size, enable_gqa=False):
        notes.append((query.dtype, key.dtype, value.dtype, window_size))
        return torch.empty_like(query)

    monkeypatch.setattr(packed_scores, "_varlen_function", lambda: kernel)
    monkeypatch.setattr(packed_scores, "_flash_function", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    return notes


class OnCuda(torch.Tensor):
    device = torch.device("cuda")  # pyright: ignore[reportAssignmentType]


def on_cuda(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype).as_subclass(OnCuda)


def test_under_autocast_the_kernel_gets_everything_in_half_precision(fake_cuda: list) -> None:
    """Rotary embedding leaves queries and keys in float32."""
    q, k = (on_cuda(1, 2, 10, 64) for _ in range(2))
    v = on_cuda(1, 2, 10, 64, dtype=torch.bfloat16)
    ends = torch.tensor([0, 4, 10], dtype=torch.int32)
    output, _ = packed_attention(nn.Module(), q, k, v, None, cu_seq_lens_q=ends, max_length_q=6, sliding_window=4)
    assert fake_cuda == [(torch.bfloat16, torch.bfloat16, torch.bfloat16, (3, 0))]
    assert output.dtype == torch.bfloat16 and output.shape == (1, 10, 2, 64)


@pytest.mark.parametrize(("width", "backend"), [(64, "varlen"), (60, "buckets"), (264, "buckets")])
def test_widths_that_the_kernel_does_not_take_go_into_buckets(fake_cuda: list, width: int, backend: str) -> None:
    row = on_cuda(10, 2, width, dtype=torch.bfloat16)
    scores = packed_scores.Scores(1.0, None, None, None, causal=True, dropout=0.0)
    assert packed_scores.choose_backend(row, row, scores) == backend


def test_a_compiled_model_is_not_compiled_again_for_other_samples() -> None:
    model = make()
    lengths = [(9, 1, 14), (5, 5, 6), (2, 20, 3), (8, 8, 8), (12, 4, 7), (1, 3, 17)]
    graphs = []
    with use_packed_attention(model), torch.no_grad():
        compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph.forward)
        for each in lengths:
            rows = {
                "input_ids": torch.randint(3, 96, (1, sum(each))),
                "position_ids": torch.cat([torch.arange(n) for n in each])[None],
                "cu_seq_lens_q": torch.tensor([0, *each]).cumsum(0).int(),
                "max_length_q": max(each),
            }
            torch.testing.assert_close(compiled(**rows).logits, model(**rows).logits, rtol=1e-5, atol=1e-5)
            if each is lengths[2]:  # until then, sizes become symbols
                before = len(graphs)
    assert len(graphs) == before


def test_places_are_copied_to_a_device_once() -> None:
    plan = plan_of((0, 3, 4, 6))
    first, second = plan.on(torch.device("meta")), plan.on(torch.device("meta"))
    assert first[0].is_meta and all(one is other for one, other in zip(first, second, strict=True))
    with torch.inference_mode():
        gather, _ = plan_of((0, 2, 3)).on(torch.device("cpu"))
    assert not gather.is_inference(), "a training step with the same boundaries could not save it"
