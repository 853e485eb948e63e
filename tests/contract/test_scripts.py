"""Recipes of scripts written for transformers that lean on details: what an override returns, sets or leaves out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset

import finetune
from finetune.errors import ArgumentError

COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 1,
    "learning_rate": 1e-3,
    "logging_steps": 2,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "seed": 11,
}


def arguments(out: Path, library: Any = finetune, **overrides: Any) -> Any:
    return library.TrainingArguments(str(out), **{**COMMON, **overrides})


def rows(count: int = 16) -> Dataset:
    ids = torch.randint(5, 128, (count, 8), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict(
        {"input_ids": ids, "attention_mask": [[1] * 8] * count, "labels": [i % 3 for i in range(count)]}
    )


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def losses(trainer: Any) -> list[tuple[float, int]]:
    return [(entry["loss"], entry["step"]) for entry in trainer.state.log_history if "loss" in entry]


def with_own_optimizer(library: Any) -> type:
    class Own(library.Trainer):  # type: ignore[name-defined,misc]
        def create_optimizer(self, model: Any = None) -> Any:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            self.lr_scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, gamma=0.5)

    return Own


def with_own_log(library: Any) -> type:
    class Own(library.Trainer):  # type: ignore[name-defined,misc]
        def _maybe_log_save_evaluate(
            self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, epoch: Any, ignore_keys_for_eval: Any,
            start_time: Any, learning_rate: Any = None,
        ) -> None:  # fmt: skip
            if self.control.should_log and self.state.global_step > self._globalstep_last_logged:
                loss = tr_loss.item()
                tr_loss -= tr_loss
                steps = self.state.global_step - self._globalstep_last_logged
                self._total_loss_scalar += loss
                self._globalstep_last_logged = self.state.global_step
                self.store_flos()
                self.log({"loss": loss / steps, "mine": 1.0}, start_time)

    return Own


@pytest.mark.parametrize("make", [with_own_optimizer, with_own_log])
def test_overrides_equal_those_of_transformers(make: Any, tiny_bert: Any, tmp_path: Path) -> None:
    runs = []
    for library in (transformers, finetune):
        trainer = make(library)(
            model=tiny_bert(), args=arguments(tmp_path, library, gradient_accumulation_steps=1), train_dataset=rows()
        )
        output = trainer.train()
        runs.append((weights(trainer), losses(trainer), output.training_loss))
    assert runs[1][1] == runs[0][1] and len(runs[0][1]) == 4
    assert runs[1][2] == pytest.approx(runs[0][2], rel=1e-12)
    for name, tensor in runs[0][0].items():
        assert torch.equal(tensor, runs[1][0][name]), name


@pytest.mark.parametrize("method", ["create_optimizer", "create_scheduler"])
def test_an_override_that_makes_nothing_is_an_error(method: str, tiny_bert: Any, tmp_path: Path) -> None:
    empty = type("Empty", (finetune.Trainer,), {method: lambda self, *args, **kwargs: None})
    trainer = empty(model=tiny_bert(), args=arguments(tmp_path), train_dataset=rows())
    with pytest.raises(ArgumentError, match=f"`Empty.{method}` made no"):
        trainer.train()


class Thaws(finetune.TrainerCallback):
    """Freezes the encoder for the first step, as gradual unfreezing does."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 1:
            for parameter in model.parameters():
                parameter.requires_grad_(True)


def test_what_a_callback_unfreezes_trains_as_in_transformers(tiny_bert: Any, tmp_path: Path) -> None:
    runs = []
    for library in (transformers, finetune):
        model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        args = arguments(tmp_path, library, gradient_accumulation_steps=1, max_steps=4)
        model.bert.requires_grad_(False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = library.Trainer(
            model=model, args=args, train_dataset=rows(), callbacks=[Thaws()], optimizers=(optimizer, None)
        )
        trainer.train()
        runs.append(weights(trainer))
    for name, tensor in runs[0].items():
        assert torch.equal(tensor, runs[1][name]), name


def test_values_of_numpy_and_objects_in_the_arguments(tiny_bert: Any, tmp_path: Path) -> None:
    args = arguments(
        tmp_path, learning_rate=np.float64(1e-3), run_name=Path("a"), max_steps=1, lr_scheduler_type="constant"
    )
    finetune.Trainer(model=tiny_bert(), args=args, train_dataset=rows()).train()
    assert (tmp_path / "resolved_config.yaml").is_file()
    args = arguments(tmp_path / "other", max_steps=1)
    args.debug = [object()]
    finetune.Trainer(model=tiny_bert(), args=args, train_dataset=rows()).train()


def test_attributes_of_the_arguments_reach_overrides_and_trials(tiny_bert: Any, tmp_path: Path) -> None:
    seen: list[Any] = []

    class Weighted(finetune.Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(self.args.class_weights)  # type: ignore[attr-defined]
            return super().compute_loss(model, inputs, *args, **kwargs)

    args = arguments(tmp_path, transformers, max_steps=1, gradient_accumulation_steps=1)
    args.class_weights = (1.0, 2.0)
    trainer = Weighted(model_init=lambda trial: tiny_bert(), args=args, train_dataset=rows(), eval_dataset=rows(4))
    trainer.train()
    assert set(seen) == {(1.0, 2.0)}
    seen.clear()
    pytest.importorskip("optuna")
    space: Any = lambda trial: {"class_weights": trial.suggest_categorical("class_weights", ["a", "b"])}  # noqa: E731
    trainer.hyperparameter_search(space, n_trials=2)
    assert set(seen) <= {"a", "b"} and seen
    assert trainer.args.class_weights == (1.0, 2.0)  # type: ignore[attr-defined]
    with pytest.raises(ArgumentError, match="no argument `world_size`"):
        trainer.hyperparameter_search(lambda trial: {"world_size": 2}, n_trials=1)
