"""Exact resume with every optimizer that transformers names: what can be installed on a CPU, to the last bit.

`NOT_HERE` says which ones no CPU can run, and why; every other name is run, or skipped with the missing package.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import finetune
from finetune.errors import ArgumentError

spec = importlib.util.spec_from_file_location("resume_helpers", Path(__file__).with_name("test_resume.py"))
assert spec is not None and spec.loader is not None
helpers: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(helpers)

LOW_RANK: dict[str, Any] = {
    "optim_target_modules": [r".*attn.*", r".*mlp.*"],
    "optim_args": "rank=4, update_proj_gap=3, scale=0.25",
}
# An update inside backward: there is nothing to accumulate, and no norm to clip by.
IN_BACKWARD = {"gradient_accumulation_steps": 1, "max_grad_norm": 0.0}
SCHEDULE_FREE = {"lr_scheduler_type": "constant"}
OPTIONS: dict[str, dict[str, Any]] = {
    "galore_adamw": LOW_RANK,
    "galore_adamw_8bit": LOW_RANK,
    "galore_adafactor": LOW_RANK,
    "galore_adamw_layerwise": LOW_RANK,
    "galore_adamw_8bit_layerwise": LOW_RANK,
    "galore_adafactor_layerwise": LOW_RANK,
    "apollo_adamw": LOW_RANK,
    "apollo_adamw_layerwise": {**LOW_RANK, **IN_BACKWARD},
    "schedule_free_adamw": {**SCHEDULE_FREE, "warmup_steps": 3},
    "schedule_free_radam": SCHEDULE_FREE,
    "schedule_free_sgd": {**SCHEDULE_FREE, "warmup_steps": 3},
    "lomo": {**IN_BACKWARD, "weight_decay": 0.0},
    "sgd": {"optim_args": "momentum=0.9, nesterov=true"},
    "rmsprop": {"optim_args": "momentum=0.9, centered=true"},
}
NOT_HERE = {
    "adamw_torch_xla": "torch_xla",
    "adamw_torch_npu_fused": "torch_npu",
    "adamw_anyprecision": "torchdistx",
    "adalomo": "CUDA",
}
# bitsandbytes does it for weights with at least 4096 values.
EIGHT_BIT = [
    *("adamw_bnb_8bit", "adamw_8bit", "lion_8bit", "ademamix_8bit", "rmsprop_bnb_8bit", "galore_adamw_8bit"),
    *("paged_adamw_8bit", "paged_lion_8bit", "paged_ademamix_8bit"),
]


def names() -> list[str]:
    from transformers.training_args import OptimizerNames

    return sorted({*(name.value for name in OptimizerNames), "muon"})


def tensors(value: Any) -> list[torch.Tensor]:
    """Returns all tensors of nested dicts: bitsandbytes wraps its state once more."""
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in tensors(item)]
    return [value] if isinstance(value, torch.Tensor) else []


@pytest.mark.parametrize("name", [name for name in names() if name not in NOT_HERE])
def test_every_optimizer(name: str, tiny_llama: Any, padded_dataset: Any, tmp_path: Path) -> None:
    options = {"optim": name, "num_train_epochs": 1, **OPTIONS.get(name, {})}
    dataset = padded_dataset(18)

    def model() -> Any:
        return tiny_llama(hidden_size=64, intermediate_size=128)

    try:
        whole = helpers.build(model, dataset, tmp_path / "whole", **options)
        whole.train()
    except ArgumentError as error:
        assert "pip install" in str(error)
        pytest.skip(str(error))
    resumed = helpers.interrupted_and_resumed(model, dataset, tmp_path / "cut", 2, **options)
    end = helpers.everything(whole)
    helpers.assert_equal(helpers.everything(resumed), end)
    if name in EIGHT_BIT:
        assert torch.uint8 in {tensor.dtype for tensor in tensors(end["optimizer"])}, "some state is in 8 bits"
    losses = [entry["loss"] for entry in end["history"] if "loss" in entry]
    assert len(set(losses)) > 1, "it trained"


@pytest.mark.parametrize("name", NOT_HERE)
def test_what_no_cpu_can_run_is_refused_with_what_it_needs(name: str, tiny_llama: Any, tmp_path: Path) -> None:
    if importlib.util.find_spec(NOT_HERE[name]) is not None or torch.cuda.is_available():
        pytest.skip("it is here")
    args = finetune.TrainingArguments(str(tmp_path), optim=name, use_cpu=True, report_to="none")
    with pytest.raises(ArgumentError, match=NOT_HERE[name]):
        finetune.Trainer(model=tiny_llama(), args=args, train_dataset=[]).create_optimizer()
