"""Which columns and labels are found, what they mean, and the errors for what cannot be told."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value, load_from_disk

from finetune.errors import ArgumentError, DataFormatError
from finetune.sequence_classification.data import Columns, find_columns, prepare_rows
from finetune.sequence_classification.labels import (
    MULTI,
    REGRESSION,
    SINGLE,
    Task,
    balanced_weights,
    encode_labels,
    read_task,
)


def rows(**columns: list[Any]) -> Dataset:
    return Dataset.from_dict(columns)


@pytest.mark.parametrize(
    ("columns", "texts"),
    [
        ({"text": ["a"], "label": [0]}, ("text",)),
        ({"label": [0], "sentence2": ["b"], "sentence1": ["a"]}, ("sentence1", "sentence2")),
        ({"premise": ["a"], "hypothesis": ["b"], "label": [0], "text": ["c"]}, ("premise", "hypothesis")),
        ({"question": ["a"], "sentence": ["b"], "label": [0]}, ("question", "sentence")),
        ({"id": ["x"], "utterance": ["a"], "label": ["y"]}, ("utterance",)),
        ({"sentence1": ["a"], "sentence2": [1], "label": [0], "body": ["c"], "sentence": ["d"]}, ("sentence",)),
    ],
)
def test_the_text_column_or_pair_is_found(columns: dict[str, list[Any]], texts: tuple[str, ...]) -> None:
    assert find_columns(rows(**columns), None, None, "train") == Columns(texts, "label")


def test_named_columns_win_and_a_class_label_column_is_found_by_its_type() -> None:
    data = rows(text=["a"], other=["b"], mood=[0], label=[1.0])
    assert find_columns(data, ["other"], "mood", "train") == Columns(("other",), "mood")
    typed = rows(text=["a"], mood=[0]).cast_column("mood", ClassLabel(names=["sad", "gay"]))
    assert find_columns(typed, None, None, "train").label == "mood"


@pytest.mark.parametrize(
    ("columns", "arguments", "expected"),
    [
        ({"txt": ["a"], "body": ["b"], "label": [0]}, (None, None), "`txt`, `body`, `label`. Did you mean `txt`"),
        ({"number": [1], "label": [0]}, (None, None), "no column of text"),
        ({"text": ["a"], "label": [0]}, (["texts"], None), "`texts`, but the train dataset.*Did you mean `text`"),
        ({"text": ["a"], "lable": [0]}, (None, "label"), "Did you mean `lable`"),
        ({"text": []}, (None, None), "empty"),
    ],
)
def test_a_column_that_is_missing_is_named_with_the_nearest(
    columns: dict[str, list[Any]], arguments: tuple[Any, Any], expected: str
) -> None:
    with pytest.raises(DataFormatError, match=expected):
        find_columns(rows(**columns), *arguments, "train")


@pytest.mark.parametrize(
    ("labels", "kind", "names", "counts"),
    [
        (["b", "a", "b"], SINGLE, ("a", "b"), (1, 2)),
        ([0, 1, 1], SINGLE, ("0", "1"), (1, 2)),
        ([5, 1, 5], SINGLE, ("1", "5"), (1, 2)),
        ([True, False, True], SINGLE, ("False", "True"), (1, 2)),
        ([0.5, 1.0, 2.0], REGRESSION, ("LABEL_0",), None),
        ([[0.5, 2.0], [1.0, 3.0]], REGRESSION, ("LABEL_0", "LABEL_1"), None),
        ([[1, 0, 1], [1, 1, 0]], MULTI, ("0", "1", "2"), (2, 1, 1)),
        ([[1.0, 0.0], [1.0, 1.0]], MULTI, ("0", "1"), (2, 1)),
        ([["b"], ["a", "b"], []], MULTI, ("a", "b"), (1, 2)),
    ],
)
def test_labels_say_what_the_task_is(labels: Any, kind: str, names: Any, counts: Any) -> None:
    task = read_task(rows(text=["x"] * len(labels), label=labels), "label")
    assert (task.problem_type, task.names, task.counts) == (kind, names, counts)


def test_a_class_label_keeps_its_order_and_its_empty_classes() -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "maybe", "yes"])})
    task = read_task(Dataset.from_dict({"text": ["a", "b"], "label": [2, 0]}, features=features), "label")
    assert task.names == ("no", "maybe", "yes") and task.counts == (1, 0, 1)
    lists = Features({"text": Value("string"), "label": List(ClassLabel(names=["no", "yes"]))})
    data = Dataset.from_dict({"text": ["a", "b"], "label": [[1], [0, 1]]}, features=lists)
    task = read_task(data, "label")
    assert task.problem_type == MULTI
    assert encode_labels([[1], [0, 1]], task, "label", "train", data.features["label"]) == [[0.0, 1.0], [1.0, 1.0]]


def test_a_model_made_for_the_same_classes_keeps_their_ids() -> None:
    data = rows(text=["x"] * 3, label=["yes", "no", "yes"])
    task = read_task(data, "label", model_labels={0: "yes", 1: "no"})
    assert task.names == ("yes", "no")
    assert encode_labels(["no", "yes"], task, "label", "train") == [1, 0]
    typed = data.cast_column("label", ClassLabel(names=["no", "yes"]))
    task = read_task(typed, "label", model_labels={0: "yes", 1: "no"})
    assert encode_labels([0, 1], task, "label", "train", typed.features["label"]) == [1, 0]
    assert read_task(data, "label", model_labels={0: "good", 1: "bad"}).names == ("no", "yes")
    numbers = read_task(rows(text=["x"] * 2, label=[0, 2]), "label", model_labels={0: "a", 1: "b", 2: "c"})
    assert numbers.names == ("a", "b", "c") and encode_labels([2], numbers, "label", "train") == [2]


def test_problem_type_and_class_names_override_what_would_be_read() -> None:
    data = rows(text=["x"] * 2, label=[0, 3])
    assert read_task(data, "label", problem_type=REGRESSION).problem_type == REGRESSION
    task = read_task(rows(text=["x"] * 2, label=["c", "a"]), "label", class_names=["c", "b", "a"])
    assert task.names == ("c", "b", "a") and task.counts == (1, 0, 1)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["a", None], "Row 1 of the training data has no label"),
        ([1.0, float("nan")], "Row 1 of the training data has no label"),
        (["a", "a"], "nothing to learn"),
    ],
)
def test_labels_that_cannot_be_learned_are_errors(labels: Any, expected: str) -> None:
    with pytest.raises(DataFormatError, match=expected):
        read_task(rows(text=["x"] * 2, label=labels), "label")


def test_missing_and_unknown_labels_are_errors_that_name_them() -> None:
    with pytest.raises(DataFormatError, match=r"`text`, `labl`.*Did you mean `labl`.*label_column"):
        read_task(rows(text=["x"], labl=[1]), None)
    task = read_task(rows(text=["x"] * 2, label=["good", "bad"]), "label")
    with pytest.raises(DataFormatError, match=r"'god'.*bad, good.*Did you mean `good`"):
        encode_labels(["god"], task, "label", "eval")
    with pytest.raises(DataFormatError, match="-100"):
        encode_labels([-100.0], Task(REGRESSION, ("LABEL_0",)), "label", "eval")
    stream = rows(text=["x"] * 2, label=["good", "bad"]).to_iterable_dataset()
    with pytest.raises(DataFormatError, match="class_names"):
        read_task(stream, "label")
    assert read_task(stream, "label", class_names=["bad", "good"]).names == ("bad", "good")


def test_class_weights_are_those_of_scikit_learn_and_leave_the_mean_at_one() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    labels = [0] * 75 + [1] * 20 + [2] * 5
    task = read_task(rows(text=["x"] * 100, label=labels), "label")
    balanced = balanced_weights(task, "balanced")
    assert balanced == pytest.approx(compute_class_weight("balanced", classes=np.arange(3), y=labels))
    given = balanced_weights(task, [1.0, 2.0, 4.0])
    assert sum(given[label] for label in labels) / 100 == pytest.approx(1.0)
    assert given[1] / given[0] == pytest.approx(2.0) and given[2] / given[0] == pytest.approx(4.0)
    several = read_task(rows(text=["x"] * 4, label=[["a"], ["a"], ["a", "b"], []]), "label")
    assert balanced_weights(several, "balanced") == pytest.approx([1 / 3, 3.0])


def test_class_weights_that_cannot_act_are_errors() -> None:
    task = read_task(rows(text=["x"] * 3, label=["a", "b", "b"]), "label")
    with pytest.raises(ArgumentError, match="3 numbers for 2 classes"):
        balanced_weights(task, [1.0, 2.0, 3.0])
    with pytest.raises(ArgumentError, match="regression"):
        balanced_weights(Task(REGRESSION, ("LABEL_0",)), "balanced")
    with pytest.raises(ArgumentError, match="stream"):
        balanced_weights(Task(SINGLE, ("a", "b")), "balanced")


def test_rows_become_tokens_with_lengths_and_bad_rows_are_named(chat_tokenizer: Any) -> None:
    data = rows(sentence1=["the cat", "sun"], sentence2=["sat on", "down over hills"], label=["a", "b"])
    task = read_task(data, "label")
    made = prepare_rows(data, chat_tokenizer, Columns(("sentence1", "sentence2"), "label"), task, 4, "train", None)
    whole = [chat_tokenizer("the cat", "sat on")["input_ids"], chat_tokenizer("sun", "down over hills")["input_ids"]]
    assert made["labels"] == [0, 1]
    assert all(length == min(4, len(ids)) for length, ids in zip(made["length"], whole, strict=True))
    assert made["length"] == [len(ids) for ids in made["input_ids"]]
    for text, expected in (("", "no tokens"), (None, "`text` is None")):
        bad = rows(text=["the", text], label=["a", "b"])
        with pytest.raises(DataFormatError, match=f"Row 1 of the train dataset.*{expected}"):
            prepare_rows(bad, chat_tokenizer, Columns(("text",), "label"), task, 8, "train", None)


@pytest.mark.parametrize("values", [[-1, -1], [None, None]])
def test_a_test_set_without_labels_has_none(chat_tokenizer: Any, values: list[Any]) -> None:
    task = read_task(rows(text=["x"] * 2, label=[0, 1]), "label")
    data = rows(text=["the cat", "sat"], label=values)
    assert (
        "labels"
        not in prepare_rows(data, chat_tokenizer, Columns(("text",), "label"), task, 8, "test", None).column_names
    )


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_of_tokens_are_cut_as_those_of_text(chat_tokenizer: Any, side: str) -> None:
    chat_tokenizer.truncation_side = side
    text = rows(text=["the cat sat on a mat", "sun"], label=["a", "b"])
    tokens = chat_tokenizer(text["text"][:])
    data = rows(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], label=["a", "b"])
    task = read_task(text, "label")
    expected = prepare_rows(text, chat_tokenizer, Columns(("text",), "label"), task, 3, "train", None)
    assert expected["length"][:] == [3, len(tokens["input_ids"][1])]
    stream = data.to_iterable_dataset().with_format("torch")
    for given in (data, stream):
        made = prepare_rows(given, chat_tokenizer, Columns((), "label"), task, 3, "train", None)
        for row, wanted in zip(made, expected, strict=True):
            assert {key: wanted[key] for key in row} == row
            assert {"input_ids", "attention_mask", "length", "labels"} <= set(row)


def test_what_changes_the_tokens_is_part_of_the_cached_rows_key(chat_tokenizer: Any, tmp_path: Path) -> None:
    rows(text=["the cat sat on a mat", "sun"], label=["a", "b"]).save_to_disk(tmp_path / "rows")
    data = load_from_disk(str(tmp_path / "rows"))
    task = read_task(data, "label")

    def made() -> Dataset:
        return prepare_rows(data, chat_tokenizer, Columns(("text",), "label"), task, 3, "train", None)

    first = made()
    chat_tokenizer.truncation_side = "left"
    assert made()["input_ids"][0] != first["input_ids"][0]
    chat_tokenizer.model_input_names = ["input_ids", "token_type_ids"]
    assert "token_type_ids" in made().column_names
