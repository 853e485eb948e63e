"""Spies on every override point: called as often, with the same arguments, as under transformers.Trainer."""

import inspect
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from datasets import Dataset

import finetune

COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 3,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}
EVALUATING = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}

# Called differently on purpose. README.md, "Override points", gives the reasons.
DIFFERENT = {
    "_build_accelerator_args", "_finalize_training", "_has_mixed_mesh_grads", "_init_training_state",
    "_issue_warnings_after_load", "_prepare_context_parallel_inputs", "_run_epoch", "_track_num_input_tokens",
    "_wrap_model",  # absent, see test_signatures.py
    "create_optimizer_and_scheduler",  # an override is still honoured; transformers no longer calls it
    "create_scheduler",  # hence once more by the spy on the one above
    "_get_num_items_in_batch",  # evaluation counts this process's items only: nothing is averaged there
    "_get_output_dir", "is_local_process_zero", "is_world_process_zero", "num_examples", "get_cp_size", "get_sp_size",
    "get_tp_size",  # small questions, asked whenever
}  # fmt: skip


class Call(NamedTuple):
    name: str
    num_positional: int
    keywords: tuple[str, ...]


def spied(library: Any) -> tuple[type, list[Call]]:
    """Returns a subclass that overrides every method and notes the calls."""
    calls: list[Call] = []

    def spy(name: str, method: Any) -> Any:
        def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(Call(name, len(args), tuple(sorted(kwargs))))
            return method(self, *args, **kwargs)

        return noted

    reference = transformers.Trainer
    names = [n for n in dir(reference) if inspect.isfunction(inspect.getattr_static(reference, n)) and n[:2] != "__"]
    body = {n: spy(n, getattr(library.Trainer, n)) for n in names if hasattr(library.Trainer, n)}
    return type("Spied", (library.Trainer,), body), calls


def rows(count: int, labels: bool = True) -> Dataset:
    data = {"input_ids": [[3 + i] * 8 for i in range(count)], "attention_mask": [[1] * 8] * count}
    return Dataset.from_dict({**data, **({"labels": [i % 3 for i in range(count)]} if labels else {})})


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def full_run(library: Any, make_model: Any, out: Path, **options: Any) -> list[Call]:
    cls, calls = spied(library)
    trainer = cls(
        model=make_model(),
        args=library.TrainingArguments(str(out), **COMMON, **options),
        train_dataset=rows(10),
        eval_dataset=rows(5),
        compute_metrics=accuracy,
    )
    trainer.train()
    trainer.evaluate()
    trainer.predict(rows(3, labels=False))
    trainer.save_model()
    return calls


RUNS = {
    "evaluate and save": EVALUATING,
    "evaluate at the start": {**EVALUATING, "eval_on_start": True},
    "by epoch": {"eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch"},
    "nothing": {"save_strategy": "no"},
    "plateau": {**EVALUATING, "lr_scheduler_type": "reduce_lr_on_plateau"},
    "no clipping": {"max_grad_norm": 0.0, "save_strategy": "no"},
    "tokens": {"include_num_input_tokens_seen": "non_padding", "save_strategy": "no"},
}


@pytest.mark.parametrize("name", RUNS)
def test_called_as_often_and_with_the_same_arguments(name: str, tiny_bert: Any, tmp_path: Path) -> None:
    theirs = full_run(transformers, tiny_bert, tmp_path / "a", **RUNS[name])
    ours = full_run(finetune, tiny_bert, tmp_path / "b", **RUNS[name])

    def relevant(calls: list[Call]) -> list[Call]:
        return [call for call in calls if call.name not in DIFFERENT]

    assert Counter(relevant(ours)) == Counter(relevant(theirs))
    core = {
        "training_step", "compute_loss", "prediction_step", "log", "evaluate", "evaluation_loop", "_save_checkpoint",
        "save_model", "_save", "_save_optimizer_and_scheduler", "_save_rng_state", "get_batch_samples",
        "_maybe_log_save_evaluate", "_clip_grad_norm", "_determine_best_metric", "_load_best_model", "predict",
    }  # fmt: skip
    assert [c for c in ours if c.name in core] == [c for c in theirs if c.name in core], "and in the same order"


def test_resuming_calls_the_same(tiny_bert: Any, tmp_path: Path) -> None:
    counters = []
    for library in (transformers, finetune):
        out = tmp_path / library.__name__
        full_run(library, tiny_bert, out, save_steps=2)
        cls, calls = spied(library)
        args = library.TrainingArguments(str(out), **COMMON, save_steps=2)
        cls(model=tiny_bert(), args=args, train_dataset=rows(10)).train(
            resume_from_checkpoint=str(out / "checkpoint-2")
        )
        counters.append(Counter(call for call in calls if call.name not in DIFFERENT))
    assert counters[1] == counters[0]


class Marked(torch.optim.SGD):
    pass


class OldStyle(finetune.Trainer):
    """What subclasses of the last years override."""

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        self.planned_steps = num_training_steps
        self.optimizer = Marked(self.model.parameters(), lr=0.5)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (step + 1))


def test_an_overridden_create_optimizer_and_scheduler_is_honoured(tiny_bert: Any, tmp_path: Path) -> None:
    args = finetune.TrainingArguments(str(tmp_path), **COMMON, save_strategy="no")
    trainer = OldStyle(model=tiny_bert(), args=args, train_dataset=rows(12))
    trainer.train()
    assert trainer.planned_steps == 3
    assert isinstance(getattr(trainer.optimizer, "optimizer", None), Marked)
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged == [0.5, 0.25, pytest.approx(0.5 / 3)]
    with pytest.warns(UserWarning, match="lr_scheduler.step"):  # torch, about the order in the call below
        trainer.create_optimizer_and_scheduler(7)
        trainer.lr_scheduler.step()
    assert trainer.planned_steps == 7


def test_the_length_of_the_run_can_be_overridden(tiny_bert: Any, tmp_path: Path) -> None:
    class Short(finetune.Trainer):
        def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
            epochs, updates, examples, samples, batch, batches, _ = super().set_initial_training_values(
                args, dataloader
            )
            return epochs, updates, examples, samples, batch, batches, 2

    args = finetune.TrainingArguments(str(tmp_path), **COMMON, save_strategy="no")
    assert Short(model=tiny_bert(), args=args, train_dataset=rows(12)).train().global_step == 2


def test_prepare_input_sees_every_tensor(tiny_bert: Any, tmp_path: Path) -> None:
    seen: list[Any] = []

    class Trainer(finetune.Trainer):
        def _prepare_input(self, data: Any) -> Any:
            seen.append(type(data))
            return super()._prepare_input(data)

    args = finetune.TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    Trainer(model=tiny_bert(), args=args)._prepare_inputs({"a": torch.ones(1), "b": [torch.ones(1), "text"]})
    assert seen == [dict, torch.Tensor, list, torch.Tensor, str]
