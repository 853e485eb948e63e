"""Evaluation and prediction: against transformers where it is right, against sums by hand where it is not."""

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from torch import nn

import finetune
from finetune.engine.sum_metrics import ClassificationMetrics, TokenMetrics
from finetune.errors import ArgumentError

COMMON: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "per_device_eval_batch_size": 4}
TIMED = ("runtime", "per_second", "preparation_time")


def make(library: Any, model: Any, out: Path, compute_metrics: Any = None, **options: Any) -> Any:
    given = {
        name: options.pop(name)
        for name in ("eval_dataset", "train_dataset", "preprocess_logits_for_metrics", "data_collator", "callbacks")
        if name in options
    }
    args = library.TrainingArguments(str(out), **{**COMMON, **options})
    return library.Trainer(model=model, args=args, compute_metrics=compute_metrics, **given)


def untimed(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.endswith(TIMED)}


def classification_rows(rows: int = 10, labels: bool = True) -> Dataset:
    ids = torch.randint(5, 128, (rows, 8), generator=torch.Generator().manual_seed(0)).tolist()
    data = {"input_ids": ids, "attention_mask": [[1] * 8] * rows}
    return Dataset.from_dict({**data, **({"labels": [i % 3 for i in range(rows)]} if labels else {})})


def accuracy(prediction: Any) -> dict[str, Any]:
    return {"accuracy": np.mean(prediction.predictions.argmax(-1) == prediction.label_ids)}


def padding_collator(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pads to the longest row of the batch, so that batches differ in width."""
    width = max(len(row["input_ids"]) for row in rows)

    def fill(name: str, value: int) -> torch.Tensor:
        return torch.tensor([list(row[name]) + [value] * (width - len(row[name])) for row in rows])

    return {
        "input_ids": fill("input_ids", 0),
        "attention_mask": fill("attention_mask", 0),
        "labels": fill("labels", -100),
    }


# ---- The loss of a language model ----


def loss_by_hand(model: Any, rows: list[dict[str, Any]]) -> float:
    """Returns the summed loss of all rows, one at a time, over the count of predicted tokens."""
    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for row in rows:
            batch = {name: torch.tensor([values]) for name, values in row.items()}
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])["logits"][0, :-1]
            labels = batch["labels"][0, 1:]
            total += nn.functional.cross_entropy(logits.double(), labels, reduction="sum").item()
            count += int(labels.ne(-100).sum())
    return total / count


def sharp(model: Any) -> Any:
    """Makes an untrained model sure of itself, so that tokens differ in their losses."""
    with torch.no_grad():
        model.lm_head.weight *= 30
    return model


@pytest.mark.parametrize("batch_size", [1, 3, 8, 50])
def test_the_loss_of_a_language_model_is_the_mean_over_tokens(
    batch_size: int, tiny_llama: Any, token_rows: Any, tmp_path: Path
) -> None:
    rows, model = token_rows(17), sharp(tiny_llama())
    trainer = make(
        finetune, model, tmp_path, data_collator=padding_collator, eval_dataset=Dataset.from_list(rows),
        per_device_eval_batch_size=batch_size,
    )  # fmt: skip
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss_by_hand(model, rows), rel=1e-5)


class Numbered(nn.Module):
    """Its loss is the mean of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return {"loss": (self.weight * x).mean()}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_not_left_out(bad: float, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """transformers leaves such rows out; see README.md in tests/contract."""
    values = [1.0] * 12
    rows = Dataset.from_dict({"x": values, "labels": [0] * 12})
    trainer = make(finetune, Numbered(), tmp_path, eval_dataset=rows)
    assert trainer.evaluate()["eval_loss"] == 1.0 and "NaN" not in caplog.text
    values[1] = values[9] = bad
    loss = trainer.evaluate(Dataset.from_dict({"x": values, "labels": [0] * 12}))["eval_loss"]
    assert not np.isfinite(loss)
    assert "The loss of 2 evaluation batches is NaN or infinite" in caplog.text


def test_no_cache_is_built(tiny_llama: Any, token_rows: Any, tmp_path: Path) -> None:
    """With a cache transformers no longer sees where the samples of a padding-free batch begin: they would leak."""
    from finetune.data.loading.collate import DataCollatorForLanguageModeling

    rows, model = token_rows(5), sharp(tiny_llama())
    flat = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    trainer = make(finetune, model, tmp_path, data_collator=flat)
    assert model.config.use_cache is True
    assert trainer.evaluate(Dataset.from_list(rows))["eval_loss"] == pytest.approx(loss_by_hand(model, rows), rel=1e-5)
    assert model.config.use_cache is True


def test_transformers_depends_on_the_batch_size(tiny_llama: Any, token_rows: Any, tmp_path: Path) -> None:
    """Why we differ. Delete this, and the line in README.md, when it fails."""
    data, options = Dataset.from_list(token_rows(17)), {"data_collator": padding_collator}
    losses = [
        make(transformers, sharp(tiny_llama()), tmp_path, per_device_eval_batch_size=size, **options).evaluate(data)
        for size in (1, 50)
    ]
    assert abs(losses[0]["eval_loss"] - losses[1]["eval_loss"]) > 0.01


def test_a_batch_without_targets_changes_nothing(tiny_llama: Any, token_rows: Any, tmp_path: Path) -> None:
    rows, model = token_rows(6), sharp(tiny_llama())
    silent = [{**row, "labels": [-100] * len(row["labels"])} for row in token_rows(2, seed=1)]
    trainer = make(finetune, model, tmp_path, data_collator=padding_collator, per_device_eval_batch_size=2)
    loss = trainer.evaluate(Dataset.from_list(rows[:2] + silent + rows[2:]))["eval_loss"]
    assert loss == pytest.approx(loss_by_hand(model, rows), rel=1e-5)


def test_label_smoothing_acts_in_evaluation_too(tiny_bert: Any, tmp_path: Path) -> None:
    metrics = [
        untimed(make(library, tiny_bert(), tmp_path, label_smoothing_factor=0.2).evaluate(classification_rows(8)))
        for library in (transformers, finetune)
    ]
    plain = make(finetune, tiny_bert(), tmp_path).evaluate(classification_rows(8))["eval_loss"]
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-5)
    assert metrics[1]["eval_loss"] != plain


# ---- Metrics and predictions, as transformers ----

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"eval_accumulation_steps": 1},
    "batches kept apart": {"eval_do_concat_batches": False},
    "loss only": {"prediction_loss_only": True},
    "argmax on the device": {"preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)},
    "objects gathered": {"eval_use_gather_object": True},
    "group by length": {"train_sampling_strategy": "group_by_length"},
}


@pytest.mark.parametrize("case", CASES)
def test_what_compute_metrics_sees(case: str, tiny_bert: Any, tmp_path: Path) -> None:
    seen: list[Any] = []

    def look(prediction: Any) -> dict[str, float]:
        seen.append((prediction.predictions, prediction.label_ids))
        return {"seen": 1.0}

    data = classification_rows(8)
    metrics = [
        untimed(make(library, tiny_bert(), tmp_path, look, eval_dataset=data, **CASES[case]).evaluate())
        for library in (transformers, finetune)
    ]
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-6)
    assert len(seen) in (0, 2)
    if seen:
        assert_same_structure(seen[1], seen[0])


def assert_same_structure(left: Any, right: Any) -> None:
    assert type(left) is type(right)
    if isinstance(left, np.ndarray):
        assert left.dtype == right.dtype
        np.testing.assert_allclose(left, right, rtol=1e-6)
        return
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert_same_structure(a, b)


@pytest.mark.parametrize("include", [[], ["inputs"], ["loss"], ["inputs", "loss"]])
def test_include_for_metrics(include: list[str], tiny_bert: Any, tmp_path: Path) -> None:
    seen: list[Any] = []

    def look(prediction: Any) -> dict[str, float]:
        seen.append(prediction)
        return {"fields": float(len(tuple(prediction)))}

    data = classification_rows(10)
    metrics = [
        make(library, tiny_bert(), tmp_path, look, include_for_metrics=include).evaluate(data)
        for library in (transformers, finetune)
    ]
    assert metrics[0]["eval_fields"] == metrics[1]["eval_fields"] == 2 + len(include)
    theirs, ours = seen
    if "inputs" in include:
        assert np.array_equal(ours.inputs, theirs.inputs)
        assert ours.inputs.tolist() == data["input_ids"][:]
    if "loss" in include:
        assert len(ours.losses) == 10
        np.testing.assert_allclose(ours.losses, theirs.losses, rtol=1e-6)


def test_metrics_batch_by_batch(tiny_bert: Any, tmp_path: Path) -> None:
    class Running:
        def __init__(self) -> None:
            self.hits, self.count, self.inputs, self.kept = 0, 0, [], []

        def __call__(self, prediction: Any, compute_result: bool) -> dict[str, float]:
            assert isinstance(prediction.predictions, torch.Tensor)
            self.kept.append(weakref.ref(prediction.predictions))
            self.hits += int((prediction.predictions.argmax(-1) == prediction.label_ids).sum())
            self.count += len(prediction.label_ids)
            self.inputs.append(sorted(prediction.inputs))
            return {"accuracy": self.hits / self.count} if compute_result else {}

    data, results = classification_rows(10), []
    for library in (transformers, finetune):
        running = Running()
        options = {"batch_eval_metrics": True, "include_for_metrics": ["inputs"]}
        trainer = make(library, tiny_bert(), tmp_path, running, eval_dataset=data, **options)
        results.append((untimed(trainer.evaluate())["eval_accuracy"], running.count, running.inputs))
        if library is finetune:
            gc.collect()
            assert [reference() for reference in running.kept] == [None] * 3, "nothing is kept"
    assert results[1] == results[0]
    with pytest.raises(ArgumentError, match="`compute_result`"):
        make(finetune, tiny_bert(), tmp_path, accuracy, batch_eval_metrics=True)


def test_a_dict_of_data_sets(tiny_bert: Any, tmp_path: Path) -> None:
    parts = {"news": classification_rows(6), "books": classification_rows(9)}
    results = []
    for library in (transformers, finetune):
        trainer = make(library, tiny_bert(), tmp_path, accuracy, eval_dataset=parts)
        results.append((untimed(trainer.evaluate()), untimed(trainer.evaluate({"one": parts["news"]}))))
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert ours.keys() == theirs.keys()
        assert ours["eval_one_accuracy" if "eval_one_accuracy" in ours else "eval_news_accuracy"] > 0
    assert {"eval_news_loss", "eval_news_accuracy", "eval_books_loss"} <= results[1][0].keys()
    assert results[1][0]["eval_news_loss"] == results[1][1]["eval_one_loss"]


@pytest.mark.parametrize("labels", [True, False])
def test_predict(labels: bool, tiny_bert: Any, tmp_path: Path) -> None:
    data = classification_rows(10, labels)
    theirs, ours = (
        make(library, tiny_bert(), tmp_path, accuracy).predict(data) for library in (transformers, finetune)
    )
    np.testing.assert_allclose(ours.predictions, theirs.predictions, rtol=1e-5)
    assert ours.predictions.shape == (10, 3)
    assert ours.metrics.keys() == theirs.metrics.keys()
    if labels:
        assert ours.label_ids.tolist() == theirs.label_ids.tolist() == data["labels"][:]
        assert ours.metrics["test_accuracy"] == pytest.approx(theirs.metrics["test_accuracy"])
    else:
        assert ours.label_ids is None and theirs.label_ids is None
        assert not {"test_loss", "test_accuracy"} & ours.metrics.keys()


def test_batches_of_different_width_are_padded(tiny_llama: Any, token_rows: Any, tmp_path: Path) -> None:
    data = Dataset.from_list(token_rows(7))
    theirs, ours = (
        make(library, tiny_llama(), tmp_path, data_collator=padding_collator, per_device_eval_batch_size=2).predict(
            data
        )
        for library in (transformers, finetune)
    )
    width = max(len(ids) for ids in data["input_ids"][:])
    assert ours.predictions.shape == theirs.predictions.shape == (7, width, 128)
    np.testing.assert_allclose(ours.predictions, theirs.predictions, rtol=1e-4, atol=1e-5)
    assert np.array_equal(ours.label_ids, theirs.label_ids)
    assert (ours.label_ids == -100).any()


class Nested(nn.Module):
    """Returns a dict with a tuple in it, tensors of several dtypes, and one entry that is None."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, Any]:
        logits = self.layer(x)
        loss = nn.functional.mse_loss(logits[:, 0], labels) if labels is not None else None
        outputs = {"logits": logits, "states": (x.bfloat16(), {"rows": torch.arange(len(x))}), "cache": x.sum()[None]}
        return outputs if loss is None else {"loss": loss, **outputs}


def test_nested_outputs_and_ignored_keys(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"x": [[float(i), 1.0, 2.0] for i in range(5)], "labels": [0.5] * 5})
    model = Nested()
    trainer = make(finetune, model, tmp_path, per_device_eval_batch_size=2)
    output = trainer.predict(rows, ignore_keys=["cache"])
    logits, (states, inner) = output.predictions
    assert logits.shape == (5, 2)
    assert states.dtype == np.float32 and states[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert inner["rows"].tolist() == [0, 1, 0, 1, 0]
    expected = make(transformers, model, tmp_path, per_device_eval_batch_size=2)
    assert untimed(output.metrics)["test_loss"] == pytest.approx(
        expected.predict(rows, ignore_keys=["cache", "states"]).metrics["test_loss"], rel=0.2
    )


def test_one_output_and_one_row_keep_their_dimensions(tmp_path: Path) -> None:
    """transformers takes the only row out of a model's plain tensor when a batch has one row."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    rows = Dataset.from_dict({"x": [[1.0, 2.0, 3.0]] * 3})
    trainer = make(finetune, Plain(), tmp_path, per_device_eval_batch_size=1)
    assert trainer.predict(rows).predictions.shape == (3, 2)


def test_a_model_that_is_replaced_is_the_one_evaluated(tiny_bert: Any, tmp_path: Path) -> None:
    data = classification_rows(8)
    trainer = make(finetune, tiny_bert(), tmp_path, eval_dataset=data, train_dataset=data, max_steps=2)
    trainer.train()
    other = tiny_bert(seed=5)
    trainer.model = other
    expected = make(finetune, tiny_bert(seed=5), tmp_path, eval_dataset=data).evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == expected


@pytest.mark.parametrize("dtype", ["bf16_full_eval", "bf16"])
def test_evaluation_in_bfloat16(dtype: str, tiny_bert: Any, tmp_path: Path) -> None:
    data = classification_rows(8)
    theirs, ours = (
        make(library, tiny_bert(), tmp_path, eval_dataset=data, **{dtype: True}) for library in (transformers, finetune)
    )
    assert ours.evaluate()["eval_loss"] == pytest.approx(theirs.evaluate()["eval_loss"], abs=2e-3)
    assert next(ours.model.parameters()).dtype == next(theirs.model.parameters()).dtype


# ---- When to evaluate ----


class Steps(finetune.TrainerCallback):
    def __init__(self) -> None:
        self.at: list[int] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.at.append(state.global_step)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"eval_strategy": "steps", "eval_steps": 2}, [2, 4, 5]),
        ({"eval_strategy": "steps", "eval_steps": 2, "eval_delay": 3}, [4, 5]),
        ({"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}, [0, 2, 4, 5]),
        ({"eval_strategy": "steps", "eval_steps": 0.4}, [2, 4, 5]),
        ({"eval_strategy": "epoch"}, [2, 4, 5]),
        ({"eval_strategy": "epoch", "eval_delay": 2}, [4, 5]),
    ],
)
def test_when_to_evaluate(options: Any, steps: list[int], tiny_bert: Any, tmp_path: Path) -> None:
    data, at = classification_rows(4), []
    for library in (transformers, finetune):
        watch = Steps()
        make(
            library, tiny_bert(), tmp_path, train_dataset=data, eval_dataset=data, per_device_train_batch_size=2,
            max_steps=5, save_strategy="no", callbacks=[watch], **options,
        ).train()  # fmt: skip
        at.append(watch.at)
    assert at[1] == at[0] == steps


# ---- Metrics as sums ----


def test_classification_metrics_as_sums_equal_scikit_learn(tiny_bert: Any, tmp_path: Path) -> None:
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support

    data = classification_rows(23)
    streamed = make(finetune, tiny_bert(), tmp_path, ClassificationMetrics(3), per_device_eval_batch_size=5)
    metrics = streamed.evaluate(data)
    predictions = make(finetune, tiny_bert(), tmp_path).predict(data).predictions.argmax(-1)
    precision, recall, f1, _ = precision_recall_fscore_support(
        data["labels"][:],
        predictions,
        average="macro",
        labels=[0, 1, 2],
        zero_division=0,  # pyright: ignore[reportArgumentType]
    )
    assert metrics["eval_accuracy"] == pytest.approx(accuracy_score(data["labels"][:], predictions))
    assert (metrics["eval_precision"], metrics["eval_recall"], metrics["eval_f1"]) == pytest.approx(
        (precision, recall, f1)
    )


@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_token_metrics_as_sums(batch_size: int, tiny_llama: Any, token_rows: Any, tmp_path: Path) -> None:
    rows, model = token_rows(11), tiny_llama()
    trainer = make(
        finetune, model, tmp_path, TokenMetrics(), data_collator=padding_collator, per_device_eval_batch_size=batch_size
    )
    metrics = trainer.evaluate(Dataset.from_list(rows))
    hits = count = 0
    for row in rows:
        with torch.no_grad():
            guesses = model(input_ids=torch.tensor([row["input_ids"]]))["logits"][0, :-1].argmax(-1)
        labels = torch.tensor(row["labels"][1:])
        hits, count = hits + int((guesses == labels).sum()), count + int(labels.ne(-100).sum())
    assert metrics["eval_token_accuracy"] == pytest.approx(hits / count)
    assert metrics["eval_perplexity"] == pytest.approx(np.exp(metrics["eval_loss"]), rel=1e-5)


def test_predict_keeps_predictions_beside_sums(tiny_bert: Any, tmp_path: Path) -> None:
    output = make(finetune, tiny_bert(), tmp_path, ClassificationMetrics(3)).predict(classification_rows(6))
    assert output.predictions.shape == (6, 3)
    assert output.metrics["test_accuracy"] == np.mean(output.predictions.argmax(-1) == output.label_ids)


def test_sums_must_be_tensors(tiny_bert: Any, tmp_path: Path) -> None:
    class Wrong(ClassificationMetrics):
        def batch_sums(self, logits: Any, labels: Any) -> Any:
            return {"count": len(labels)}

    with pytest.raises(ArgumentError, match="`count` is a int"):
        make(finetune, tiny_bert(), tmp_path, Wrong(3)).evaluate(classification_rows(4))


# ---- Memory ----


@pytest.mark.parametrize("way", ["loss", "sums", "batches"])
def test_memory_is_flat_in_the_size_of_the_data(way: str, tiny_llama: Any, token_rows: Any, tmp_path: Path) -> None:
    """However many batches: never more logits alive than those of the batch being computed and the one before."""
    alive: list[int] = []
    living: list[Any] = []

    class Watching(finetune.Trainer):
        def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
            loss, logits, labels = super().prediction_step(*args, **kwargs)
            if logits is not None:
                living.append(weakref.ref(logits))
            alive.append(sum(reference() is not None for reference in living))
            return loss, logits, labels

    metrics: Any = {"loss": None, "sums": TokenMetrics(), "batches": lambda p, compute_result: {"a": 1.0}}[way]
    args = finetune.TrainingArguments(
        str(tmp_path), **{**COMMON, "per_device_eval_batch_size": 1, "batch_eval_metrics": way == "batches"}
    )
    trainer = Watching(model=tiny_llama(), args=args, compute_metrics=metrics, data_collator=padding_collator)
    trainer.evaluate(Dataset.from_list(token_rows(12)))
    assert len(alive) == 12
    assert max(alive) == (0 if way == "loss" else 1)
