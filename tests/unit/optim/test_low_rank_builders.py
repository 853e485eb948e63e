"""What GaLore and APOLLO select to project, and what they mark on the model."""

from typing import Any

import pytest

import finetune
from finetune.optim import low_rank_builders
from finetune.optim.fused_backward import release_optimizer
from finetune.optim.registry import build_optimizer


def build(model: Any, optim: str, targets: Any) -> Any:
    options = {"optim_target_modules": targets, "optim_args": "rank=4", "use_cpu": True, "report_to": "none"}
    return build_optimizer(finetune.TrainingArguments("unused", optim=optim, **options), model)


@pytest.mark.parametrize("optim", ["galore_adamw", "apollo_adamw"])
def test_a_tied_head_is_projected(optim: str, tiny_llama: Any) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    groups = build(model, optim, ["lm_head"]).param_groups
    assert [p is model.lm_head.weight for group in groups if "rank" in group for p in group["params"]] == [True]


def test_ddp_sees_every_weight_again_after_release(tiny_llama: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(low_rank_builders, "world_size", lambda: 2)
    model = tiny_llama(tie_word_embeddings=True)
    before = dict(vars(model))
    optimizer = build(model, "galore_adamw_layerwise", ["lm_head", "q_proj"])
    names = {"lm_head.weight", "model.embed_tokens.weight"}
    names |= {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}
    assert set(model._ddp_params_and_buffers_to_ignore) == names
    release_optimizer(optimizer)
    assert vars(model) == before
    assert not any(hasattr(p, "_ddp_ignored") for p in model.parameters())


def test_what_the_user_hides_from_ddp_stays_hidden(tiny_llama: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(low_rank_builders, "world_size", lambda: 2)
    model = tiny_llama()
    model._ddp_params_and_buffers_to_ignore = ["lm_head.weight"]
    optimizer = build(model, "galore_adamw_layerwise", ["q_proj"])
    assert "lm_head.weight" in model._ddp_params_and_buffers_to_ignore
    release_optimizer(optimizer)
    assert model._ddp_params_and_buffers_to_ignore == ["lm_head.weight"]
