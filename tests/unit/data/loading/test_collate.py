import numpy as np
import pytest
import torch

from finetune.data.loading.collate import DataCollatorForLanguageModeling, default_collator
from finetune.errors import ArgumentError, DataFormatError

ROWS = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4, 5], "labels": [-100, 5]}]


def random_rows(seed, packed):
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(rng.integers(1, 6)):
        sizes = rng.integers(1, 8, rng.integers(1, 4) if packed else 1).tolist()
        ids = rng.integers(1, 99, sum(sizes))
        row = {"input_ids": ids if seed % 3 == 0 else ids.tolist()}
        if seed % 2:
            row["labels"] = np.where(rng.random(len(ids)) < 0.3, -100, ids).tolist()
        rows.append(row | ({"seq_lengths": sizes} if packed else {}))
    return rows


@pytest.mark.parametrize("multiple", [None, 1, 4, 8])
@pytest.mark.parametrize(
    ("mode", "packed"),  # packed and padded is refused here, see test_packed_rows_are_not_padded
    [("padded", False)]
    + [(mode, packed) for mode in ("padding_free", "return_position_ids") for packed in (False, True)],
)
def test_output_equals_trl(mode, multiple, packed):
    reference = pytest.importorskip("trl.trainer.sft_trainer").DataCollatorForLanguageModeling
    kwargs = {} if mode == "padded" else {mode: True}
    for seed in range(25):
        rows = random_rows(seed, packed)
        ours = DataCollatorForLanguageModeling(7, pad_to_multiple_of=multiple, **kwargs)(rows)
        theirs = reference(7, pad_to_multiple_of=multiple, **kwargs)(rows)
        assert set(ours) == set(theirs)
        for key, value in theirs.items():
            if torch.is_tensor(value):
                assert ours[key].dtype == value.dtype and torch.equal(ours[key], value), key
            else:
                assert ours[key] == value


def test_fields_are_those_of_trl():
    import inspect

    reference = pytest.importorskip("trl.trainer.sft_trainer").DataCollatorForLanguageModeling
    ours = inspect.signature(DataCollatorForLanguageModeling).parameters
    theirs = inspect.signature(reference).parameters
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]


def test_a_width_that_divides_already_is_not_padded_further():
    batch = DataCollatorForLanguageModeling(0, pad_to_multiple_of=3)(ROWS)
    assert batch["input_ids"].shape == (2, 3)
    assert DataCollatorForLanguageModeling(0, pad_to_multiple_of=4)(ROWS)["labels"].tolist() == [
        [-100, 2, 3, -100],
        [-100, 5, -100, -100],
    ]


def test_bookkeeping_columns_are_ignored():
    rows = [{**row, "length": len(row["input_ids"]), "note": "x"} for row in ROWS]
    assert set(DataCollatorForLanguageModeling(0)(rows)) == {"input_ids", "labels", "attention_mask"}


def test_masks_act_when_there_are_no_labels():
    rows = [
        {"input_ids": [1, 2, 3], "completion_mask": [0, 1, 1], "assistant_masks": [1, 1, 0]},
        {"input_ids": [4], "completion_mask": [1], "assistant_masks": [1]},
    ]
    assert DataCollatorForLanguageModeling(0)(rows)["labels"].tolist() == [[-100, 2, -100], [4, -100, -100]]
    with_labels = [{**row, "labels": row["input_ids"]} for row in rows]
    assert DataCollatorForLanguageModeling(0)(with_labels)["labels"].tolist() == [[1, 2, 3], [4, -100, -100]]


def test_the_rows_are_not_changed():
    ids = np.array([1, 2, 3])
    row = {"input_ids": ids, "labels": ids}
    batch = DataCollatorForLanguageModeling(0, padding_free=True)([row])
    batch["input_ids"].fill_(0)
    assert ids.tolist() == [1, 2, 3] and batch["labels"].tolist() == [[-100, 2, 3]]


def test_packed_rows_are_not_padded():
    rows = [{"input_ids": [1, 2, 3], "seq_lengths": [2, 1]}]
    with pytest.raises(DataFormatError, match="padding_free=True"):
        DataCollatorForLanguageModeling(0)(rows)
    one_each = [{"input_ids": [1, 2, 3], "seq_lengths": [3]}]
    assert DataCollatorForLanguageModeling(0)(one_each)["input_ids"].tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "hello"}], "no `input_ids`; the batch has these columns: text"),
        ([{"input_ids": [1]}, {"input_ids": []}], "Row 1 .* empty `input_ids`"),
        ([{"input_ids": [1, 2], "labels": [1]}], "Row 0 .* 2 items in `input_ids` and 1 in `labels`"),
        ([{"input_ids": "hello"}], "list of integers"),
        ([{"input_ids": [1, None]}], "list of integers"),
        ([{"input_ids": None}], "list of integers"),
        ([{"input_ids": [1], "labels": [1]}, {"input_ids": [1]}], "no `labels`"),
        ([{"input_ids": [1]}, {"input_ids": [1], "labels": [-100]}], "no `labels`"),
        ([{"input_ids": [1]}, {"input_ids": [1, 2], "seq_lengths": [1, 1]}], "no `seq_lengths`"),
        ([{"input_ids": [1]}, {"input_ids": [1], "completion_mask": [0]}], "no `completion_mask`"),
        ([{"input_ids": [1, 2], "seq_lengths": [2, 1]}], "has 2 tokens, but its `seq_lengths` sum to 3"),
    ],
)
def test_bad_rows(rows, message):
    with pytest.raises(DataFormatError, match=message):
        DataCollatorForLanguageModeling(0, padding_free=True)(rows)


def test_bad_arguments():
    with pytest.raises(ArgumentError, match="return_tensors='np'"):
        DataCollatorForLanguageModeling(0, return_tensors="np")
    with pytest.raises(ArgumentError, match="pad_to_multiple_of=0"):
        DataCollatorForLanguageModeling(0, pad_to_multiple_of=0)


def test_default_collator_stacks_without_a_tokenizer_and_pads_with_one():
    stacked = default_collator()([{"x": [1.0, 2.0], "label": 1}, {"x": [3.0, 4.0], "label": 0}])
    assert stacked["x"].tolist() == [[1.0, 2.0], [3.0, 4.0]] and stacked["labels"].tolist() == [1, 0]

    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"[PAD]": 0, "a": 1}, unk_token="[PAD]")), pad_token="[PAD]"
    )
    rows = [{"input_ids": [1, 1, 1], "label": 1}, {"input_ids": [1], "label": 0}]
    batch = default_collator(tokenizer, pad_to_multiple_of=4)(rows)
    assert batch["input_ids"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]] and batch["labels"].tolist() == [1, 0]
