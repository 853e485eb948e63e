"""Weights that ZeRO-3 divided while the model was loaded, with a stand-in for DeepSpeed."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from finetune.distributed.divided import whole_where_used
from finetune.kernels.attention import use_packed_attention
from finetune.sft.build import prove_isolation


def test_divided_weights_are_whole_for_the_module_that_runs(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module at a time, because the whole model may not fit."""
    model = tiny_llama()
    whole = {p: p.data for p in model.parameters()}
    held: list[int] = []

    class Gathered:
        def __init__(self, parameters):
            self.parameters = parameters

        def __enter__(self):
            for p in self.parameters:
                p.data = whole[p]
            held.append(sum(p.numel() > 0 for p in model.parameters()))

        def __exit__(self, *_):
            for p in self.parameters:
                p.data = torch.empty(0)

    deepspeed: Any = ModuleType("deepspeed")
    deepspeed.zero = SimpleNamespace(GatheredParameters=Gathered)
    monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)
    for p in model.parameters():
        p.ds_id, p.ds_shape, p.data = 0, p.shape, torch.empty(0)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    with use_packed_attention(model):
        prove_isolation(model)
    assert max(held) == 1 and not any(p.numel() for p in model.parameters())
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks


def test_other_models_are_left_alone(tiny_llama: Any) -> None:
    model = tiny_llama()
    with whole_where_used(model):
        assert not any(module._forward_pre_hooks for module in model.modules())
