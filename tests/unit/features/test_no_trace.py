"""Features that change a model leave no trace: after success, an exception and an interrupt it is what it was."""

from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from finetune.features.compiled import compiled_blocks
from finetune.features.garbage import garbage_control
from finetune.features.neftune import neftune
from finetune.features.offload import offload_activations
from finetune.kernels.attention import use_packed_attention
from finetune.kernels.fused_head import fuse_head
from finetune.kernels.liger import apply_liger, liger_parity
from finetune.models.activation import activation_checkpointing, use_cache
from finetune.optim.fused_backward import release_optimizer
from finetune.optim.registry import build_optimizer


@contextmanager
def liger(model: Any):
    pytest.importorskip("liger_kernel")
    with apply_liger(model, {"fused_linear_cross_entropy": False, "rms_norm": False, "swiglu": False}) as handle:
        with liger_parity(model, handle):
            yield


@contextmanager
def in_backward(model: Any, optim: str):
    import finetune

    lowrank: dict[str, Any] = {"optim_target_modules": [r".*mlp.*"], "optim_args": "rank=4, update_proj_gap=3"}
    if optim == "lomo":
        pytest.importorskip("lomo_optim")
        lowrank = {}
    alone = {"max_grad_norm": 0.0, "gradient_accumulation_steps": 1}
    args = finetune.TrainingArguments("unused", optim=optim, use_cpu=True, report_to="none", **lowrank, **alone)
    optimizer = build_optimizer(args, model)
    try:
        yield
    finally:
        release_optimizer(optimizer)


FEATURES: dict[str, Any] = {
    "neftune": lambda model: neftune(model, 5.0),
    "liger": liger,
    "compiled blocks": lambda model: compiled_blocks(model, backend="eager"),
    "activation offloading": lambda model: offload_activations(model, min_bytes=1, device_types=("cpu",)),
    "activation checkpointing": lambda model: activation_checkpointing(model, True, None),
    "no cache": lambda model: use_cache(model, False),
    "fused head": lambda model: fuse_head(model, entropy=True),
    "packed attention": use_packed_attention,
    "layerwise galore": lambda model: in_backward(model, "galore_adamw_layerwise"),
    "layerwise apollo": lambda model: in_backward(model, "apollo_adamw_layerwise"),
    "lomo": lambda model: in_backward(model, "lomo"),
    "rare collections": lambda _: garbage_control(),
}
HOOKS = [name for name in nn.Module().__dict__ if name.endswith("_hooks") or "_hooks_" in name]


def anatomy(model: Any) -> list[Any]:
    """Returns what a feature could change: attributes of modules and config, hooks of modules and parameters."""
    found: list[Any] = [dict(model.config.to_dict()), model.config._attn_implementation]
    for name, module in model.named_modules():
        # By identity, except for what PyTorch fills in place.
        attributes = {key: id(value) for key, value in vars(module).items() if key not in HOOKS}
        found.append(
            (name, attributes, type(module), module.forward, {key: len(getattr(module, key)) for key in HOOKS})
        )
    for name, parameter in model.named_parameters():
        hooks = parameter._post_accumulate_grad_hooks, parameter._backward_hooks
        found.append((name, [len(each) if each else 0 for each in hooks], sorted(vars(parameter))))
    return found


def pass_through(model: Any) -> tuple[Any, ...]:
    ids = torch.arange(3, 19).reshape(2, 8)
    model.zero_grad()
    torch.manual_seed(1)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("end", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", FEATURES)
def test_nothing_is_left(name: str, end: Any, tiny_llama: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = tiny_llama(attention_dropout=0.1).train()
    before_pass = pass_through(model)
    model.zero_grad()
    before = anatomy(model)
    weights = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(end) if end else nullcontext(), FEATURES[name](model):
        if name not in ("liger", "packed attention"):  # kernels for a GPU; rows that say where samples end
            pass_through(model)
        if end:
            raise end
    if name in ("layerwise apollo", "lomo"):  # they update weights in backward, as they should
        for parameter, value in zip(model.parameters(), weights, strict=True):
            parameter.data.copy_(value)
    model.zero_grad()
    assert anatomy(model) == before
    after_pass = pass_through(model)
    assert len(after_pass) == len(before_pass) and all(map(torch.equal, after_pass, before_pass))
