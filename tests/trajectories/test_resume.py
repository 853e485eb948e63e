"""Interrupted and resumed equals uninterrupted, bit for bit: weights, optimizer, schedule, history, random state."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import finetune

COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "logging_steps": 2,
    "save_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "seed": 3,
}
TIMED = ("runtime", "per_second", "preparation_time", "refresh_seconds")


class Interrupt(finetune.TrainerCallback):
    """Ends the process's run like a crash would, right after the checkpoint of a step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.at:
            raise KeyboardInterrupt


def build(make_model: Any, dataset: Any, out: Path, callbacks: Any = (), **overrides: Any) -> finetune.Trainer:
    return finetune.Trainer(
        model=make_model(),
        args=finetune.TrainingArguments(str(out), **{**COMMON, **overrides}),
        train_dataset=dataset,
        eval_dataset=dataset if "eval_strategy" in overrides else None,
        callbacks=list(callbacks),
    )


def everything(trainer: finetune.Trainer) -> dict[str, Any]:
    history = [{k: v for k, v in e.items() if not k.endswith(TIMED)} for e in trainer.state.log_history]
    return {
        "weights": {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()},
        "optimizer": trainer.optimizer.state_dict(),
        "schedule": trainer.lr_scheduler.state_dict(),
        "history": history,
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1],
        "step": trainer.state.global_step,
        "tokens": trainer.state.num_input_tokens_seen,
    }


def assert_equal(left: Any, right: Any, where: str = "") -> None:
    assert type(left) is type(right), where
    if hasattr(left, "__tensor_flatten__"):  # quantised: compared by what it holds
        for name in left.__tensor_flatten__()[0]:
            assert_equal(getattr(left, name), getattr(right, name), f"{where}.{name}")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    elif isinstance(left, np.ndarray):
        assert np.array_equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_equal(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_equal(a, b, f"{where}[{index}]")
    else:
        assert left == right, where


def interrupted_and_resumed(make_model: Any, dataset: Any, out: Path, at: int, **overrides: Any) -> finetune.Trainer:
    with pytest.raises(KeyboardInterrupt):
        build(make_model, dataset, out, [Interrupt(at)], **overrides).train()
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    resumed = build(make_model, dataset, out, **overrides)
    resumed.train(resume_from_checkpoint=True)
    return resumed


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "without accumulation": {"gradient_accumulation_steps": 1},
    "cosine": {"lr_scheduler_type": "cosine", "warmup_steps": 3},
    "plateau": {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 2},
    "tokens counted": {"include_num_input_tokens_seen": "non_padding"},
    "background saves": {"async_save": True},
    "sgd": {"optim": "sgd"},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("at", [1, 4, 5])
def test_llama(case: str, at: int, tiny_llama: Any, padded_dataset: Any, tmp_path: Path) -> None:
    dataset = padded_dataset(18)
    whole = build(tiny_llama, dataset, tmp_path / "whole", **CASES[case])
    whole.train()
    resumed = interrupted_and_resumed(tiny_llama, dataset, tmp_path / "cut", at, **CASES[case])
    assert_equal(everything(resumed), everything(whole))


@pytest.mark.parametrize("at", [2, 5, 7])
def test_dropout(at: int, tiny_bert: Any, tmp_path: Path) -> None:
    from datasets import Dataset

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 128, (18, 12), generator=generator).tolist()
    dataset = Dataset.from_dict({"input_ids": ids, "labels": [i % 3 for i in range(18)]})
    whole = build(tiny_bert, dataset, tmp_path / "whole")
    whole.train()
    resumed = interrupted_and_resumed(tiny_bert, dataset, tmp_path / "cut", at)
    assert_equal(everything(resumed), everything(whole))


def test_resuming_a_resumed_run(tiny_llama: Any, padded_dataset: Any, tmp_path: Path) -> None:
    dataset = padded_dataset(18)
    whole = build(tiny_llama, dataset, tmp_path / "whole")
    whole.train()
    for at in (2, 6):
        with pytest.raises(KeyboardInterrupt):
            build(tiny_llama, dataset, tmp_path / "cut", [Interrupt(at)]).train(resume_from_checkpoint="auto")
    resumed = build(tiny_llama, dataset, tmp_path / "cut")
    resumed.train(resume_from_checkpoint="auto")
    assert_equal(everything(resumed), everything(whole))


@pytest.mark.parametrize("steps", [9, 10])
def test_resuming_behind_the_last_step_changes_nothing(
    steps: int, tiny_llama: Any, padded_dataset: Any, tmp_path: Path
) -> None:
    """The process may die after the last checkpoint and before its end; 9 steps end in the middle of an epoch."""
    dataset = padded_dataset(18)
    whole = build(tiny_llama, dataset, tmp_path / "whole", max_steps=steps)
    whole.train()
    resumed = interrupted_and_resumed(tiny_llama, dataset, tmp_path / "cut", steps, max_steps=steps)
    assert_equal(everything(resumed), everything(whole))


def test_changed_data_is_refused_and_can_be_forced(tiny_llama: Any, padded_dataset: Any, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(tiny_llama, padded_dataset(18), tmp_path, [Interrupt(3)]).train()
    other = padded_dataset(18, seed=1)
    with pytest.raises(finetune.CheckpointError, match="ignore_data_skip"):
        build(tiny_llama, other, tmp_path).train(resume_from_checkpoint=True)
    forced = build(tiny_llama, other, tmp_path, ignore_data_skip=True)
    forced.train(resume_from_checkpoint=True)
    assert forced.state.global_step == 10


def test_another_micro_batch_continues_with_the_same_rows(
    tiny_llama: Any, padded_dataset: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = padded_dataset(16)
    whole = build(tiny_llama, dataset, tmp_path / "whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        build(tiny_llama, dataset, tmp_path / "cut", [Interrupt(3)]).train()
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    resumed = build(tiny_llama, dataset, tmp_path / "cut", **sizes)
    resumed.train(resume_from_checkpoint=True)
    assert "same rows per optimizer step" in caplog.text
    for name, tensor in resumed.model.state_dict().items():
        assert torch.allclose(tensor, whole.model.state_dict()[name], atol=1e-6), name
    with pytest.raises(finetune.CheckpointError, match="rows per optimizer step"):
        build(tiny_llama, dataset, tmp_path / "cut", per_device_train_batch_size=4).train(
            resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3")
        )


def theirs(make_model: Any, dataset: Any, out: Path, **overrides: Any) -> transformers.Trainer:
    args = transformers.TrainingArguments(str(out), **{**COMMON, **overrides})
    return transformers.Trainer(model=make_model(), args=args, train_dataset=dataset)


@pytest.mark.parametrize("at", [3, 6])
def test_checkpoints_cross_over_both_ways(at: int, tiny_llama: Any, padded_dataset: Any, tmp_path: Path) -> None:
    dataset = padded_dataset(18)
    whole = theirs(tiny_llama, dataset, tmp_path / "theirs")
    whole.train()
    ours = build(tiny_llama, dataset, tmp_path / "ours")
    ours.train()
    into_ours = build(tiny_llama, dataset, tmp_path / "a")
    into_ours.train(resume_from_checkpoint=str(tmp_path / "theirs" / f"checkpoint-{at}"))
    into_theirs = theirs(tiny_llama, dataset, tmp_path / "b")
    into_theirs.train(resume_from_checkpoint=str(tmp_path / "ours" / f"checkpoint-{at}"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(into_ours.model.state_dict()[name], tensor), name
        assert torch.equal(into_theirs.model.state_dict()[name], tensor), name


class Stream(torch.utils.data.IterableDataset):
    """Rows in order, without a state, as most hand-written streams are."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


@pytest.mark.parametrize(("first", "second"), [("ours", "ours"), ("theirs", "ours"), ("ours", "theirs")])
def test_a_stream_without_state_goes_on_where_it_was(
    first: str, second: str, tiny_llama: Any, padded_dataset: Any, tmp_path: Path
) -> None:
    """transformers' checkpoints do not say where a stream was; the batches up to the step are read again."""
    make, stream = {"ours": build, "theirs": theirs}, Stream(padded_dataset(40))
    whole = make[first](tiny_llama, stream, tmp_path / "whole", max_steps=6)
    whole.train()
    resumed = make[second](tiny_llama, stream, tmp_path / "resumed", max_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
