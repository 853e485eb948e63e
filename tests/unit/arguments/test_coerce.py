"""Arguments of other classes become ours, with all that a user has added to them."""

import logging
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import transformers

from finetune.arguments import TrainingArguments, replace_arguments
from finetune.arguments.coerce import coerce_training_arguments
from finetune.errors import ArgumentError
from finetune.sft.config import SFTConfig


def test_ours_are_kept_and_the_rest_converted() -> None:
    mine = SFTConfig("out")
    assert coerce_training_arguments(mine, TrainingArguments) is mine
    assert coerce_training_arguments({"output_dir": "x", "seed": 3}, TrainingArguments).seed == 3
    assert coerce_training_arguments(None, TrainingArguments).output_dir == "tmp_trainer"
    config = coerce_training_arguments(TrainingArguments("out", learning_rate=3e-4), SFTConfig)
    assert (config.learning_rate, config.max_length) == (3e-4, 1024)


@pytest.mark.parametrize("wrong", [3, "out", object()])
def test_other_objects_are_refused(wrong: Any) -> None:
    with pytest.raises(ArgumentError, match="`args` is a"):
        coerce_training_arguments(wrong, TrainingArguments)


@dataclass
class Theirs(transformers.TrainingArguments):
    flavour: str = "plain"
    kinds = ("a", "b")

    @property
    def loud_flavour(self) -> str:
        return self.flavour.upper()

    def steps_of(self, rows: int) -> int:
        return rows // self.train_batch_size

    @classmethod
    def name_of_class(cls) -> str:
        return cls.__name__

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "more": 1}


@dataclass
class Ours(TrainingArguments):
    flavour: str = "plain"

    @property
    def loud_flavour(self) -> str:
        return self.flavour.upper()


@pytest.mark.parametrize("kind", [transformers.TrainingArguments, TrainingArguments])
def test_attributes_that_were_set_come_along(kind: Any) -> None:
    given = kind("out", use_cpu=True)
    given.class_weights = [1.0, 2.0]
    before = dict(vars(given))
    result: Any = coerce_training_arguments(given, SFTConfig)
    assert result.class_weights == [1.0, 2.0] and result.class_weights is not given.class_weights
    assert type(result) is SFTConfig
    assert vars(given) == before, "what the user passed is not changed"
    changed: Any = replace_arguments(result, seed=4, class_weights=[3.0])
    assert (changed.seed, changed.class_weights, result.class_weights) == (4, [3.0], [1.0, 2.0])
    assert replace_arguments(changed, seed=5).class_weights == [3.0]  # type: ignore[attr-defined]


def test_members_of_a_users_subclass_come_along(caplog: pytest.LogCaptureFixture) -> None:
    given = Theirs("out", flavour="hot", per_device_train_batch_size=4, use_cpu=True)
    given.kinds = ("c",)
    result: Any = coerce_training_arguments(given, TrainingArguments)
    assert isinstance(result, TrainingArguments) and type(result) is not TrainingArguments
    assert (result.flavour, result.loud_flavour, result.kinds, result.steps_of(20)) == ("hot", "HOT", ("c",), 5)
    assert result.name_of_class() == "Theirs"
    assert "more" not in result.to_dict() and result.to_dict()["seed"] == 42
    assert "`to_dict` has no effect" in caplog.text and "finetune.TrainingArguments" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        again: Any = coerce_training_arguments(given, TrainingArguments)
    assert type(again) is type(result) and caplog.text == "", "said once"


def test_members_of_a_subclass_of_ours_come_along_to_another_of_ours() -> None:
    result: Any = coerce_training_arguments(Ours("out", flavour="hot", use_cpu=True), SFTConfig)
    assert isinstance(result, SFTConfig)
    assert result.loud_flavour == "HOT"


def test_they_can_be_pickled_and_changed() -> None:
    result: Any = coerce_training_arguments(Theirs("out", flavour="hot", use_cpu=True), TrainingArguments)
    copied = pickle.loads(pickle.dumps(result))
    assert type(copied) is type(result) and copied.loud_flavour == "HOT" and copied.device.type == "cpu"
    changed = replace_arguments(result, seed=7)
    assert (changed.seed, changed.loud_flavour) == (7, "HOT")
