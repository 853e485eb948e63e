"""`SequenceClassificationTrainer` from rows to a model that others load."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset
from torch.nn import functional

import finetune
from finetune.errors import ArgumentError, DataFormatError

GOOD = ["the sun", "birds sang to the sun", "red sun over hills", "play every day"]
BAD = ["old stone walls", "a stone", "stone on stone walls", "walls of old paper"]
TEXTS, NAMES = GOOD + BAD, ["good"] * 4 + ["bad"] * 4


def rows(labels: list[Any], repeat: int = 2, **columns: list[Any]) -> Dataset:
    columns = columns or {"text": TEXTS}
    return Dataset.from_dict({name: values * repeat for name, values in {**columns, "label": labels}.items()})


def config(out: Path, **overrides: Any) -> finetune.SequenceClassificationConfig:
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return finetune.SequenceClassificationConfig(str(out), **{**defaults, **overrides})


def make_bert(folder: Path, tokenizer: Any, num_labels: int = 2, **overrides: Any) -> str:
    """Saves a tiny BERT with its tokenizer and returns the folder."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    settings = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertForSequenceClassification(
        BertConfig(vocab_size=512, num_labels=num_labels, max_position_embeddings=64, **{**settings, **overrides})
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_llama(folder: Path, tokenizer: Any) -> str:
    """Saves a tiny causal language model with its tokenizer and returns the folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def bert(tmp_path: Path, chat_tokenizer: Any) -> str:
    return make_bert(tmp_path / "bert", chat_tokenizer)


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_one_line_trains_and_the_saved_model_knows_the_names(bert: str, tmp_path: Path, monkeypatch: Any) -> None:
    from transformers import pipeline

    monkeypatch.chdir(tmp_path)
    finetune.SequenceClassificationTrainer(model=bert, train_dataset=rows(NAMES)).train()
    args = config(tmp_path / "out", max_steps=20, dataloader_drop_last=True)
    trainer = finetune.SequenceClassificationTrainer(model=bert, args=args, train_dataset=rows(NAMES))
    trainer.train()
    trainer.save_model()
    assert losses(trainer)[-1] < 0.1 < losses(trainer)[0]
    classify: Any = pipeline("text-classification", model=str(tmp_path / "out"))
    assert [each["label"] for each in classify(TEXTS)] == NAMES
    metrics = trainer.evaluate(rows(NAMES))
    assert metrics["eval_accuracy"] == metrics["eval_f1_macro"] == metrics["eval_matthews_correlation"] == 1.0
    trainer.create_model_card()
    assert "text-classification" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("labels", "kind", "outputs", "metric"),
    [
        ([0, 1, 2, 3] * 2, "single_label_classification", 4, "f1_weighted"),
        ([float(i) / 7 for i in range(8)], "regression", 1, "spearman"),
        ([["a"], ["b"], ["a", "c"], []] * 2, "multi_label_classification", 3, "f1_micro"),
        ([[1, 0], [1, 1]] * 4, "multi_label_classification", 2, "f1_micro"),
        ([[0.5, 2.0]] * 8, "regression", 2, "mse"),
    ],
)
def test_the_head_and_the_metrics_follow_from_the_labels(
    bert: str, tmp_path: Path, labels: list[Any], kind: str, outputs: int, metric: str
) -> None:
    trainer = finetune.SequenceClassificationTrainer(
        model=bert, args=config(tmp_path / "out"), train_dataset=rows(labels), eval_dataset=rows(labels, repeat=1)
    )
    trainer.train()
    assert (trainer.model.config.problem_type, trainer.model.config.num_labels) == (kind, outputs)
    metrics = trainer.evaluate()
    assert math.isfinite(metrics[f"eval_{metric}"]) and math.isfinite(metrics["eval_loss"])
    assert trainer.predict(rows(labels, repeat=1)).predictions.shape == (8, outputs)


def test_the_loss_is_the_models_own_and_the_same_for_every_accumulation(bert: str, tmp_path: Path) -> None:
    def run(**overrides: Any) -> Any:
        args = config(tmp_path / "out", max_steps=-1, num_train_epochs=2, **overrides)
        data = rows(NAMES).select(range(14))  # the last step of an epoch is a short one
        init = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        args.model_init_kwargs = init
        trainer = finetune.SequenceClassificationTrainer(model=bert, args=args, train_dataset=data)
        trainer.train()
        return trainer

    whole = run(per_device_train_batch_size=8)
    parts = run(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-6)
    batch = next(iter(whole.get_eval_dataloader(rows(NAMES, repeat=1))))
    whole.model.eval()
    with torch.no_grad():
        ours, theirs = whole.compute_loss(whole.model, batch), whole.model(**batch).loss
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)


def test_class_weights_weigh_rows(bert: str, tmp_path: Path) -> None:
    data = rows(["good"] * 6 + ["bad"] * 2)
    trainer = finetune.SequenceClassificationTrainer(
        model=bert, args=config(tmp_path, class_weights="balanced"), train_dataset=data
    )
    batch = trainer.data_collator(
        [{k: row[k] for k in ("input_ids", "attention_mask", "labels")} for row in trainer.train_dataset]
    )
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    each = functional.cross_entropy(logits, batch["labels"], reduction="none")
    bad = batch["labels"] == 0
    assert loss.item() == pytest.approx((each[bad].mean() / 2 + each[~bad].mean() / 2).item(), abs=1e-6)


def test_predictions_stay_in_the_order_of_the_rows(bert: str, tmp_path: Path) -> None:
    args = config(tmp_path, per_device_eval_batch_size=2)
    trainer = finetune.SequenceClassificationTrainer(model=bert, args=args, train_dataset=rows(NAMES))
    texts = ["the " * n + "sun" for n in (1, 9, 2, 8, 3)]
    predicted = trainer.predict(Dataset.from_dict({"text": texts})).predictions
    assert trainer.predict([{"text": text} for text in texts]).label_ids is None
    for text, row in zip(texts, predicted, strict=True):
        with torch.no_grad():
            alone = trainer.model(**trainer.processing_class(text, return_tensors="pt")).logits[0]
        assert torch.allclose(torch.tensor(row), alone, atol=1e-5)


@pytest.mark.parametrize(
    ("column", "labels"),
    [("label", [3, 1]), ("labels", ["good", "bad"]), ("label", [["b", "a"], ["a"]]), ("labels", [0.5, 2.0])],
)
def test_tokens_given_later_are_prepared_as_those_given_first(
    column: str, labels: list[Any], bert: str, tmp_path: Path, chat_tokenizer: Any
) -> None:
    data = Dataset.from_dict({"input_ids": [[5, 6, 7], [9, 8], [5, 6], [9, 8, 8]], column: labels * 2})
    part = data.select([0, 2])
    trainer = finetune.SequenceClassificationTrainer(
        bert, config(tmp_path, max_steps=1), train_dataset=data, eval_dataset=part, processing_class=chat_tokenizer
    )
    expected = measured(trainer.evaluate())
    own = trainer.eval_dataset
    lists = part.to_list()
    for later in (
        part,
        lists,
        part.to_iterable_dataset(),
        own,
        own.select(range(2)),
        trainer.train_dataset.select([0, 2]),
    ):
        assert measured(trainer.evaluate(later)) == expected
        assert measured(trainer.predict(later).metrics) == expected


def measured(metrics: dict[str, Any]) -> dict[str, Any]:
    """Returns the measures alone, without their prefix."""
    found = {key.split("_", 1)[1]: value for key, value in metrics.items() if "_" in key}
    return {key: value for key, value in found.items() if not key.endswith(("runtime", "second", "time"))}


def test_tokens_with_ids_of_classes_stay_as_they_are(bert: str, tmp_path: Path) -> None:
    trainer = finetune.SequenceClassificationTrainer(bert, config(tmp_path), train_dataset=rows(NAMES))
    expected = measured(trainer.evaluate(rows(NAMES)))
    ids = trainer.processing_class(TEXTS)["input_ids"]
    given = Dataset.from_dict({"input_ids": ids * 2, "labels": [int(name == "good") for name in NAMES] * 2})
    assert measured(trainer.evaluate(given)) == expected
    named = Dataset.from_dict({"input_ids": ids * 2, "label": NAMES * 2})
    assert measured(trainer.evaluate(named)) == expected, "training rows had text"


def test_rows_are_grouped_by_length_and_padded_to_their_batch(bert: str, tmp_path: Path) -> None:
    data = Dataset.from_dict({"text": ["the " * (1 + i % 20) for i in range(640)], "label": ["a", "b"] * 320})
    trainer = finetune.SequenceClassificationTrainer(model=bert, args=config(tmp_path), train_dataset=data)
    masks = [batch["attention_mask"] for batch in trainer.get_train_dataloader()]
    padding = sum(int((mask == 0).sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    assert padding < 0.15
    assert len({mask.shape[1] for mask in masks}) > 5


def test_a_head_for_other_classes_is_replaced_when_the_model_is_named(tmp_path: Path, chat_tokenizer: Any) -> None:
    folder = make_bert(tmp_path / "five", chat_tokenizer, num_labels=5)
    trainer = finetune.SequenceClassificationTrainer(folder, config(tmp_path / "out"), train_dataset=rows(NAMES))
    assert trainer.model.config.num_labels == 2
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with pytest.raises(ArgumentError, match=r"5 outputs and the data needs 2.*num_labels=2"):
        finetune.SequenceClassificationTrainer(
            model, config(tmp_path / "out"), train_dataset=rows(NAMES), processing_class=chat_tokenizer
        )


def test_a_pair_of_texts_reaches_the_model_as_one_row(bert: str, tmp_path: Path) -> None:
    data = rows(NAMES, premise=TEXTS, hypothesis=TEXTS[::-1])
    trainer = finetune.SequenceClassificationTrainer(bert, config(tmp_path), train_dataset=data)
    assert trainer.train_dataset[0]["input_ids"] == trainer.processing_class(TEXTS[0], TEXTS[-1])["input_ids"]


def with_end_token(tokenizer: Any) -> Any:
    """Makes a tokenizer end every row with its end token."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {tokenizer.eos_token}", special_tokens=[(tokenizer.eos_token, tokenizer.eos_token_id)]
    )
    return tokenizer


@pytest.mark.parametrize("pad", ["<pad>", None, "<|im_end|>"])
@pytest.mark.parametrize("ends", [True, False])
def test_a_decoder_reads_the_last_token_of_each_row(
    tmp_path: Path, chat_tokenizer: Any, pad: str | None, ends: bool
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    chat_tokenizer.pad_token = pad
    tokenizer = with_end_token(chat_tokenizer) if ends else chat_tokenizer
    folder = make_llama(tmp_path / "llama", tokenizer)
    trainer = finetune.SequenceClassificationTrainer(folder, config(tmp_path / "out"), train_dataset=rows(NAMES))
    trainer.train()
    trainer.save_model()
    assert trainer.model.config.pad_token_id == trainer.processing_class.pad_token_id
    predicted = torch.tensor(trainer.predict(Dataset.from_dict({"text": TEXTS})).predictions)

    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    padded = AutoTokenizer.from_pretrained(tmp_path / "out")(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        elsewhere = saved(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits
        for row, text in enumerate(TEXTS):
            ids = torch.tensor([trainer.processing_class(text)["input_ids"]])
            last = saved.score(saved.model(input_ids=ids).last_hidden_state)[0, -1]
            assert torch.allclose(predicted[row], last, atol=1e-5)
    assert torch.allclose(predicted, elsewhere, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_lora_trains_and_saves_the_head(tmp_path: Path, chat_tokenizer: Any, kind: str) -> None:
    from peft import LoraConfig, PeftModel
    from transformers import AutoConfig, AutoModelForSequenceClassification

    make = make_bert if kind == "bert" else make_llama
    folder, head = make(tmp_path / "base", chat_tokenizer), "classifier" if kind == "bert" else "score"
    data = rows(["x", "y", "z", "x"] * 2)
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = finetune.SequenceClassificationTrainer(
        folder, config(tmp_path / "out"), train_dataset=data, peft_config=lora
    )
    assert lora.task_type == "CAUSAL_LM" and lora.modules_to_save is None
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters() if head in name}
    trainer.train()
    changed = [
        name
        for name, value in trainer.model.named_parameters()
        if name in before and not torch.equal(before[name], value)
    ]
    assert changed and all("modules_to_save" in name for name in changed)
    trainer.save_model()
    predicted = torch.tensor(trainer.predict(Dataset.from_dict({"text": TEXTS})).predictions)

    labels = AutoConfig.from_pretrained(tmp_path / "out" / "classifier_config.json")
    assert labels.id2label == {0: "x", 1: "y", 2: "z"}
    options: Any = {"ignore_mismatched_sizes": True}
    base = AutoModelForSequenceClassification.from_pretrained(folder, config=labels, **options)
    padded = chat_tokenizer(TEXTS, padding=True, return_tensors="pt")
    for loaded in (
        PeftModel.from_pretrained(base, tmp_path / "out"),
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", config=labels, **options),
    ):
        with torch.no_grad():
            elsewhere = loaded.eval()(**{name: padded[name] for name in ("input_ids", "attention_mask")}).logits
        assert torch.allclose(predicted, elsewhere, atol=1e-5)


def test_resuming_gives_the_same_losses(bert: str, tmp_path: Path) -> None:
    def make(steps: int) -> Any:
        args = config(
            tmp_path / "out", max_steps=steps, save_strategy="steps", save_steps=2, lr_scheduler_type="constant"
        )
        return finetune.SequenceClassificationTrainer(bert, args, train_dataset=rows(NAMES))

    whole = make(4)
    whole.train()
    rest = make(4)
    rest.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert losses(rest) == losses(whole)


def test_a_stream_with_named_classes_trains(bert: str, tmp_path: Path) -> None:
    data = rows(NAMES).cast_column("label", ClassLabel(names=["bad", "good"])).to_iterable_dataset()
    args = config(tmp_path, train_sampling_strategy="random")
    trainer = finetune.SequenceClassificationTrainer(bert, args, train_dataset=data)
    trainer.train()
    assert trainer.state.global_step == 3


def test_mistakes_in_later_data_and_arguments_are_errors(bert: str, tmp_path: Path) -> None:
    with pytest.raises(DataFormatError, match=r"'ugly'.*bad, good"):
        finetune.SequenceClassificationTrainer(
            bert, config(tmp_path), train_dataset=rows(NAMES), eval_dataset=rows(["ugly"] * 8)
        )
    with pytest.raises(ArgumentError, match="train_dataset"):
        finetune.SequenceClassificationTrainer(bert, config(tmp_path))
    with pytest.raises(DataFormatError, match="empty"):
        finetune.SequenceClassificationTrainer(bert, config(tmp_path), train_dataset=Dataset.from_dict({"text": []}))
    with pytest.raises(ArgumentError, match="balanced"):
        config(tmp_path, class_weights="balancd")
    assert config(tmp_path, class_weights=["1", "2.5"]).class_weights == [1.0, 2.5]


@pytest.mark.parametrize("kind", ["single_label_classification", "multi_label_classification", "regression"])
def test_rows_that_only_keep_processes_in_step_count_nothing(kind: str) -> None:
    from finetune.sequence_classification.labels import Task
    from finetune.sequence_classification.trainer import loss_sum

    single = kind == "single_label_classification"
    logits = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([1, 0, 1]) if single else torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    task = Task(kind, ("a", "b"))
    masked = labels.clone()
    masked[2] = -100
    expected = loss_sum(logits[:2], labels[:2], task, None, 0.0)
    assert loss_sum(logits, masked, task, None, 0.0).item() == pytest.approx(expected.item())
    nothing = loss_sum(logits, torch.full_like(labels, -100), task, None, 0.0)
    nothing.backward()
    assert nothing.item() == 0 and logits.grad is not None and not logits.grad.any()


def test_compiled_layers_see_few_lengths(bert: str, tmp_path: Path) -> None:
    data = Dataset.from_dict({"text": ["the " * (1 + i % 40) for i in range(64)], "label": ["a", "b"] * 32})
    found = {}
    for name, options in {"compiled": {}, "asked": {"pad_to_multiple_of": 8}}.items():
        args = config(tmp_path, torch_compile_backend="eager", max_length=50, **options)
        trainer = finetune.SequenceClassificationTrainer(model=bert, args=args, train_dataset=data)
        found[name] = {batch["input_ids"].shape[1] for batch in trainer.get_train_dataloader()}
        if name == "compiled":
            trainer.train()
            assert trainer.state.log_history[-2]["compiled_graphs"] <= 2.0
    # 64 is both the bucket and the most positions that this model has.
    assert found["compiled"] == {64} and len(found["asked"]) > 2


@pytest.mark.parametrize("labels", [[float(i) for i in range(8)], [["a"], ["b"], ["a", "b"], []] * 2])
def test_smoothing_is_for_one_class_per_row(bert: str, tmp_path: Path, labels: list[Any]) -> None:
    args = config(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ArgumentError, match=r"`label_smoothing_factor` is 0\.1.*one class per row"):
        finetune.SequenceClassificationTrainer(bert, args, train_dataset=rows(labels))
    finetune.SequenceClassificationTrainer(bert, args, train_dataset=rows(NAMES)).train()


def test_the_configuration_is_read_once_and_of_the_revision(
    bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.sequence_classification import build

    seen: list[dict[str, Any]] = []
    read = build.load_config
    monkeypatch.setattr(build, "load_config", lambda name, **options: seen.append(options) or read(name, **options))
    args = config(tmp_path, model_init_kwargs={"revision": "v2", "dtype": "float32"})
    finetune.SequenceClassificationTrainer(bert, args, train_dataset=rows(NAMES))
    assert seen == [{"trust_remote_code": False, "revision": "v2"}]


def test_the_folder_of_an_adapter_says_how_to_go_on(bert: str, tmp_path: Path) -> None:
    from peft import LoraConfig

    trainer = finetune.SequenceClassificationTrainer(
        bert, config(tmp_path / "out"), train_dataset=rows(NAMES), peft_config=LoraConfig(r=2)
    )
    trainer.save_model()
    with pytest.raises(finetune.ModelLoadError, match=r"holds an adapter.*is_trainable=True.*merge_and_unload"):
        finetune.SequenceClassificationTrainer(tmp_path / "out", config(tmp_path / "no"), train_dataset=rows(NAMES))


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ({"model": None}, {}, "`model` is required"),
        ({"callbacks": finetune.EarlyStoppingCallback()}, {}, "`callbacks` must be a list"),
        ({"peft_config": "lora"}, {}, "`peft_config` is a str"),
        ({}, {"report_to": "wandbb"}, "Did you mean `wandb`"),
        ({}, {"optim_args": "wrong=1"}, "`optim_args` has `wrong`"),
        ({}, {"eval_strategy": "epoch"}, "there is no `eval_dataset`"),
    ],
)
def test_mistakes_are_found_before_the_model_is_read(
    given: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    usual = {"model": "there-is-no-such-model", "args": config(tmp_path, **options), "train_dataset": rows(NAMES)}
    with pytest.raises(ArgumentError, match=message):
        finetune.SequenceClassificationTrainer(**{**usual, **given})
