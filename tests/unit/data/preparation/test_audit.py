from typing import Any

import datasets
import pytest
from datasets import Dataset

from finetune.data.preparation.audit import AuditLimits, SupervisionAudit, audit
from finetune.data.preparation.pipeline import prepare_split
from finetune.data.preparation.settings import DataSettings
from finetune.data.preview import audit_table
from finetune.errors import DataFormatError


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def audit_of(rows: dict[str, list[Any]], tokenizer: Any, **options: Any) -> SupervisionAudit:
    return prepare_split(Dataset.from_dict(rows), tokenizer, DataSettings(**options), say=lambda line: None).audit


def chat(*contents: str) -> list[dict[str, str]]:
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": c} for i, c in enumerate(contents)]


def test_counts_by_hand(chat_tokenizer: Any) -> None:
    made = audit_of(
        {"prompt": ["the", "the cat"], "completion": [" cat sat", " sat on a mat"]}, chat_tokenizer, max_length=4
    )
    # the| cat sat <end>           4 tokens, 3 trained
    # the cat| sat on a mat <end>  7 tokens, cut to 4, 2 trained, the end among the lost
    assert (made.num_rows, made.num_source_tokens, made.num_tokens, made.num_supervised) == (2, 11, 8, 5)
    assert (made.num_truncated, made.num_stop_expected, made.num_stop_trained) == (1, 2, 1)
    assert made.lost_share == 3 / 11
    assert made.supervised_share == 5 / 8
    assert made.longest == 7
    assert made.mask_method == "completion"
    text = audit_table({"train": made.with_packing(0.5)})
    for part in ("5 (62.5%)", "3 (27.3%)", "50.0% of rows", "50.0% full", "1 rows were cut", "1 rows do not train"):
        assert part in text
    assert made.to_dict()["lost_share"] == 3 / 11
    made.check(max_length=4)


def test_max_length_that_leaves_nothing_is_an_error(chat_tokenizer: Any) -> None:
    made = audit_of({"prompt": ["the cat sat on a mat"], "completion": [" sun"]}, chat_tokenizer, max_length=4)
    with pytest.raises(DataFormatError, match=r"`max_length=4` cuts off every answer .*8 tokens.*keep_end"):
        made.check(max_length=4)


def test_no_supervised_token_is_an_error(chat_tokenizer: Any) -> None:
    made = audit_of({"input_ids": [[5, 6, 7]], "labels": [[5, -100, -100]]}, chat_tokenizer)
    with pytest.raises(DataFormatError, match="None of its 1 rows has a trained token"):
        made.check()


OUTSIDE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}"
)


def test_a_stop_token_outside_the_markers_is_an_error(chat_tokenizer: Any) -> None:
    rows = {"messages": [chat("what", "the cat"), chat("a", "b", "what", "sun")]}
    made = audit_of(rows, chat_tokenizer, assistant_only_loss=True, chat_template=OUTSIDE)
    with pytest.raises(DataFormatError, match="will not learn to stop"):
        made.check()
    made.check(AuditLimits(require_stop=False))
    audit_of(rows, chat_tokenizer, assistant_only_loss=True).check()
    audit_of(rows, chat_tokenizer, chat_template=OUTSIDE).check()


def test_broken_limits_are_named_together_and_can_be_warnings(chat_tokenizer: Any) -> None:
    long = " ".join(["the cat sat"] * 100)
    made = audit_of({"prompt": ["the"], "completion": [f" {long}"]}, chat_tokenizer, max_length=4)
    both = r"(?s)Every row is cut at `max_length=4`.*cuts off 9\d\.\d% of all tokens.*set `data_audit='warn'`\.$"
    with pytest.raises(DataFormatError, match=both):
        made.check(max_length=4)
    lines: list[str] = []
    made.check(max_length=4, warn=lines.append)
    assert [line.split(":")[0] for line in lines] == ["train", "train"]
    assert not any("data_audit" in line for line in lines)


def test_rows_that_train_nothing_are_never_a_warning(chat_tokenizer: Any) -> None:
    made = audit_of({"input_ids": [[5, 6]], "labels": [[5, -100]]}, chat_tokenizer)
    lines: list[str] = []
    with pytest.raises(DataFormatError, match="None of its 1 rows has a trained token") as error:
        made.check(warn=lines.append)
    assert "data_audit" not in str(error.value) and not lines


def test_a_packed_stream_of_which_nothing_is_counted_passes(chat_tokenizer: Any) -> None:
    rows = Dataset.from_dict({"input_ids": [[5, 6]], "labels": [[5, 6]], "seq_lengths": [[2]]}).to_iterable_dataset()
    split = prepare_split(rows, chat_tokenizer, DataSettings(), say=lambda line: None)
    split.audit.check()


HEADERS = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
NO_END = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"


@pytest.mark.parametrize("form", ["messages", "prompt-completion"])
def test_answers_that_end_with_the_next_turn_need_no_stop(form: str, chat_tokenizer: Any) -> None:
    chat_tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    chats = [chat("what", "the cat"), chat("a", "b", "what", "sun")]
    rows: dict[str, list[Any]] = {"messages": chats}
    if form != "messages":
        rows = {"prompt": [each[:-1] for each in chats], "completion": [each[-1:] for each in chats]}
    made = audit_of(rows, chat_tokenizer, chat_template=HEADERS)
    made.check()
    assert made.num_stop_expected == 0
    assert not made.warnings()
    with pytest.raises(DataFormatError, match="will not learn to stop"):
        audit_of(rows, chat_tokenizer, chat_template=NO_END).check()


def test_rows_that_are_all_cut_before_their_end_are_an_error(chat_tokenizer: Any) -> None:
    made = audit_of({"prompt": ["the cat"], "completion": [" sat on a mat"]}, chat_tokenizer, max_length=4)
    with pytest.raises(DataFormatError, match="Every row is cut at `max_length=4`"):
        made.check(max_length=4)


def test_long_documents_may_all_be_cut(chat_tokenizer: Any) -> None:
    made = audit_of({"text": ["the cat sat on a mat"] * 2}, chat_tokenizer, max_length=4)
    made.check(max_length=4)
    assert any("do not train the token" in line for line in made.warnings())


def test_conversations_that_end_with_a_question_need_no_stop(chat_tokenizer: Any) -> None:
    made = audit_of({"messages": [chat("what", "the cat", "so")]}, chat_tokenizer, assistant_only_loss=True)
    assert made.num_stop_expected == 0
    assert made.stop_share is None


def test_rows_that_never_had_anything_to_learn_need_no_stop(chat_tokenizer: Any) -> None:
    made = audit_of({"text": ["", "the cat"]}, chat_tokenizer)
    assert (made.num_dropped, made.num_stop_expected, made.num_stop_trained) == (1, 1, 1)


def test_tokens_cut_off_are_limited(chat_tokenizer: Any) -> None:
    made = audit_of({"text": ["the cat sat on a mat " * 20, "sun"]}, chat_tokenizer, max_length=4)
    assert made.lost_share > 0.9
    made.check()
    with pytest.raises(DataFormatError, match=r"`max_length=4` cuts off 9\d\.\d% .*bfd_split"):
        made.check(AuditLimits(max_lost_share=0.5), max_length=4)


def test_bfd_split_and_wrapped_lose_no_token(chat_tokenizer: Any) -> None:
    made = audit_of({"text": ["the cat sat on a mat"]}, chat_tokenizer, max_length=3, truncate=False)
    assert (made.num_truncated, made.lost_share) == (0, 0)


def test_boundaries_drift_and_bos_are_warned_of(chat_tokenizer: Any) -> None:
    rows = {"prompt": ["the ", "the"], "completion": ["cat", " cat"]}
    made = audit_of(rows, chat_tokenizer)
    assert made.num_boundary_mismatches == 1
    assert any("meet inside a token" in line for line in made.warnings())
    bos = chat_tokenizer.bos_token
    made = audit_of({"text": [f"{bos}{bos}the cat"]}, chat_tokenizer)
    assert made.num_doubled_bos == 1
    assert any("two BOS" in line for line in made.warnings())


def test_tokenized_rows_are_audited_without_their_source(chat_tokenizer: Any) -> None:
    rows = Dataset.from_dict({"input_ids": [[3, 4, 5], [6]], "labels": [[3, 4, -100], [6]]})
    made = audit(rows, name="eval")
    assert (made.num_rows, made.num_tokens, made.num_supervised, made.num_dropped) == (2, 4, 1, 1)
    assert audit(rows.select([1, 0])).first_dropped_rows == (0,)
    for empty in (None, 0):
        assert audit(rows.select([])).num_rows == (empty or 0)
    with pytest.raises(DataFormatError, match="no rows"):
        audit(rows.select([])).check()


def test_empty_texts_are_named_as_such(chat_tokenizer: Any) -> None:
    with pytest.raises(DataFormatError, match="All texts are empty"):
        audit_of({"text": ["", ""]}, chat_tokenizer).check(max_length=8)


def test_the_table_names_only_defects_that_are_there(chat_tokenizer: Any) -> None:
    fine = audit_table({"train": audit_of({"text": ["the cat"]}, chat_tokenizer)})
    assert "BOS" not in fine and "prompt" not in fine
    bos = chat_tokenizer.bos_token
    doubled = audit_table({"train": audit_of({"text": [f"{bos}{bos}the cat"]}, chat_tokenizer)})
    assert any(line.split() == ["rows", "with", "two", "BOS", "tokens", "1"] for line in doubled.splitlines())
    assert "prompt" not in doubled


def test_the_table_has_a_column_per_split(chat_tokenizer: Any) -> None:
    made = audit_of({"text": ["the cat"]}, chat_tokenizer)
    header = audit_table({"train": made, "eval": made}).splitlines()[1]
    assert header.split() == ["train", "eval"]
