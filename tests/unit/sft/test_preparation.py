"""The rows of `SFTTrainer`: what the audit refuses or warns of, rows given later, and the order of packed streams."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import ProcessorMixin

import finetune
from finetune.data.preparation.packing import pack_dataset
from finetune.data.preparation.pipeline import prepare_split
from finetune.data.preparation.settings import DataSettings
from finetune.errors import DataFormatError

TEXTS = ["the cat sat on a mat", "the red sun went down over hills", "birds sang to rivers that ran past"]
CHATS = [
    {"messages": [{"role": "user", "content": text[:8]}, {"role": "assistant", "content": text[8:]}]} for text in TEXTS
]
ENDS_OUTSIDE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}"
)


def make(model: Any, tokenizer: Any, out: Path, rows: Any, eval_rows: Any = None, **options: Any) -> Any:
    defaults = {
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "max_steps": 2, "save_strategy": "no",
        "max_length": 64, "logging_steps": 1, **options,
    }  # fmt: skip
    return finetune.SFTTrainer(
        model,
        finetune.SFTConfig(str(out), **defaults),
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
    )


def test_the_audit_can_be_a_warning(tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path, capsys: Any) -> None:
    chat_tokenizer.chat_template = ENDS_OUTSIDE
    rows, model = Dataset.from_list(CHATS), tiny_llama(512)
    with pytest.raises(DataFormatError, match=r"will not learn to stop.*set `data_audit='warn'`"):
        make(model, chat_tokenizer, tmp_path, rows, assistant_only_loss=True)
    make(model, chat_tokenizer, tmp_path, rows, assistant_only_loss=True, data_audit="warn").train()
    assert "train: The token that ends an answer is trained in none of its rows" in capsys.readouterr().out
    with pytest.raises(DataFormatError, match="None of its 3 rows has a trained token left"):
        make(model, chat_tokenizer, tmp_path, rows, assistant_only_loss=True, data_audit="warn", max_length=4)


@pytest.mark.parametrize("stream", [False, True])
def test_streams_and_evaluation_rows_only_warn(
    stream: bool, tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path, capsys: Any
) -> None:
    good = Dataset.from_list([{"prompt": "the", "completion": " cat"}] * 4)
    bad = Dataset.from_list([{"prompt": "the", "completion": " cat sat on a mat" * 9}] * 4)
    train, evaluated = (bad.to_iterable_dataset(), None) if stream else (good, {"cut": bad})
    make(tiny_llama(512), chat_tokenizer, tmp_path, train, evaluated, max_length=6).train()
    said = capsys.readouterr().out
    assert f"{'train' if stream else 'cut'}: Every row is cut at `max_length=6`" in said


@pytest.mark.parametrize("options", [{}, {"packing": True}, {"packing": True, "packing_strategy": "wrapped"}], ids=str)
def test_tokens_given_to_evaluate_are_prepared_as_those_given_first(
    options: dict[str, Any], tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path
) -> None:
    tokens = [chat_tokenizer(text * 3)["input_ids"] for text in TEXTS]
    rows = Dataset.from_dict({"input_ids": tokens, "labels": [[-100, *ids[1:]] for ids in tokens]})
    trainer = make(tiny_llama(512), chat_tokenizer, tmp_path, rows, rows, **{"max_length": 10, **options})
    expected = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert trainer.evaluate(rows.to_list())["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert trainer.evaluate(rows.to_iterable_dataset())["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert trainer.evaluate(trainer.eval_dataset)["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_rows_for_predictions_that_have_labels_stay_as_they_are(
    tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path
) -> None:
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 3, "labels": [[5, 6, 7], [-100] * 3, [-100, 6, 7]]})
    trainer = make(tiny_llama(512), chat_tokenizer, tmp_path, rows)
    assert trainer.predict(rows).predictions.shape[0] == 3


class Processor(ProcessorMixin):
    """What models for images and text come with, without the images."""

    def __init__(self, tokenizer: Any = None, chat_template: str | None = None) -> None:
        super().__init__(tokenizer, chat_template=chat_template)


def test_a_processor_trains_on_messages(tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    processor = Processor(chat_tokenizer, chat_tokenizer.chat_template)
    (tmp_path / "new.jinja").write_text("{{ 'the ' }}" + chat_tokenizer.chat_template)
    rows, options = Dataset.from_list(CHATS), {"chat_template_path": str(tmp_path / "new.jinja")}
    trainer = make(tiny_llama(512), processor, tmp_path, rows, rows, assistant_only_loss=True, **options)
    trainer.train()
    assert trainer.processing_class is processor
    assert chat_tokenizer.decode(trainer.train_dataset[0]["input_ids"]).startswith("the <|im_start|>user")
    assert trainer.evaluate(CHATS)["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)


def varied_stream(num_shards: int = 1) -> Any:
    rows = [{"text": " ".join(["the cat sat"] * (1 + number % 7))} for number in range(120)]
    return Dataset.from_list(rows).to_iterable_dataset(num_shards=num_shards)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_blocks_of_a_packed_stream_are_shuffled(
    num_shards: int, tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path
) -> None:
    options = {"packing": True, "max_length": 24, "shuffle_dataset": True}
    trainer = make(tiny_llama(512), chat_tokenizer, tmp_path, varied_stream(num_shards), **options)
    lengths = [len(row["input_ids"]) for row in trainer.train_dataset]
    samples = sum(len(row["seq_lengths"]) for row in trainer.train_dataset)
    assert samples == 120
    firsts = [row["seq_lengths"][0] for row in trainer.train_dataset]
    assert firsts != sorted(firsts, reverse=True), "packing gives blocks by their longest sample"
    plain = make(tiny_llama(512), chat_tokenizer, tmp_path, varied_stream(num_shards), packing=True, max_length=24)
    assert sorted(lengths) == sorted(len(row["input_ids"]) for row in plain.train_dataset)


def test_packed_rows_of_a_map_are_shuffled_too(tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    rows = Dataset.from_list(list(varied_stream()))
    options = {"packing": True, "max_length": 24, "shuffle_dataset": True}
    trainer = make(tiny_llama(512), chat_tokenizer, tmp_path, rows, **options)
    firsts = [row["seq_lengths"][0] for row in trainer.train_dataset]
    assert firsts != sorted(firsts, reverse=True)


def test_a_shuffled_and_packed_stream_resumes(tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    options = {
        "packing": True, "max_length": 24, "shuffle_dataset": True, "max_steps": 6, "save_strategy": "steps",
        "save_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
    }  # fmt: skip
    whole = make(tiny_llama(512), chat_tokenizer, tmp_path / "a", varied_stream(), **options)
    whole.train()
    again = make(tiny_llama(512), chat_tokenizer, tmp_path / "b", varied_stream(), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    losses = [[entry["loss"] for entry in each.state.log_history if "loss" in entry] for each in (whole, again)]
    assert losses[0] == losses[1]


def test_the_end_of_longer_rows_is_kept_in_packed_ones(tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7, 8, 9]] * 2})
    trainer = make(
        tiny_llama(512), chat_tokenizer, tmp_path, rows, packing=True, max_length=3, truncation_mode="keep_end"
    )
    assert trainer.train_dataset["input_ids"][:] == [[7, 8, 9]] * 2


def test_an_evaluation_set_may_be_named_train(tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    cut = Dataset.from_list(
        [{"prompt": "the", "completion": " cat sat on a mat" * 9}, {"prompt": "a", "completion": "b"}]
    )
    rows = Dataset.from_list([{"prompt": "the", "completion": " cat"}] * 4)
    options = {"max_length": 6, "shuffle_dataset": True}
    trainer = make(tiny_llama(512), chat_tokenizer, tmp_path, rows, {"train": cut.select([0]), "b": cut}, **options)
    assert {name: audit.num_rows for name, audit in trainer.audits.items()} == {"train": 4, "eval[train]": 1, "b": 2}
    assert "eval_train_loss" in trainer.evaluate()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("length", [{"length": 5}, {}], ids=str)
def test_other_columns_of_prepared_rows_are_not_packed(
    length: dict[str, int], stream: bool, tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path
) -> None:
    rows = Dataset.from_list([{"input_ids": [5, 6, 7, 8, 4], "labels": [5, 6, 7, 8, 4], "id": "a", **length}] * 6)
    rows = rows.to_iterable_dataset() if stream else rows
    trainer = make(tiny_llama(512), chat_tokenizer, tmp_path, rows, packing=True, max_length=16)
    assert [row["seq_lengths"] for row in trainer.train_dataset] == [[5, 5, 5]] * 2


def long_prompts() -> Dataset:
    """Rows of which a packed row of 16 tokens holds mostly parts of prompts."""
    return Dataset.from_list([{"prompt": "the cat sat on a mat " * (6 + i % 5), "completion": TEXTS[i % 3]}
                              for i in range(30)])  # fmt: skip


PACKED = {"packing": True, "max_length": 16, "per_device_train_batch_size": 1, "max_steps": 12}


def in_the_loss(row: dict[str, Any]) -> bool:
    starts, place = set(), 0
    for length in row.get("seq_lengths", [len(row["labels"])]):
        starts.add(place)
        place += length
    return any(label != -100 for place, label in enumerate(row["labels"]) if place not in starts)


@pytest.mark.parametrize("strategy", ["bfd_split", "wrapped"])
@pytest.mark.parametrize("streams", [False, True], ids=["map", "stream"])
def test_packed_rows_that_train_nothing_are_left_out(
    streams: bool, strategy: str, tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path
) -> None:
    options = {**PACKED, "packing_strategy": strategy}
    rows = long_prompts().to_iterable_dataset() if streams else long_prompts()
    trainer = make(tiny_llama(512), chat_tokenizer, tmp_path, rows, long_prompts(), **options)
    kept = list(trainer.train_dataset)
    assert kept and all(map(in_the_loss, kept))
    prepared = prepare_split(long_prompts(), chat_tokenizer, DataSettings(truncate=False), say=lambda line: None)
    every = list(pack_dataset(prepared.dataset, 16, strategy))
    assert kept == [row for row in every if in_the_loss(row)]
    for audit in list(trainer.audits.values())[streams:]:
        assert audit.num_dropped == 0 and audit.num_packed - audit.num_packed_dropped == len(kept)
        assert audit.num_packed == len(every) > 2 * len(kept)
        said = "\n".join(audit.warnings())
        assert f"{audit.num_packed_dropped} of {audit.num_packed} packed rows hold no supervised token" in said
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12 and all(loss > 1 for loss in losses)


def test_packed_rows_that_all_train_nothing_are_an_error(tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 4, "labels": [[-100, -100, 7]] * 4})
    options = {**PACKED, "packing_strategy": "bfd_split", "max_length": 2, "data_audit": "warn"}
    with pytest.raises(DataFormatError, match=r"`max_length=2` tokens.*Raise `max_length`"):
        make(tiny_llama(512), chat_tokenizer, tmp_path, rows, **options)


@pytest.mark.parametrize("streams", [False, True], ids=["map", "stream"])
def test_predictions_leave_out_no_row_that_max_length_cuts(
    streams: bool, tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path, capsys: Any
) -> None:
    rows = Dataset.from_list(
        [{"prompt": prompt, "completion": " cat"} for prompt in ("the", "the cat sat on a mat " * 3, "the red")]
    )
    trainer = make(tiny_llama(512), chat_tokenizer, tmp_path, rows, rows, max_length=8)
    assert len(trainer.train_dataset) == len(trainer.eval_dataset) == 2
    capsys.readouterr()
    output = trainer.predict(rows.to_iterable_dataset() if streams else rows)
    assert output.predictions.shape[0] == 3
    assert output.label_ids is not None and (output.label_ids[1] == -100).all()
    assert "left out" not in capsys.readouterr().out
    assert trainer.predict(rows.select([1])).predictions.shape[0] == 1
    trainer.evaluate(rows)
    assert trainer.audits["eval"].num_dropped == 1
