"""The ways users make a trainer their own: overrides, callbacks, callables and arguments, as scripts use them."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from torch import nn

import finetune
from finetune.errors import ArgumentError, DataFormatError, NonFiniteLossError

COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 1,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "seed": 11,
}
TIMED = ("runtime", "per_second", "preparation_time")


def arguments(out: Path, library: Any = finetune, **overrides: Any) -> Any:
    return library.TrainingArguments(str(out), **{**COMMON, **overrides})


def untimed(trainer: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in e.items() if not k.endswith(TIMED)} for e in trainer.state.log_history]


def classification_rows(rows: int = 16, labels: bool = True) -> Dataset:
    ids = torch.randint(5, 128, (rows, 8), generator=torch.Generator().manual_seed(0)).tolist()
    data = {"input_ids": ids, "attention_mask": [[1] * 8] * rows}
    return Dataset.from_dict({**data, **({"labels": [i % 3 for i in range(rows)]} if labels else {})})


def calm(make_bert: Any) -> Any:
    return make_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def assert_same_weights(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


# ---- The loss ----


def mean_loss(model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
    outputs = model(**{k: v for k, v in inputs.items() if k != "labels"})
    return nn.functional.cross_entropy(outputs["logits"], inputs["labels"]), outputs


class OldComputeLoss(finetune.Trainer):
    """From before `num_items_in_batch`."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:  # type: ignore[override]
        loss, outputs = mean_loss(model, inputs)
        return (loss, outputs) if return_outputs else loss


class NewComputeLoss(finetune.Trainer):
    """Takes the count and ignores it, and says so."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = mean_loss(model, inputs)
        return (loss, outputs) if return_outputs else loss


class Dividing(finetune.Trainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = mean_loss(model, inputs)
        if num_items_in_batch is not None:
            loss = loss * len(inputs["labels"]) / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("cls", [OldComputeLoss, NewComputeLoss, Dividing])
def test_a_compute_loss_of_any_age_gives_the_gradient_of_the_whole_batch(
    cls: Any, tiny_bert: Any, tmp_path: Path
) -> None:
    data = classification_rows()
    usual = finetune.Trainer(model=calm(tiny_bert), args=arguments(tmp_path), train_dataset=data)
    usual.train()
    mine = cls(model=calm(tiny_bert), args=arguments(tmp_path), train_dataset=data, eval_dataset=data)
    mine.train()
    for left, right in zip(untimed(mine), untimed(usual), strict=True):
        assert left == pytest.approx(right, rel=1e-5)
    assert mine.evaluate()["eval_loss"] == pytest.approx(usual.evaluate(data)["eval_loss"], rel=1e-5)


def test_an_override_that_forgets_the_count_is_told(tiny_bert: Any, tmp_path: Path) -> None:
    class Forgetful(NewComputeLoss):
        loss_is_scaled_for_ga = None

    with pytest.warns(UserWarning, match=r"`Forgetful.compute_loss` does not use `num_items_in_batch`"):
        Forgetful(model=calm(tiny_bert), args=arguments(tmp_path), train_dataset=classification_rows()).train()


@pytest.mark.parametrize("cls", [OldComputeLoss, NewComputeLoss, Dividing, finetune.Trainer])
def test_nobody_else_is_told(cls: Any, tiny_bert: Any, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    cls(model=calm(tiny_bert), args=arguments(tmp_path), train_dataset=classification_rows()).train()
    assert not [w for w in recwarn if "num_items_in_batch" in str(w.message)]


def summed(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    count = len(labels) if num_items_in_batch is None else num_items_in_batch
    return nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum") / count


def averaged(outputs: Any, labels: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs["logits"], labels)


@pytest.mark.parametrize("function", [summed, averaged])
def test_compute_loss_func(function: Any, tiny_bert: Any, tmp_path: Path) -> None:
    data = classification_rows(15)
    theirs = transformers.Trainer(
        model=calm(tiny_bert), args=arguments(tmp_path, transformers), train_dataset=data, eval_dataset=data,
        compute_loss_func=summed,
    )  # fmt: skip
    theirs.train()
    mine = finetune.Trainer(
        model=calm(tiny_bert), args=arguments(tmp_path), train_dataset=data, eval_dataset=data,
        compute_loss_func=function,
    )  # fmt: skip
    mine.train()
    assert mine.evaluate()["eval_loss"] == pytest.approx(mean_loss_of(mine.model, data), rel=1e-5)
    for left, right in zip(untimed(mine)[:-1], untimed(theirs), strict=True):
        assert left == pytest.approx(right, rel=1e-4)


def mean_loss_of(model: Any, data: Dataset) -> float:
    batch = {name: torch.tensor(data[name][:]) for name in data.column_names}
    with torch.no_grad():
        return mean_loss(model.eval(), batch)[0].item()


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_label_smoothing(kind: str, tiny_llama: Any, tiny_bert: Any, padded_dataset: Any, tmp_path: Path) -> None:
    data = padded_dataset(12) if kind == "llama" else classification_rows(12)
    runs = []
    for library in (transformers, finetune):
        trainer = library.Trainer(
            model=tiny_llama() if kind == "llama" else tiny_bert(),
            args=arguments(tmp_path, library, label_smoothing_factor=0.1),
            train_dataset=data,
        )
        trainer.train()
        runs.append((untimed(trainer), weights(trainer)))
    for left, right in zip(runs[1][0], runs[0][0], strict=True):
        assert left == pytest.approx(right, rel=1e-5)
    for name, tensor in runs[0][1].items():
        torch.testing.assert_close(runs[1][1][name], tensor, rtol=1e-3, atol=1e-5, msg=name)


# ---- One's own loop ----


def test_a_training_loop_of_ones_own(tiny_bert: Any, tmp_path: Path) -> None:
    class Own(finetune.Trainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            loader = self.get_train_dataloader()
            self.create_optimizer_and_scheduler(num_training_steps=len(loader))
            self.model.train()
            losses = []
            for batch in loader:
                loss = self.model(**batch).loss
                loss.backward()
                self.optimizer.step()
                self.lr_scheduler.step()
                self.optimizer.zero_grad()
                self.state.global_step += 1
                losses.append(loss.item())
                self.log({"loss": loss.item()})
            return losses

    data = classification_rows(32)
    trainer = Own(model=calm(tiny_bert), args=arguments(tmp_path), train_dataset=data, eval_dataset=data)
    before = mean_loss_of(trainer.model, data)
    losses = trainer.train()
    assert len(losses) == 16
    assert set(trainer.lr_scheduler.get_last_lr()) == {0.0}
    assert [entry["step"] for entry in trainer.state.log_history] == list(range(1, 17))
    metrics = trainer.evaluate()
    assert {
        "eval_loss", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time",
    } <= metrics.keys()  # fmt: skip
    assert metrics["eval_loss"] == pytest.approx(mean_loss_of(trainer.model, data), rel=1e-5)
    assert metrics["eval_loss"] < before


def test_training_twice_equals_transformers(tiny_bert: Any, tmp_path: Path) -> None:
    runs = []
    for library in (transformers, finetune):
        trainer = library.Trainer(
            model=tiny_bert(),
            args=arguments(tmp_path, library, gradient_accumulation_steps=1),
            train_dataset=classification_rows(8),
        )
        trainer.train()
        trainer.train()
        runs.append(weights(trainer))
    assert_same_weights(runs[1], runs[0])


# ---- Callbacks ----


class TheirCallback(transformers.TrainerCallback):
    """A callback as written for transformers: changes the control in place."""

    def __init__(self) -> None:
        self.models: set[int] = set()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> Any:
        self.models.add(id(model))
        if state.global_step == 2:
            control.should_training_stop = True
        return control


class Dict(finetune.TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        return {"should_training_stop": state.global_step == 2}


@pytest.mark.parametrize("callback", [TheirCallback, Dict])
def test_callbacks_steer(callback: Any, tiny_bert: Any, tmp_path: Path) -> None:
    instance = callback()
    trainer = finetune.Trainer(
        model=tiny_bert(), args=arguments(tmp_path), train_dataset=classification_rows(), callbacks=[instance]
    )
    assert trainer.train().global_step == 2
    if callback is TheirCallback:
        assert instance.models == {id(trainer.model)}


@pytest.mark.parametrize("library", [transformers, finetune])
def test_early_stopping(library: Any, tiny_bert: Any, tmp_path: Path) -> None:
    class Rising(finetune.Trainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            metrics = {**super().evaluate(*args, **kwargs), "eval_loss": float(self.state.global_step)}
            self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    args = arguments(
        tmp_path, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True
    )
    trainer = Rising(
        model=tiny_bert(), args=args, train_dataset=classification_rows(40), eval_dataset=classification_rows(4),
        callbacks=[library.EarlyStoppingCallback(early_stopping_patience=3)],
    )  # fmt: skip
    # The first evaluation is the best; each following one counts twice (its own event and the one above).
    assert trainer.train().global_step < 10
    assert trainer.state.best_global_step == 1
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")


def test_transformers_callbacks_can_be_removed_by_their_class(tiny_bert: Any, tmp_path: Path) -> None:
    trainer = finetune.Trainer(model=tiny_bert(), args=arguments(tmp_path))
    assert type(trainer.pop_callback(transformers.PrinterCallback)) is finetune.PrinterCallback
    trainer.add_callback(transformers.PrinterCallback)
    trainer.remove_callback(finetune.PrinterCallback)  # a stranger: nothing of ours is left to remove
    trainer.remove_callback(transformers.PrinterCallback)
    assert trainer.callback_handler.callback_list == "DefaultFlowCallback"


# ---- Models and optimizers ----


def test_model_init_starts_each_training_from_the_same_weights(tiny_bert: Any, tmp_path: Path) -> None:
    made: list[Any] = []

    def model_init() -> Any:
        made.append(transformers.BertForSequenceClassification(tiny_bert().config))
        return made[-1]

    trainer = finetune.Trainer(model_init=model_init, args=arguments(tmp_path), train_dataset=classification_rows())
    trainer.train()
    first = weights(trainer)
    trainer.train()
    assert_same_weights(weights(trainer), first)
    assert trainer.model is made[-1] and len(made) == 3
    assert trainer.evaluate(classification_rows())["eval_loss"] == pytest.approx(
        mean_loss_of(made[-1], classification_rows()), rel=1e-5
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": None}, "neither"),
        ({"model_init": lambda: None}, "both"),
        ({"model": None, "model_init": lambda a, b: None}, "takes 2"),
        ({"model": None, "model_init": lambda: None}, "returned None"),
        ({"optimizer_cls_and_kwargs": (torch.optim.SGD, {}), "optimizers": ("given", None)}, "not both"),
        ({"data_collator": 3}, "`data_collator` must be callable"),
        ({"compute_metrics": {"a": 1}}, "`compute_metrics` must be a function"),
    ],
)
def test_contradictions_are_errors_at_once(options: Any, message: str, tiny_bert: Any, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=message):
        finetune.Trainer(**{"model": tiny_bert(), "args": arguments(tmp_path), **options})


def test_evaluation_without_data_and_a_stream_without_end_are_errors_at_once(tiny_bert: Any, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="`eval_strategy` is 'epoch' but there is no `eval_dataset`"):
        finetune.Trainer(model=tiny_bert(), args=arguments(tmp_path, eval_strategy="epoch"))
    stream = classification_rows().to_iterable_dataset()
    with pytest.raises(ArgumentError, match="Set `max_steps`"):
        finetune.Trainer(model=tiny_bert(), args=arguments(tmp_path), train_dataset=stream)


def own_optimizers(model: Any) -> tuple[Any, Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size=2)


@pytest.mark.parametrize("way", ["optimizers", "optimizer only", "class and kwargs"])
def test_optimizers_given(way: str, tiny_bert: Any, tmp_path: Path) -> None:
    runs = []
    for library in (transformers, finetune):
        model = tiny_bert()
        optimizer, schedule = own_optimizers(model)
        options: dict[str, Any] = {"optimizers": (optimizer, schedule)}
        if way == "optimizer only":
            options = {"optimizers": (optimizer, None)}
        elif way == "class and kwargs":
            options = {"optimizer_cls_and_kwargs": (torch.optim.RMSprop, {"lr": 0.01, "alpha": 0.9})}
        args = arguments(tmp_path, library, gradient_accumulation_steps=1)
        trainer = library.Trainer(model=model, args=args, train_dataset=classification_rows(), **options)
        trainer.train()
        runs.append((weights(trainer), untimed(trainer)))
    assert_same_weights(runs[1][0], runs[0][0])
    assert runs[1][1] == runs[0][1]


class Hungry(nn.Module):
    """Runs out of memory, as CUDA would say it, for more than `limit` rows."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.sizes = limit, []
        self.layer = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        self.sizes.append(len(x))
        if len(x) > self.limit:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        logits = self.layer(x)
        loss = nn.functional.cross_entropy(logits, labels) if labels is not None else None
        return {"loss": loss, "logits": logits} if loss is not None else {"logits": logits}


def float_rows(rows: int = 16) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(4, generator=generator), "labels": i % 2} for i in range(rows)]


def test_auto_find_batch_size(tmp_path: Path) -> None:
    model = Hungry(limit=3)
    args = arguments(
        tmp_path, auto_find_batch_size=True, per_device_train_batch_size=8, gradient_accumulation_steps=1,
        save_strategy="steps", save_steps=2,
    )  # fmt: skip
    trainer = finetune.Trainer(model=model, args=args, train_dataset=float_rows())
    trainer.train()
    found = trainer.state.train_batch_size
    assert found is not None and found <= 3
    assert trainer.state.global_step == -(-16 // found)
    assert args.per_device_train_batch_size == 8, "arguments are never changed"
    model.sizes.clear()
    again = finetune.Trainer(model=model, args=args, train_dataset=float_rows())
    again.train(resume_from_checkpoint=True)
    assert max(model.sizes, default=0) <= 3, "a resumed run starts with what was found"


def test_an_evaluation_out_of_memory_says_so(tmp_path: Path) -> None:
    args = arguments(
        tmp_path, auto_find_batch_size=True, per_device_train_batch_size=2, per_device_eval_batch_size=8,
        eval_strategy="epoch",
    )  # fmt: skip
    trainer = finetune.Trainer(model=Hungry(3), args=args, train_dataset=float_rows(), eval_dataset=float_rows())
    with pytest.raises(RuntimeError, match="`per_device_eval_batch_size`"):
        trainer.train()


# ---- Data ----


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return {**self.rows[index], "note": "not for the model"}


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter({**row, "note": "not for the model"} for row in self.rows)


class SizedStream(Stream):
    def __len__(self) -> int:
        return len(self.rows)


@pytest.mark.parametrize("make", [Rows, Stream, SizedStream, Dataset.from_list, "datasets stream"])
def test_every_kind_of_data_set_trains_and_evaluates(make: Any, tmp_path: Path) -> None:
    rows = float_rows(10)
    data = Dataset.from_list(rows).to_iterable_dataset() if make == "datasets stream" else make(rows)
    sized = make in (Rows, SizedStream, Dataset.from_list)
    options = {} if sized else {"max_steps": 4}
    trainer = finetune.Trainer(
        model=Hungry(99), args=arguments(tmp_path, **options), train_dataset=data, eval_dataset=data
    )
    assert trainer.train().global_step == (3 if sized else 4)
    metrics = trainer.evaluate()
    x, labels = torch.stack([row["x"] for row in rows]), torch.tensor([row["labels"] for row in rows])
    expected = nn.functional.cross_entropy(trainer.model.layer(x), labels).item()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["eval_samples_per_second"] == pytest.approx(10 / metrics["eval_runtime"], rel=0.05)
    prediction = trainer.predict(data)
    assert prediction.predictions.shape == (10, 2)
    assert prediction.label_ids.tolist() == labels.tolist()


class Windows(finetune.TrainerCallback):
    def __init__(self) -> None:
        self.micro_batches, self.sizes = 1, []

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.micro_batches += 1

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sizes.append(self.micro_batches)
        self.micro_batches = 1


def test_a_stream_that_ends_inside_a_window(tmp_path: Path) -> None:
    """10 rows in batches of 2, 2 micro-batches per update: each pass has windows of 2, 2 and 1."""
    windows = Windows()
    args = arguments(tmp_path, max_steps=6, max_grad_norm=0.0, optim="sgd", lr_scheduler_type="constant")
    model = Hungry(99)
    start = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer = finetune.Trainer(model=model, args=args, train_dataset=Stream(float_rows(10)), callbacks=[windows])
    trainer.train()
    assert windows.sizes == [2, 2, 1] * 2
    # The same by hand: each window's gradient is that of its own mean.
    by_hand = nn.Linear(4, 2)
    by_hand.load_state_dict({name.removeprefix("layer."): value for name, value in start.items()})
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=1e-3)
    for rows in [float_rows(10)[i : i + 4] for i in (0, 4, 8)] * 2:
        x, labels = torch.stack([row["x"] for row in rows]), torch.tensor([row["labels"] for row in rows])
        optimizer.zero_grad()
        nn.functional.cross_entropy(by_hand(x), labels).backward()
        optimizer.step()
    torch.testing.assert_close(trainer.model.layer.weight, by_hand.weight)


def test_columns_nobody_takes_are_an_error_that_names_them(tiny_bert: Any, tmp_path: Path) -> None:
    data = Dataset.from_dict({"text": ["a"] * 4, "score": [1] * 4})
    trainer = finetune.Trainer(model=tiny_bert(), args=arguments(tmp_path), train_dataset=data)
    with pytest.raises(DataFormatError, match=r"Found: text, score.*input_ids.*`remove_unused_columns=False`") as error:
        trainer.train()
    assert "BertForSequenceClassification.forward" in str(error.value)


def test_data_seed_changes_the_order_and_nothing_else(tiny_bert: Any, tmp_path: Path) -> None:
    def order(**options: Any) -> list[int]:
        trainer = finetune.Trainer(
            model=tiny_bert(), args=arguments(tmp_path, **options), train_dataset=classification_rows()
        )
        return list(iter(trainer._get_train_sampler()))

    assert order() == order(data_seed=11) == order(seed=5, data_seed=11)
    assert order() != order(data_seed=12)
    assert order(seed=12) == order(data_seed=12)


# ---- PEFT ----


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_peft_models(kind: str, tiny_llama: Any, tiny_bert: Any, padded_dataset: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base, data = (tiny_llama(), padded_dataset(8)) if kind == "llama" else (calm(tiny_bert), classification_rows(8))
    task = "CAUSAL_LM" if kind == "llama" else "SEQ_CLS"
    targets = ["q_proj", "v_proj"] if kind == "llama" else ["query", "value"]
    model = get_peft_model(base, LoraConfig(task_type=task, r=2, target_modules=targets))
    trainer = finetune.Trainer(model=model, args=arguments(tmp_path), train_dataset=data, eval_dataset=data)
    assert trainer.label_names == ["labels"]
    before = trainer.evaluate()["eval_loss"]
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    for name, parameter in model.named_parameters():
        assert name not in frozen or torch.equal(parameter, frozen[name]), name
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").is_file()


# ---- Best model ----


def best_run(make_bert: Any, out: Path, **options: Any) -> finetune.Trainer:
    scores = iter([0.1, 0.5, 0.3, 0.2, 0.4, 0.1, 0.2])
    trainer = finetune.Trainer(
        model=make_bert(),
        args=arguments(out, eval_strategy="steps", eval_steps=1, save_steps=1, max_steps=4, **options),
        train_dataset=classification_rows(),
        eval_dataset=classification_rows(4),
        compute_metrics=lambda prediction: {"score": next(scores)},
    )
    trainer.train()
    return trainer


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("checkpoint-*"))


def test_the_best_model_is_loaded_at_the_end(tiny_bert: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    trainer = best_run(
        tiny_bert, tmp_path, load_best_model_at_end=True, metric_for_best_model="score", save_strategy="steps",
        save_total_limit=2,
    )  # fmt: skip
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (0.5, 2)
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4"], "neither the best nor the last is deleted"
    for name, tensor in load_file(tmp_path / "checkpoint-2" / "model.safetensors").items():
        assert torch.equal(trainer.model.state_dict()[name], tensor), name


def test_save_strategy_best_saves_improvements_only(tiny_bert: Any, tmp_path: Path) -> None:
    best_run(tiny_bert, tmp_path, save_strategy="best", metric_for_best_model="score")
    assert checkpoints(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_smaller_can_be_better(tiny_bert: Any, tmp_path: Path) -> None:
    trainer = best_run(
        tiny_bert, tmp_path, save_strategy="best", metric_for_best_model="eval_score", greater_is_better=False
    )
    assert trainer.state.best_metric == 0.1
    assert checkpoints(tmp_path) == ["checkpoint-1"]


def test_an_unknown_metric_stops_the_first_evaluation_and_names_the_known_ones(tiny_bert: Any, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"`metric_for_best_model` is `sore`.*`eval_loss`.*Did you mean"):
        best_run(tiny_bert, tmp_path, save_strategy="best", metric_for_best_model="sore")


# ---- Non-finite losses ----


class Poisoned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return {"loss": (self.weight * x).mean()}


def poisoned_rows(bad: int) -> Dataset:
    return Dataset.from_dict({"x": [float("nan") if i == bad else 1.0 for i in range(12)], "labels": [0] * 12})


@pytest.mark.parametrize("shuffled", [False, True])
def test_the_rows_of_a_poisoned_batch_are_named(shuffled: bool, tmp_path: Path) -> None:
    strategy = "random" if shuffled else "sequential"
    args = arguments(tmp_path, num_train_epochs=2, train_sampling_strategy=strategy, max_grad_norm=0.0)
    trainer = finetune.Trainer(model=Poisoned(), args=args, train_dataset=poisoned_rows(7))
    with pytest.raises(NonFiniteLossError) as error:
        trainer.train()
    order = list(iter(trainer._get_train_sampler()))
    number = order.index(7) // 2
    rows = order[2 * number : 2 * number + 2]
    assert f"micro-batch {number} of epoch 0 (rows {rows} of the training data)" in str(error.value)
    assert f"update {number // 2 + 1}" in str(error.value)


def test_policies_that_go_on_name_them_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    histories = {}
    for policy in ("log", "skip_step"):
        args = arguments(
            tmp_path, nonfinite_policy=policy, train_sampling_strategy="sequential", logging_steps=3, max_grad_norm=0.0
        )
        trainer = finetune.Trainer(model=Poisoned(), args=args, train_dataset=poisoned_rows(7))
        caplog.clear()
        trainer.train()
        assert "micro-batch 3 of epoch 0 (rows [6, 7] of the training data)" in caplog.text
        histories[policy] = trainer.state.log_history[0]
        assert torch.isnan(torch.tensor(histories[policy]["loss"])), "never replaced by something healthy"
        assert torch.isfinite(trainer.model.weight).item() == (policy == "skip_step")
    assert histories["skip_step"]["nonfinite_losses"] == 1
    assert histories["log"]["nonfinite_losses"] == 3, "the weights are NaN from then on"


def test_the_filter_of_transformers_is_accepted_and_replaces_nothing(tmp_path: Path) -> None:
    args = arguments(tmp_path, logging_nan_inf_filter=True)
    with pytest.raises(NonFiniteLossError):
        finetune.Trainer(model=Poisoned(), args=args, train_dataset=poisoned_rows(0)).train()


# ---- Logs, determinism, memory, trackers ----


@pytest.fixture
def _log_levels() -> Any:
    ours, theirs = logging.getLogger("finetune"), transformers.utils.logging.get_verbosity()
    before, handlers = ours.level, list(ours.handlers)
    yield
    ours.setLevel(before)
    ours.handlers = handlers
    transformers.utils.logging.set_verbosity(theirs)


@pytest.mark.usefixtures("_log_levels")
def test_log_levels_act(tiny_bert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finetune.Trainer(model=tiny_bert(), args=arguments(tmp_path, log_level="info"))
    assert logging.getLogger("finetune").level == logging.INFO
    assert transformers.utils.logging.get_verbosity() == logging.INFO
    replica = arguments(tmp_path, log_level="info", log_level_replica="error")
    monkeypatch.setattr(type(replica), "local_process_index", 1)
    finetune.Trainer(model=tiny_bert(), args=replica)
    assert logging.getLogger("finetune").level == logging.ERROR


def test_full_determinism(tiny_bert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC"):
        monkeypatch.setenv(name, "before")
    try:
        runs = []
        for _ in range(2):
            trainer = finetune.Trainer(
                model=tiny_bert(), args=arguments(tmp_path, full_determinism=True), train_dataset=classification_rows()
            )
            trainer.train()
            runs.append(weights(trainer))
        assert torch.are_deterministic_algorithms_enabled()
        assert_same_weights(runs[0], runs[1])
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False


def test_memory_metrics_have_the_names_of_transformers(tiny_bert: Any, tmp_path: Path) -> None:
    names = []
    for library in (transformers, finetune):
        data = classification_rows(8)
        trainer = library.Trainer(
            model=tiny_bert(), args=arguments(tmp_path, library, skip_memory_metrics=False), train_dataset=data,
            eval_dataset=data,
        )  # fmt: skip
        metrics = [trainer.train().metrics, trainer.evaluate(), trainer.predict(data).metrics]
        names.append([{name for name in part if "_mem_" in name} for part in metrics])
    assert names[1] == names[0]
    assert "train_mem_cpu_peaked_delta" in names[1][0]


def test_tensorboard_writes_what_was_logged(tiny_bert: Any, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    data = classification_rows(8)
    args = arguments(tmp_path, report_to="tensorboard", logging_dir=str(tmp_path / "board"), eval_strategy="epoch")
    trainer = finetune.Trainer(model=tiny_bert(), args=args, train_dataset=data, eval_dataset=data)
    trainer.train()
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert {"train/loss", "train/grad_norm", "train/learning_rate", "eval/loss"} <= set(events.Tags()["scalars"])
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(logged)
    assert "args/text_summary" in events.Tags()["tensors"]


# ---- No trace ----


class Bomb(finetune.TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            raise KeyError("bomb")


def hooks_of(model: nn.Module) -> dict[str, int]:
    return {
        name: len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        for name, module in model.named_modules()
    }


def flags_of(model: Any) -> dict[str, Any]:
    return {
        "use_cache": model.config.use_cache,
        "checkpointing": [getattr(m, "gradient_checkpointing", None) for m in model.modules()],
        "hooks": hooks_of(model),
        "methods": sorted(model.__dict__.keys() & {"forward", "loss_function"}),
    }


@pytest.mark.parametrize("ending", ["error", "success"])
def test_training_leaves_no_trace(ending: str, tiny_llama: Any, padded_dataset: Any, tmp_path: Path) -> None:
    """D6: transformers leaves the NEFTune hook, `is_in_train` and the checkpointing flags behind an exception."""
    model = tiny_llama()
    args = arguments(
        tmp_path, neftune_noise_alpha=5.0, gradient_checkpointing=True, max_steps=3, debug="underflow_overflow"
    )
    trainer = finetune.Trainer(
        model=model, args=args, train_dataset=padded_dataset(8), callbacks=[Bomb()] if ending == "error" else []
    )
    before = flags_of(model)
    assert before["use_cache"] is True
    if ending == "error":
        with pytest.raises(KeyError, match="bomb"):
            trainer.train()
    else:
        trainer.train()
    after = flags_of(model)
    after["methods"] = before["methods"]  # accelerate's wrapper of `forward`, kept for evaluation
    assert after == before
    assert trainer.is_in_train is False
    trainer.callback_handler.pop_callback(Bomb)
    assert trainer.train().global_step == 3, "and the trainer can be used again"


# ---- Search ----


def search(make_bert: Any, out: Path, **options: Any) -> tuple[Any, Any, list[Any]]:
    seen: list[Any] = []

    class Watch(finetune.TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append((args.learning_rate, args.per_device_train_batch_size, state.train_batch_size))
            assert state.is_hyper_param_search
            assert state.trial_params["learning_rate"] == args.learning_rate

    def model_init(trial: Any) -> Any:
        return calm(make_bert)

    data = classification_rows(8)
    trainer = finetune.Trainer(
        model_init=model_init,
        args=arguments(out, eval_strategy="epoch", save_strategy="epoch"),
        train_dataset=data,
        eval_dataset=data,
        callbacks=[Watch()],
    )
    before = trainer.args

    def space(trial: Any) -> dict[str, Any]:
        return {
            "learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True),
            "per_device_train_batch_size": trial.suggest_categorical("per_device_train_batch_size", [2, 4]),
        }

    import optuna

    best = trainer.hyperparameter_search(space, n_trials=3, sampler=optuna.samplers.RandomSampler(seed=1), **options)
    assert trainer.args is before
    assert (trainer.hp_search_backend, trainer._train_batch_size) == (None, 2)
    return trainer, best, seen


def test_hyperparameter_search(tiny_bert: Any, tmp_path: Path) -> None:
    _, best, seen = search(tiny_bert, tmp_path)
    assert len(seen) == 3 and len({rate for rate, _, _ in seen}) == 3
    assert all(size == trained for _, size, trained in seen)
    assert best.hyperparameters["learning_rate"] == seen[int(best.run_id)][0]
    assert isinstance(best.objective, float)
    assert sorted(path.name for path in tmp_path.glob("run-*")) == ["run-0", "run-1", "run-2"]
    assert (tmp_path / f"run-{best.run_id}").is_dir()


def test_searching_in_two_directions_and_by_name(tiny_bert: Any, tmp_path: Path) -> None:
    _, front, _ = search(
        tiny_bert, tmp_path, direction=["minimize", "maximize"], hp_name=lambda trial: f"try-{trial.number}",
        compute_objective=lambda metrics: [metrics["eval_loss"], metrics["eval_loss"]],
    )  # fmt: skip
    assert len(front) == 3, "whoever is worse in one direction is better in the other"
    assert sorted(path.name for path in tmp_path.glob("try-*")) == ["try-0", "try-1", "try-2"]


def test_a_pruned_trial_ends_early(tiny_bert: Any, tmp_path: Path) -> None:
    import optuna

    class Prune(optuna.pruners.BasePruner):
        def prune(self, study: Any, trial: Any) -> bool:
            return trial.number == 1

    study_ended: list[int] = []

    class Ends(finetune.TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            study_ended.append(state.global_step)

    trainer = finetune.Trainer(
        model_init=lambda: calm(tiny_bert), args=arguments(tmp_path, eval_strategy="epoch", num_train_epochs=2),
        train_dataset=classification_rows(8), eval_dataset=classification_rows(4), callbacks=[Ends()],
    )  # fmt: skip
    trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)}, n_trials=3, pruner=Prune()
    )
    assert study_ended == [4, 2, 4]
    assert trainer.is_in_train is False


@pytest.mark.parametrize(
    ("options", "message"), [({"backend": "ray"}, "only 'optuna'"), ({"n_jobs": 2}, "`n_jobs` must be 1")]
)
def test_what_a_search_cannot_do(options: Any, message: str, tiny_bert: Any, tmp_path: Path) -> None:
    trainer = finetune.Trainer(model_init=lambda: calm(tiny_bert), args=arguments(tmp_path))
    with pytest.raises(ArgumentError, match=message):
        trainer.hyperparameter_search(**options)
    with pytest.raises(ArgumentError, match="`model_init`"):
        finetune.Trainer(model=tiny_bert(), args=arguments(tmp_path)).hyperparameter_search()
