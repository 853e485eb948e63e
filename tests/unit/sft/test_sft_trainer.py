"""`SFTTrainer` from rows to a trained model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

import finetune
from finetune.distributed import ranks
from finetune.engine.run import TrainingRun
from finetune.errors import ArgumentError
from finetune.kernels.attention import use_packed_attention
from finetune.sft import build

TEXTS = ["the cat sat on a mat", "the red sun went down over hills", "birds sang to rivers that ran past"]
ROWS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": text} for text in TEXTS * 4],
    "prompt-completion": [{"prompt": text[:8], "completion": text[8:]} for text in TEXTS * 4],
    "messages": [
        {"messages": [{"role": "user", "content": text[:8]}, {"role": "assistant", "content": text[8:]}]}
        for text in TEXTS * 4
    ],
}


def config(out: Path, **overrides: Any) -> finetune.SFTConfig:
    defaults = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "max_length": 64,
    }
    return finetune.SFTConfig(str(out), **{**defaults, **overrides})


@pytest.mark.parametrize("kind", ROWS)
def test_each_kind_of_rows_trains(kind: str, tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    trainer = finetune.SFTTrainer(
        model=tiny_llama(vocab_size=512),
        args=config(tmp_path),
        train_dataset=Dataset.from_list(ROWS[kind]),
        processing_class=chat_tokenizer,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    assert {"mean_token_accuracy", "entropy", "num_tokens"} <= trainer.state.log_history[0].keys()
    batch = next(iter(trainer.get_train_dataloader()))
    eos = chat_tokenizer.eos_token_id
    assert all(eos in row.tolist() for row in batch["labels"]), "the stop token must be supervised in every row"


def test_one_line_from_a_folder(tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    tiny_llama(vocab_size=512).save_pretrained(tmp_path / "model")
    chat_tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    trainer = finetune.SFTTrainer(model=str(tmp_path / "model"), train_dataset=Dataset.from_list(ROWS["text"]))
    trainer.train()
    assert trainer.args.output_dir == "model-SFT"
    trainer.save_model()
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained("model-SFT").state_dict()
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


def test_the_head_is_given_back(tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_llama(vocab_size=512)
    before = {name: value for name, value in vars(model).items() if name in ("forward", "_loss_function")}
    inputs = {"input_ids": torch.arange(8)[None]}
    rows = Dataset.from_list(ROWS["text"])
    trainer = finetune.SFTTrainer(model, config(tmp_path, max_steps=1), None, rows, rows, chat_tokenizer)
    trainer.train()
    trainer.evaluate()
    assert {name: value for name, value in vars(model).items() if name in ("forward", "_loss_function")} == before
    assert model(**inputs).logits.shape == (1, 8, 512)


@pytest.mark.parametrize("options", [{"packing": True}, {"packing": True, "packing_strategy": "wrapped"}])
def test_packing_trains(options: dict[str, Any], tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    trainer = finetune.SFTTrainer(
        tiny_llama(vocab_size=512),
        config(tmp_path, max_length=48, **options),
        train_dataset=Dataset.from_list(ROWS["text"]),
        processing_class=chat_tokenizer,
    )
    assert trainer.audits["train"].packing_efficiency is not None
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_no_supervised_token_is_an_error_before_training(tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(finetune.DataFormatError, match="max_length"):
        finetune.SFTTrainer(
            tiny_llama(vocab_size=512),
            config(tmp_path, max_length=4),
            train_dataset=Dataset.from_list(ROWS["prompt-completion"]),
            processing_class=chat_tokenizer,
        )


def test_broken_rules_come_together(tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(finetune.ArgumentError, match=r"(?s)assistant_only_loss.*completion_only_loss"):
        finetune.SFTTrainer(
            tiny_llama(vocab_size=512),
            config(tmp_path, assistant_only_loss=True, completion_only_loss=True),
            train_dataset=Dataset.from_list(ROWS["text"]),
            processing_class=chat_tokenizer,
        )


def test_tokens_are_counted_across_a_resume(tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    def build(out: Path) -> finetune.SFTTrainer:
        return finetune.SFTTrainer(
            tiny_llama(vocab_size=512),
            config(out, save_strategy="steps", save_steps=2, num_train_epochs=2),
            train_dataset=Dataset.from_list(ROWS["text"]),
            processing_class=chat_tokenizer,
        )

    whole = build(tmp_path / "a")
    whole.train()
    again = build(tmp_path / "b")
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    tokens = [entry["num_tokens"] for entry in whole.state.log_history if "num_tokens" in entry]
    assert tokens == sorted(tokens)
    assert [entry["num_tokens"] for entry in again.state.log_history if "num_tokens" in entry] == tokens


@pytest.mark.parametrize("options", [{}, {"packing": True}])
def test_evaluate_takes_raw_rows(options: dict[str, Any], tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    rows = Dataset.from_list(ROWS["prompt-completion"])
    trainer = finetune.SFTTrainer(tiny_llama(512), config(tmp_path, **options), None, rows, rows, chat_tokenizer)
    expected = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert trainer.evaluate(ROWS["prompt-completion"])["eval_loss"] == pytest.approx(expected, rel=1e-6)
    both = trainer.evaluate({"a": rows, "b": rows})
    assert both["eval_a_loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"packing": True}, {"padding_free": True}])
def test_predict_takes_raw_rows_and_gives_each_its_own(
    options: dict[str, Any], tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path
) -> None:
    rows = Dataset.from_list(ROWS["prompt-completion"])
    model = tiny_llama(512)
    trainer = finetune.SFTTrainer(model, config(tmp_path, **options), None, rows, rows, chat_tokenizer)
    output = trainer.predict(rows)
    assert output.predictions.shape[0] == output.label_ids.shape[0] == len(rows)
    text = ROWS["prompt-completion"][1]
    ids = chat_tokenizer(text["prompt"] + text["completion"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
    alone = model(torch.tensor([ids])).logits[0].detach()
    torch.testing.assert_close(torch.tensor(output.predictions[1, : len(ids)]), alone, rtol=1e-4, atol=1e-5)
    assert trainer.data_collator.padding_free


def test_rows_are_checked_before_weights_are_read(
    tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    tiny_llama(512).config.save_pretrained(tmp_path / "model")
    chat_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    with pytest.raises(finetune.DataFormatError, match="Row 1"):
        finetune.SFTTrainer(
            str(tmp_path / "model"), config(tmp_path / "out"), train_dataset=Dataset.from_dict({"text": ["a", None]})
        )


def test_logits_that_the_fused_loss_cannot_follow_train_through_the_plain_one(
    tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path
) -> None:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    model = tiny_llama(vocab_size=512)

    class Clamped(type(model)):
        def forward(
            self, input_ids: Any = None, labels: Any = None, num_items_in_batch: Any = None, **kwargs: Any
        ) -> Any:
            logits = self.lm_head(self.model(input_ids, **kwargs).last_hidden_state).clamp(-5, 5)
            size = self.config.vocab_size
            loss = self.loss_function(logits, labels, size, num_items_in_batch=num_items_in_batch)
            return CausalLMOutputWithPast(loss=loss, logits=logits)

    model.__class__ = Clamped
    rows = Dataset.from_list(ROWS["text"])
    trainer = finetune.SFTTrainer(model, config(tmp_path), None, rows, None, chat_tokenizer)
    trainer.train()
    assert trainer.describe_loss().startswith("from all logits: its forward applies `clamp` to its logits")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]


def test_the_probe_of_padding_waits_for_the_model_to_be_on_its_device(
    tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    monkeypatch.setattr(finetune.SFTTrainer, "_move_model_to_device", lambda *_: events.append("moved"))
    for answer in (True, False):
        events.clear()
        monkeypatch.setattr(
            "finetune.sft.trainer.can_be_padding_free", lambda _, a=answer: events.append("probed") or a
        )
        rows = Dataset.from_list(ROWS["text"])
        trainer = finetune.SFTTrainer(tiny_llama(vocab_size=512), config(tmp_path), None, rows, None, chat_tokenizer)
        assert events == ["moved", "probed"]
        assert trainer.padding_free is trainer.data_collator.padding_free is answer


def test_the_first_process_proves_for_all_that_samples_are_kept_apart(
    tiny_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under FSDP with weights in the first process only, the others have nothing to run."""
    model = tiny_llama()
    assert build.can_be_padding_free(model)
    with use_packed_attention(model):
        build.prove_isolation(model)
    model.to("meta")
    build.prove_isolation(model)  # what the others do: they wait for the answer, which there is none of here
    assert not build.can_be_padding_free(model)
    monkeypatch.setattr(ranks, "broadcast_object", lambda mine: "samples see each other")
    with pytest.raises(ArgumentError, match="samples see each other"):
        build.prove_isolation(model)
    monkeypatch.setattr(ranks, "broadcast_object", lambda mine: True)
    assert build.can_be_padding_free(model)


def token_metrics(metrics: dict[str, float], prefix: str = "eval") -> list[float]:
    return [metrics[f"{prefix}_{name}"] for name in ("mean_token_accuracy", "entropy")]


def test_token_metrics_are_those_of_their_own_pass(tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    rows = Dataset.from_list(ROWS["prompt-completion"])
    parts = {"a": rows.select([0]), "b": rows.select([1])}
    model, args = tiny_llama(512), config(tmp_path, max_steps=1, eval_strategy="steps", eval_steps=1)
    trainer = finetune.SFTTrainer(model, args, None, rows, parts, chat_tokenizer)
    trainer.train()
    first, second = token_metrics(trainer.evaluate(parts["a"])), token_metrics(trainer.evaluate(parts["b"]))
    assert first != second
    both = trainer.evaluate()
    assert (token_metrics(both, "eval_a"), token_metrics(both, "eval_b")) == (first, second)
    assert "eval_entropy" not in both
    logged = [entry for entry in trainer.state.log_history if "eval_b_loss" in entry]
    assert len(logged) == 2 and all("eval_a_entropy" not in entry for entry in logged)
    assert token_metrics(trainer.predict(parts["b"]).metrics, "test") == pytest.approx(second, rel=1e-5)
    assert token_metrics(trainer.evaluate(parts["a"])) == first, "the predictions are none of this evaluation"


def test_logits_for_metrics_are_read_once(
    tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss comes from the supervised tokens; the model's own would read, and copy, the logits of all."""
    read: list[float] = []

    class Reads(finetune.SFTTrainer):
        def compute_loss(self, *given: Any, **options: Any) -> Any:
            loss, outputs = super().compute_loss(*given, **options)
            read.append(float(outputs.loss) - float(loss))
            return loss, outputs

    def own_loss(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model computed its own loss")

    rows = Dataset.from_list(ROWS["prompt-completion"])
    common: dict[str, Any] = {"train_dataset": rows, "eval_dataset": rows, "processing_class": chat_tokenizer}
    plain = finetune.SFTTrainer(model=tiny_llama(vocab_size=512), args=config(tmp_path), **common)
    expected = plain.evaluate()
    for kind in (finetune.SFTTrainer, Reads):
        trainer = kind(
            model=tiny_llama(vocab_size=512), args=config(tmp_path), compute_metrics=lambda _: {"seen": 1.0}, **common
        )
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "cross_entropy", own_loss)
            found = trainer.evaluate()
        assert found["eval_seen"] == 1.0
        for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
            assert found[name] == pytest.approx(expected[name], rel=1e-5)
    assert read and not any(read)


def test_an_interrupted_evaluation_leaves_nothing_behind(
    tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    rows = Dataset.from_list(ROWS["text"])
    args = config(tmp_path, per_device_eval_batch_size=1)
    trainer = finetune.SFTTrainer(tiny_llama(512), args, None, rows, rows.select([0, 1]), chat_tokenizer)
    expected = token_metrics(trainer.evaluate())

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer.callback_handler, "on_prediction_step", stop)
        trainer.evaluate()
    assert token_metrics(trainer.evaluate()) == expected


def test_a_log_by_one_process_waits_for_no_other(
    tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scripts write `if trainer.is_world_process_zero(): trainer.log(...)`: sums over processes would wait for ever."""

    class Logging(finetune.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            with monkeypatch.context() as patch:
                for owner, name in ((ranks, "sum_over_processes"), (TrainingRun, "drain_tokens")):
                    patch.setattr(owner, name, lambda *given: pytest.fail("sums over processes"))
                trainer.log({"mine": 1.0})

    trainer = finetune.SFTTrainer(
        model=tiny_llama(512),
        args=config(tmp_path, max_steps=2, logging_steps=2, include_num_input_tokens_seen="all"),
        train_dataset=Dataset.from_list(ROWS["text"]),
        processing_class=chat_tokenizer,
        callbacks=[Logging()],
    )
    trainer.train()
    mine, _, logged = trainer.state.log_history[:3]
    assert mine["mine"] == 1.0 and "entropy" not in mine
    assert logged["num_tokens"] == logged["num_input_tokens_seen"] > 0 and "entropy" in logged
