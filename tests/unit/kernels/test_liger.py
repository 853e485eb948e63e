"""Liger by name and through a handle: errors here, arithmetic in a subprocess under Triton's interpreter."""

import functools
import os
import subprocess
import sys
import textwrap
import types
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from finetune import Trainer, TrainingArguments
from finetune.errors import ArgumentError
from finetune.kernels import liger
from finetune.kernels.head_support import unsupported_reason
from finetune.kernels.liger import apply_liger

pytest.importorskip("liger_kernel")


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    )


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(model, monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ArgumentError, match=r"need a GPU.*use_liger_kernel=False"):
        apply_liger(model)


def test_unknown_names(model, interpreted) -> None:
    with pytest.raises(ArgumentError, match=r"'rms_nrm'.*Did you mean `rms_norm`.*swiglu"):
        apply_liger(model, {"rms_nrm": True})
    with pytest.raises(ArgumentError, match="Keep one"):
        apply_liger(model, {"cross_entropy": True, "fused_linear_cross_entropy": True})
    with pytest.raises(ArgumentError, match="no kernels for Linear"):
        apply_liger(nn.Linear(1, 1))


def snapshot(model: nn.Module) -> list:
    return [
        *[(name, {k: id(v) for k, v in module.__dict__.items()}) for name, module in model.named_modules()],
        {k: id(v) for k, v in vars(modeling_llama).items()},
        {k: id(v) for k, v in vars(nn.functional).items()},
        {k: id(v) for k, v in vars(LlamaForCausalLM).items()},
    ]


@pytest.mark.parametrize(
    "config", [None, {"rms_norm": False, "fused_linear_cross_entropy": False}, {"cross_entropy": True}]
)
def test_only_the_named_kernels_and_removal_restores_everything(model, interpreted, config) -> None:
    before = snapshot(model)
    handle = apply_liger(model, config)
    norm, fused = model.model.norm.__dict__, model.__dict__
    wants_norm = config is None or config.get("rms_norm", True)
    wants_fused = config is None
    assert ("forward" in norm) is wants_norm is ("rms_norm" in handle.kernels)
    assert ("forward" in fused) is wants_fused is handle.owns_head
    assert "rope" in handle.kernels and modeling_llama.apply_rotary_pos_emb.__module__.startswith("liger_kernel")
    if handle.owns_head:
        assert "Liger" in (unsupported_reason(model) or "")
    handle.remove()
    handle.remove()
    assert snapshot(model) == before


def fake_apply(error, owns_head):
    """Returns a stand-in for Liger's function: a norm, or the model's forward, that is off by `error`."""

    def apply(rms_norm: bool = True, fused_linear_cross_entropy: bool = owns_head, model=None) -> None:
        if fused_linear_cross_entropy:

            @functools.wraps(LlamaForCausalLM.forward)
            def forward(self, *args, **kwargs):
                outputs = type(self).forward(self, *args, **kwargs)
                outputs.loss = outputs.loss * (1 + error)
                return outputs

            model.forward = types.MethodType(forward, model)
        else:
            norm = model.model.norm
            norm.forward = lambda hidden: type(norm).forward(norm, hidden) * (1 + 100 * error)

    return apply


def one_step(model, folder, **changes):
    ids = torch.randint(32, (4, 8)).tolist()
    rows = Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])
    args = TrainingArguments(
        str(folder), max_steps=1, use_liger_kernel=True, use_cpu=True, save_strategy="no", report_to="none",
        disable_tqdm=True, **changes,
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=rows)
    trainer.train()
    return trainer


@pytest.mark.parametrize("owns_head", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_first_batch_compares_with_and_without(model, interpreted, monkeypatch, tmp_path, owns_head, bf16) -> None:
    before = snapshot(model)
    weights = [p.detach().clone() for p in model.parameters()]
    monkeypatch.setattr(liger, "_functions", lambda: {"llama": fake_apply(0.05, owns_head)})
    with pytest.raises(ArgumentError, match=r"Liger's kernels \(.*loss of .*`use_liger_kernel=False`"):
        one_step(model, tmp_path, bf16=bf16)
    # It was found before anything was trained.
    assert all(map(torch.equal, weights, model.parameters()))
    right = fake_apply(1e-3 if bf16 and owns_head else 1e-7, owns_head)
    monkeypatch.setattr(liger, "_functions", lambda: {"llama": right})
    trainer = one_step(model, tmp_path, bf16=bf16)
    assert trainer.state.global_step == 1 and not model._forward_pre_hooks
    if not bf16:
        assert snapshot(model)[2:] == before[2:] and "forward" not in model.model.norm.__dict__


def test_the_comparison_disturbs_no_random_state(model, interpreted, monkeypatch) -> None:
    monkeypatch.setattr(liger, "_functions", lambda: {"llama": fake_apply(0.0, True)})
    model.model.layers[0].self_attn.attention_dropout = 0.5
    ids = torch.randint(32, (2, 8))
    losses = []
    for compares in (False, True):
        torch.manual_seed(3)
        with apply_liger(model) as handle, liger.liger_parity(model, handle) if compares else nullcontext():
            losses.append(model.train()(input_ids=ids, labels=ids).loss)
    assert torch.equal(*losses)


PARITY = textwrap.dedent(
    """
    import runpy, sys
    runpy.run_path(sys.argv[1])["install"]()
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from finetune.kernels.liger import apply_liger

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                         num_attention_heads=2))
    ids = torch.randint(0, 64, (2, 8))

    def run():
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters()]

    loss, grads = run()
    handle = apply_liger(model)
    liger_loss, liger_grads = run()
    handle.remove()
    again, after = run()
    assert abs(loss - liger_loss) < 1e-6
    for a, b in zip(grads, liger_grads):
        assert (a - b).abs().max() <= 1e-5 * a.abs().max() + 1e-8
    assert torch.equal(again, loss) and all(map(torch.equal, after, grads))
    """
)

SHIM = Path(__file__).parents[2] / "distributed" / "triton_shim.py"


def test_same_loss_and_gradients_under_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", PARITY, str(SHIM)], check=True, env=environment, timeout=300)
