"""LOMO: what it would ignore is refused, and the default of `max_grad_norm` is only a warning."""

import logging
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import finetune
from finetune.errors import ArgumentError
from finetune.optim.registry import build_optimizer

pytest.importorskip("lomo_optim")


def build(folder: Path, **options: Any) -> Any:
    options = {"max_grad_norm": 0.0, "learning_rate": 0.1, **options}
    args = finetune.TrainingArguments(str(folder), optim="lomo", use_cpu=True, report_to="none", **options)
    return build_optimizer(args, nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gradient_accumulation_steps": 2}, ["`gradient_accumulation_steps=1`"]),
        ({"max_grad_norm": 0.5}, ["`max_grad_norm=0`", "clip_grad_value"]),
        ({"nonfinite_policy": "skip_step"}, ["`nonfinite_policy='raise'`", "`optim=lomo`"]),
        ({"weight_decay": 0.1}, ["`weight_decay=0.1`", "Set it to 0"]),
        ({"optim_args": "lr@0=0.01"}, ["`lr@0`", "`optim=lomo`"]),
        ({"optim_args": "clip_grad_norm=1.0"}, ["`clip_grad_norm`", "clip_grad_value"]),
    ],
)
def test_what_would_be_ignored_is_refused(options: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    with pytest.raises(ArgumentError) as error:
        build(tmp_path, **options)
    assert all(word in str(error.value) for word in words)


def test_only_the_default_norm_is_a_warning(tmp_path: Path, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        assert build(tmp_path).lr == 0.1
        assert not caplog.records
        build(tmp_path, max_grad_norm=1.0)
    assert "`max_grad_norm=1.0` has no effect" in caplog.text


def test_single_values_can_be_clipped(tmp_path: Path) -> None:
    assert build(tmp_path, optim_args="clip_grad_value=0.5").clip_grad_value == 0.5
