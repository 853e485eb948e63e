"""A fused head must give the loss and the gradients of the model's own forward, and leave no trace when removed."""

import copy
import functools
import inspect

import pytest
import torch
import transformers as hf
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import nn

from finetune.errors import ArgumentError
from finetune.kernels import fused_head, head_support
from finetune.kernels.fused_head import fuse_head
from finetune.kernels.head_support import unsupported_reason
from finetune.kernels.logit_transform import LogitTransform, logit_transform

COMMON = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


def build(model_class, config_class, common=True, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    model = model_class(config_class(**{**(COMMON if common else {}), **kwargs})).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


MODELS = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, {}),
    "llama, tied": (hf.LlamaForCausalLM, hf.LlamaConfig, {"tie_word_embeddings": True}),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig, {}),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config, {}),
    "phi, bias": (hf.PhiForCausalLM, hf.PhiConfig, {}),
    "gemma2, soft cap": (hf.Gemma2ForCausalLM, hf.Gemma2Config, {"final_logit_softcapping": 3.0}),
    "gemma3": (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, {}),
    "granite, divided": (hf.GraniteForCausalLM, hf.GraniteConfig, {"logits_scaling": 7.0}),
    "cohere, multiplied": (hf.CohereForCausalLM, hf.CohereConfig, {"logit_scale": 0.3}),
    "mixtral, auxiliary loss": (
        hf.MixtralForCausalLM, hf.MixtralConfig, {"num_local_experts": 4, "output_router_logits": True}),
    "olmo2": (hf.Olmo2ForCausalLM, hf.Olmo2Config, {}),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config,
             {"common": False, "vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
}  # fmt: skip


@functools.cache
def _original(name: str) -> nn.Module:
    model_class, config_class, kwargs = MODELS[name]
    return build(model_class, config_class, **kwargs)


def make(name: str = "llama") -> nn.Module:
    return copy.deepcopy(_original(name))


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :4] = -100
    labels[1, 8:] = -100
    return {"input_ids": ids, "labels": labels}


def run(model: nn.Module, **kwargs):
    model.zero_grad()
    outputs = model(**{**batch(), **kwargs}, use_cache=False)
    outputs.loss.backward()
    return outputs, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours, theirs, tolerance=3e-6) -> None:
    assert ours.keys() == theirs.keys()
    for name in theirs:
        scale = theirs[name].abs().max() + 1e-12
        assert ((ours[name] - theirs[name]).abs().max() / scale) < tolerance, name


@pytest.mark.parametrize("items", [None, torch.tensor(37)])
@pytest.mark.parametrize("name", MODELS)
def test_same_loss_and_gradients_without_logits(name: str, items) -> None:
    model = make(name)
    expected, gradients = run(model, num_items_in_batch=items)
    handle = fuse_head(model, chunk_tokens=5)
    outputs, fused = run(model, num_items_in_batch=items)
    torch.testing.assert_close(outputs.loss, expected.loss, rtol=1e-6, atol=1e-6)
    assert outputs.logits is None
    assert_same_gradients(fused, gradients)
    assert handle.last is not None and handle.last.count.item() == 12 and not handle.last.loss.requires_grad
    handle.remove()
    again, after = run(model, num_items_in_batch=items)
    assert torch.equal(again.loss, expected.loss) and torch.equal(again.logits, expected.logits)
    assert all(torch.equal(after[n], gradients[n]) for n in gradients)


def test_float64_is_exact() -> None:
    model = make("gemma2, soft cap").double()
    expected, gradients = run(model)
    with fuse_head(model):
        outputs, fused = run(model)
    # transformers rounds the logits to float32 before its loss, so this is as close as the two can be.
    torch.testing.assert_close(outputs.loss, expected.loss.double(), rtol=1e-7, atol=0)
    assert_same_gradients(fused, gradients, 1e-6)


def test_removal_leaves_no_trace() -> None:
    model = make()
    before = [(name, sorted(module.__dict__)) for name, module in model.named_modules()]
    handle = fuse_head(model)
    handle.remove()
    handle.remove()
    with pytest.raises(KeyError), fuse_head(model):
        raise KeyError
    assert [(name, sorted(module.__dict__)) for name, module in model.named_modules()] == before


def test_evaluation_and_accuracy() -> None:
    model = make().eval()
    inputs = batch()
    with torch.no_grad():
        expected = model(**inputs)
        with fuse_head(model, entropy=True) as handle:
            outputs = model(**inputs)
    logits, labels = expected.logits[:, :-1], inputs["labels"][:, 1:]
    kept = labels != -100
    torch.testing.assert_close(outputs.loss, expected.loss, rtol=1e-6, atol=1e-6)
    assert handle.last is not None
    assert handle.last.correct.item() == (logits.argmax(-1) == labels)[kept].sum().item()
    log_p = logits.log_softmax(-1)
    torch.testing.assert_close(handle.last.entropy, -(log_p.exp() * log_p).sum(-1)[kept].sum())
    torch.testing.assert_close(handle.last.nll / handle.last.count, expected.loss)


def test_without_labels_nothing_changes() -> None:
    model = make().eval()
    ids = batch()["input_ids"]
    with torch.no_grad():
        plain, generated = model(ids).logits, model.generate(ids, max_new_tokens=3, do_sample=False)
        with fuse_head(model) as handle:
            assert torch.equal(model(ids).logits, plain)
            assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), generated)
            with handle.suspended():
                assert torch.equal(model(**batch()).logits, plain)
            assert model(**batch()).logits is None


def test_shift_labels_and_token_weights() -> None:
    model = make()
    inputs = batch()
    shifted = nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    expected, gradients = run(model)
    with fuse_head(model):
        outputs, fused = run(model, labels=None, shift_labels=shifted)
        ones, _ = run(model, token_weights=torch.ones(2, 12))
        first_row, _ = run(model, token_weights=torch.tensor([[1.0], [0.0]]).expand(2, 12), num_items_in_batch=1)
    torch.testing.assert_close(outputs.loss, expected.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ones.loss, expected.loss, rtol=1e-6, atol=1e-6)
    assert_same_gradients(fused, gradients)
    alone = {name: value[:1] for name, value in inputs.items()}
    torch.testing.assert_close(first_row.loss, model(**alone, num_items_in_batch=1).loss, rtol=1e-6, atol=1e-6)


def test_no_supervised_token() -> None:
    model = make()
    labels = torch.full((2, 12), -100)
    with fuse_head(model):
        for count in ({"num_items_in_batch": 5}, {}):
            outputs, gradients = run(model, labels=labels, **count)
            assert outputs.loss.item() == 0.0 and not any(g.any() for g in gradients.values())


@pytest.mark.parametrize("name", ["llama", "mixtral, auxiliary loss"])
def test_tuple_outputs(name: str) -> None:
    model = make(name)
    expected = model(**batch()).loss
    plain = model(**batch(), return_dict=False, use_cache=False)
    with fuse_head(model):
        outputs = model(**batch(), return_dict=False, use_cache=False)
    assert isinstance(outputs, tuple) and len(outputs) == len(plain) - 1
    torch.testing.assert_close(outputs[0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(dtype) -> None:
    model = make()
    with torch.autocast("cpu", dtype):
        expected = model(**batch()).loss
        with fuse_head(model):
            fused = model(**batch()).loss
    assert fused.dtype == torch.float32
    torch.testing.assert_close(fused, expected, rtol=1e-3, atol=0)


def test_accelerate_wraps_and_removal_still_restores() -> None:
    model = make()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    handle = fuse_head(model)
    prepared = accelerator.prepare_model(model)
    assert prepared(**batch()).logits is None
    handle.remove()
    ours, plain = prepared(**batch()), accelerator.prepare_model(make())(**batch())
    assert torch.equal(ours.loss, plain.loss) and torch.equal(ours.logits, plain.logits)


def test_the_signature_stays() -> None:
    model = make()
    before = inspect.signature(model.forward)
    with fuse_head(model):
        assert inspect.signature(model.forward) == before


@pytest.mark.parametrize("name", ["llama", "gemma2, soft cap"])
def test_compiled_model(name: str) -> None:
    model = make(name)
    expected, gradients = run(model)
    with fuse_head(model):
        compiled = torch.compile(model, backend="eager")
        outputs = compiled(**batch(), use_cache=False)
        model.zero_grad()
        outputs.loss.backward()
    assert outputs.logits is None
    torch.testing.assert_close(outputs.loss, expected.loss, rtol=1e-6, atol=1e-6)
    assert_same_gradients({n: p.grad for n, p in model.named_parameters()}, gradients)


def test_hooks_on_the_heads_output_see_the_gradient() -> None:
    """FSDP and ZeRO-3 gather a module's weights again when the gradient reaches its output."""
    model, seen = make(), []
    handle = model.lm_head.register_forward_hook(lambda m, a, out: out.register_hook(seen.append) and None)
    with fuse_head(model):
        run(model)
    handle.remove()
    assert len(seen) == 1


def test_gradient_checkpointing() -> None:
    model = make()
    _, expected = run(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with fuse_head(model):
        _, gradients = run(model)
    assert_same_gradients(gradients, expected)


def test_adapters_elsewhere_are_fused_and_a_trained_head_gets_its_gradient() -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(make(), lora)
    expected, gradients = run(model)
    assert any("lm_head" in name for name in gradients)
    with fuse_head(model):
        outputs, fused = run(model)
    torch.testing.assert_close(outputs.loss, expected.loss, rtol=1e-6, atol=1e-6)
    assert outputs.logits is None
    assert_same_gradients(fused, gradients)


def test_reasons_not_to_fuse() -> None:
    on_head = get_peft_model(make(), LoraConfig(r=2, target_modules=["lm_head"]))
    assert "not a plain nn.Linear" in (unsupported_reason(on_head) or "")
    with pytest.raises(ArgumentError, match=r"plain nn\.Linear.*plain loss"):
        fuse_head(on_head)
    assert "not a causal language model" in (unsupported_reason(nn.Linear(2, 2)) or "")
    t5 = build(hf.T5ForConditionalGeneration, hf.T5Config, False, vocab_size=32, d_model=16, d_ff=16, num_layers=1,
               num_heads=2, d_kv=8, decoder_start_token_id=0)  # fmt: skip
    assert "encoder-decoder" in (unsupported_reason(t5) or "")
    fused = make()
    with fuse_head(fused):
        assert "replaced already" in (unsupported_reason(fused) or "")
    assert unsupported_reason(fused) is None


def test_transforms_are_read_from_the_config() -> None:
    assert logit_transform(make("granite, divided")) == LogitTransform(1 / 7.0, None)
    assert logit_transform(make("cohere, multiplied")) == LogitTransform(0.3, None)
    assert logit_transform(make("gemma2, soft cap")) == LogitTransform(1.0, 3.0)


def classes_with_other_logits() -> tuple[type, type]:
    """Two models whose forward does to the logits what their config does not say."""

    class Halved(hf.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **kwargs):
            logits = 0.5 * self.lm_head(self.model(input_ids).last_hidden_state).float()
            return hf.modeling_outputs.CausalLMOutputWithPast(
                loss=self.loss_function(logits, labels, self.vocab_size), logits=logits
            )

    class Sorted(hf.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **kwargs):
            logits = self.lm_head(self.model(input_ids).last_hidden_state).sort(-1).values
            return hf.modeling_outputs.CausalLMOutputWithPast(
                loss=self.loss_function(logits, labels, self.vocab_size), logits=logits
            )

    return Halved, Sorted


def test_an_unknown_convention_is_followed_or_is_a_reason_not_to_fuse() -> None:
    halved, sorting = (build(each, hf.LlamaConfig) for each in classes_with_other_logits())
    before = [(name, sorted(module.__dict__)) for name, module in halved.named_modules()]
    assert unsupported_reason(halved) is None and "`sort`" in (unsupported_reason(sorting) or "")
    assert [(name, sorted(module.__dict__)) for name, module in halved.named_modules()] == before
    with pytest.raises(ArgumentError, match=r"plain loss.*`compute_loss_func`"):
        fuse_head(sorting)
    expected = halved(**batch()).loss
    for transform in (None, LogitTransform(0.5)):
        with fuse_head(halved, transform=transform):
            torch.testing.assert_close(halved(**batch()).loss, expected, rtol=1e-6, atol=1e-6)


def test_a_scale_in_the_config_that_the_logits_do_not_get_is_not_assumed() -> None:
    """MiniCPM3 divides its hidden states by `logits_scaling`, so its logits are plain."""
    model = build(hf.LlamaForCausalLM, hf.LlamaConfig)
    expected = model(**batch()).loss
    model.config.logits_scaling = 8.0
    assert unsupported_reason(model) is None
    with fuse_head(model) as handle:
        assert handle.transform == LogitTransform()
        torch.testing.assert_close(model(**batch()).loss, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("only_in_evaluation", [False, True])
def test_a_forward_that_asks_for_the_shape_of_its_logits_is_not_fused(only_in_evaluation: bool) -> None:
    """Inkling cuts padding off the vocabulary; xLSTM caps its logits in pieces, in evaluation alone."""

    class Cut(hf.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **kwargs):
            logits = self.lm_head(self.model(input_ids).last_hidden_state)
            if not (only_in_evaluation and self.training) and logits.shape[-1] > 90:
                logits = logits[..., :90]
            return hf.modeling_outputs.CausalLMOutputWithPast(
                loss=self.loss_function(logits, labels, logits.shape[-1]), logits=logits
            )

    model = build(Cut, hf.LlamaConfig)
    assert "needs real logits before its loss (" in (unsupported_reason(model) or "")
    assert model.training


def test_the_trial_runs_no_layer_and_needs_no_weights() -> None:
    for name in MODELS:
        model = make(name)
        for module in model.modules():
            if module is not model:
                module.register_forward_pre_hook(lambda *_: pytest.fail("a module was called"))
        model.to("meta")
        assert unsupported_reason(model) is None
        assert "`transform` says" in (unsupported_reason(model, LogitTransform(0.123)) or ""), "the trial found nothing"


def test_a_convention_that_the_trial_missed_stops_instead_of_training_on_other_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(head_support, "_reason_of_its_logits", lambda *_: None)
    monkeypatch.setattr(fused_head, "transform_of", logit_transform)
    halved, sorting = (build(each, hf.LlamaConfig) for each in classes_with_other_logits())
    with fuse_head(halved), pytest.raises(ArgumentError, match=r"scale=0\.5.*plain loss"):
        halved(**batch())
    with fuse_head(sorting), pytest.raises(ArgumentError, match="applies `sort`"):
        sorting(**batch())


OPTIONS = {
    "plain": {},
    "label smoothing": {"label_smoothing": 0.1},
    "dft": {"dft": True},
    "z-loss": {"z_loss": 1e-3},
    "smoothing and z-loss": {"label_smoothing": 0.2, "z_loss": 1e-2},
}


def defined(logits: torch.Tensor, labels: torch.Tensor, label_smoothing=0.0, z_loss=0.0, dft=False) -> torch.Tensor:
    """Returns the mean loss over the labels, from the logits that the model itself makes."""
    kept = labels[:, 1:] != -100
    scores, targets = logits[:, :-1][kept], labels[:, 1:][kept]
    log_p = scores.log_softmax(-1)
    nll = nn.functional.nll_loss(log_p, targets, reduction="none")
    loss = (1 - label_smoothing) * nll + label_smoothing * -log_p.mean(-1)
    loss = loss * log_p.gather(1, targets[:, None])[:, 0].exp().detach() if dft else loss
    return (loss + z_loss * scores.logsumexp(-1) ** 2).mean()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    "name", ["llama, tied", "phi, bias", "gemma2, soft cap", "granite, divided", "cohere, multiplied"]
)
def test_every_loss_on_every_kind_of_head_in_float64(name: str, options: str) -> None:
    model = make(name).double()
    inputs = batch()
    labels = inputs.pop("labels")
    expected = defined(model(**inputs).logits, labels, **OPTIONS[options])
    expected.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    with fuse_head(model, chunk_tokens=5, **OPTIONS[options]):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[n], rtol=1e-7, atol=1e-12, msg=lambda text, n=n: f"{n}: {text}")


def test_data_parallel_reduces_the_heads_gradient(tmp_path) -> None:
    """DDP's hooks fire for the head, tied or not, although its gradient is made in the forward pass."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for name in ("llama", "llama, tied"):
            model = make(name)
            _, expected = run(model)
            model.zero_grad(set_to_none=True)
            reduced: list[int] = []

            def count(state, bucket, reduced=reduced):
                reduced.extend(gradient.numel() for gradient in bucket.gradients())
                future = torch.futures.Future()
                future.set_result(bucket.buffer())
                return future

            with fuse_head(model):
                wrapped = nn.parallel.DistributedDataParallel(model)
                wrapped.register_comm_hook(None, count)
                for _ in range(2):  # the second pass uses the buckets that the first one ordered
                    model.zero_grad(set_to_none=True)
                    reduced.clear()
                    wrapped(**batch()).loss.backward()
                    assert sum(reduced) == sum(p.numel() for p in model.parameters())
            assert_same_gradients({n: p.grad for n, p in model.named_parameters()}, expected)
    finally:
        dist.destroy_process_group()
