"""Liger by name and through a handle: errors here, arithmetic in a subprocess under Triton's interpreter."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from finetune.errors import ArgumentError
from finetune.kernels.fused_head import unsupported_reason
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


PARITY = textwrap.dedent(
    """
    import runpy, sys
    runpy.run_path(sys.argv[1])
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

INTERPRETER = textwrap.dedent(
    '''
    """Triton's interpreter leaves float arguments as Python floats and its libdevice functions return None."""
    import numpy as np
    import triton.language as tl
    import triton.runtime.interpreter as interpreter
    from importlib import import_module

    convert = interpreter._implicit_cvt

    def convert_floats(arg):
        if isinstance(arg, float):
            return tl.tensor(interpreter.TensorHandle(np.array([arg], dtype=np.float32), tl.float32), tl.float32)
        return convert(arg)

    interpreter._implicit_cvt = convert_floats
    for name in ("rms_norm", "cross_entropy"):
        module = import_module("liger_kernel.ops." + name)
        if hasattr(module, "rsqrt"):
            module.rsqrt = lambda x: tl.rsqrt(x)
        if hasattr(module, "tanh"):
            module.tanh = lambda x: 2 * tl.sigmoid(2 * x) - 1
    '''
)


def test_same_loss_and_gradients_under_the_interpreter(tmp_path) -> None:
    shim = tmp_path / "interpreter.py"
    shim.write_text(INTERPRETER)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", PARITY, str(shim)], check=True, env=environment, timeout=300)
