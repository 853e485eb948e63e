"""Exact resume: every schedule, and interruptions at awkward places."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import finetune

spec = importlib.util.spec_from_file_location("resume_helpers", Path(__file__).with_name("test_resume.py"))
assert spec is not None and spec.loader is not None
helpers: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(helpers)

SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {"lr_scheduler_kwargs": {"num_cycles": 2}},
    "polynomial": {"lr_scheduler_kwargs": {"power": 2.0}},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {},
    "reduce_lr_on_plateau": {"lr_scheduler_kwargs": {"patience": 0, "threshold": 10.0}},
    "cosine_with_min_lr": {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
    "cosine_warmup_with_min_lr": {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
    "warmup_stable_decay": {"lr_scheduler_kwargs": {"num_decay_steps": 3}},
    "greedy": {},
}
MEASURING = {"eval_strategy": "steps", "eval_steps": 2}


def test_all_schedules_are_listed() -> None:
    from transformers.trainer_utils import SchedulerType

    assert set(SCHEDULES) == {name.value for name in SchedulerType}


def compare(make_model: Any, dataset: Any, folder: Path, at: int, **options: Any) -> dict[str, Any]:
    """Returns the end of the whole run, after comparing that of a run interrupted `at` a step with it."""
    whole = helpers.build(make_model, dataset, folder / "whole", **options)
    whole.train()
    resumed = helpers.interrupted_and_resumed(make_model, dataset, folder / "cut", at, **options)
    end = helpers.everything(whole)
    helpers.assert_equal(helpers.everything(resumed), end)
    return end


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name: str, tiny_llama: Any, padded_dataset: Any, tmp_path: Path) -> None:
    by_loss = name in ("reduce_lr_on_plateau", "greedy")
    options = {"lr_scheduler_type": name, "logging_steps": 1, **SCHEDULES[name], **(MEASURING if by_loss else {})}
    if not by_loss:
        options["warmup_steps"] = 3
    end = compare(tiny_llama, padded_dataset(18), tmp_path, 6, **options)
    rates = {entry["learning_rate"] for entry in end["history"] if "learning_rate" in entry}
    assert len(rates) > 1 or name in ("constant", "greedy"), "the schedule did something that could be forgotten"


class Stop(finetune.TrainerCallback):
    """Ends the run as a crash would at the `number`-th time that an event happens."""

    def __init__(self, event: str, number: int) -> None:
        self.left = number
        setattr(self, event, self.count)

    def count(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


PLACES = {
    "in an accumulation window": ("on_substep_end", 5),
    "between the gradients and the update": ("on_pre_optimizer_step", 6),
    "behind an update, before its checkpoint": ("on_step_end", 7),
    "in an evaluation": ("on_prediction_step", 13),
    "while logging": ("on_log", 4),
    "at the end of an epoch": ("on_epoch_end", 1),
}


@pytest.mark.parametrize("place", PLACES)
def test_interrupted_anywhere(place: str, tiny_bert: Any, tmp_path: Path) -> None:
    """A model with dropout, which an evaluation in the middle must not disturb."""
    from datasets import Dataset

    ids = torch.randint(5, 128, (18, 12), generator=torch.Generator().manual_seed(0)).tolist()
    dataset = Dataset.from_dict({"input_ids": ids, "labels": [i % 3 for i in range(18)]})
    options = {**MEASURING, "save_steps": 2}
    whole = helpers.build(tiny_bert, dataset, tmp_path / "whole", **options)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        helpers.build(tiny_bert, dataset, tmp_path / "cut", [Stop(*PLACES[place])], **options).train()
    torch.manual_seed(99)
    resumed = helpers.build(tiny_bert, dataset, tmp_path / "cut", **options)
    resumed.train(resume_from_checkpoint=True)
    helpers.assert_equal(helpers.everything(resumed), helpers.everything(whole))
