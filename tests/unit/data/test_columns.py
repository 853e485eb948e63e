import logging
import pickle

import pytest
import torch
from datasets import Dataset
from torch import nn

from finetune.data.columns import collator_with_columns, remove_unused_columns, signature_columns
from finetune.errors import DataFormatError


class Model(nn.Module):
    def forward(self, input_ids, attention_mask=None, labels=None):
        return input_ids


def identity(features):
    return features


def test_signature_then_label_names_without_repetition():
    assert signature_columns(Model(), ["labels", "start"]) == [
        "input_ids",
        "attention_mask",
        "labels",
        "label",
        "label_ids",
        "start",
    ]


def test_peft_model_is_looked_through():
    peft = pytest.importorskip("peft")

    class Linear(Model):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(2, 2)

    config = peft.LoraConfig(target_modules=["head"])
    assert signature_columns(peft.get_peft_model(Linear(), config)) == signature_columns(Linear())
    assert signature_columns(peft.get_peft_model(Linear(), config, mixed=True)) == signature_columns(Linear())


@pytest.mark.parametrize("stream", [False, True])
def test_unused_columns_go(caplog, stream):
    dataset = Dataset.from_dict({"input_ids": [[1]], "text": ["a"], "label": [0]})
    dataset = dataset.to_iterable_dataset() if stream else dataset
    with caplog.at_level(logging.INFO, logger="finetune"):
        kept = remove_unused_columns(dataset, signature_columns(Model()), description="Training", model_name="Model")
    assert kept.column_names == ["input_ids", "label"]
    assert "of the training set that `Model.forward` does not take are dropped: text" in caplog.text
    assert dataset.column_names == ["input_ids", "text", "label"]


def test_nothing_left_names_both_sides():
    dataset = Dataset.from_dict({"text": ["a"], "id": [1]})
    with pytest.raises(DataFormatError) as error:
        remove_unused_columns(dataset, ["input_ids", "labels"], description="Training", model_name="Model")
    message = str(error.value)
    assert "Found: text, id." in message and "takes: input_ids, labels." in message
    assert "`remove_unused_columns=False`" in message
    with pytest.raises(DataFormatError, match="Found: text"):
        collator_with_columns(identity, ["input_ids"])([{"text": "a"}])


def test_collator_filters_mappings_and_leaves_others():
    collator = pickle.loads(pickle.dumps(collator_with_columns(identity, ["input_ids"], description="test")))
    assert collator([{"input_ids": [1], "text": "a"}]) == [{"input_ids": [1]}]
    pair = (torch.ones(1), 0)
    assert collator([pair]) == [pair]
