"""`SequenceClassificationConfig`: the training arguments and those of sequence classification."""

# ruff: noqa: RUF009

from dataclasses import dataclass
from typing import Any

from finetune.arguments import ArgumentGroup, TrainingArguments, arg
from finetune.arguments.base import require, require_choice, require_positive

PROBLEM_TYPES = ["single_label_classification", "multi_label_classification", "regression"]


@dataclass(kw_only=True, repr=False)
class SequenceClassificationArguments(ArgumentGroup):
    """Columns, labels and loss of sequence classification."""

    model_init_kwargs: dict[str, Any] | str | None = arg(
        None, "Arguments for `from_pretrained`, used when the model is given by name."
    )
    trust_remote_code: bool = arg(False, "Run Python code that comes with the model or tokenizer.")
    text_columns: list[str] | None = arg(None, "Column with the text, or the two of a pair; unset finds them.")
    label_column: str | None = arg(None, "Column with the labels; unset finds it.")
    class_names: list[str] | None = arg(
        None, "All classes in the order of their ids; unset reads them from the training data."
    )
    problem_type: str | None = arg(
        None,
        "Unset: classes from names, integers and booleans, several classes from lists, regression from floats.",
        choices=PROBLEM_TYPES,
    )
    class_weights: list[float] | str | None = arg(
        None, "`balanced` (every class weighs the same in total) or one number for each class."
    )
    max_length: int | None = arg(512, "Longest sequence in tokens, pairs included; longer ones are cut.")
    pad_token: str | None = arg(None, "Token used for padding; unset means the tokenizer's, or one that is free.")
    pad_to_multiple_of: int | None = arg(None, "Pad batches to a multiple of this many tokens.")
    padding_free: bool | None = arg(
        None,
        "Let the layers leave out padding; unset means where a probe shows the same logits, False never.",
        nargs="?",
        const=True,
    )
    dataset_num_proc: int | None = arg(None, "Processes that prepare the dataset.")

    def _validate(self) -> None:
        if self.problem_type is not None:
            require_choice("problem_type", self.problem_type, PROBLEM_TYPES)
        require_positive("max_length", self.max_length)
        require_positive("pad_to_multiple_of", self.pad_to_multiple_of)
        require_positive("dataset_num_proc", self.dataset_num_proc)
        require(
            self.text_columns is None or len(self.text_columns) in (1, 2),
            f"`text_columns={self.text_columns!r}` must name one column, or the two columns of a pair.",
        )
        weights = self.class_weights
        if isinstance(weights, str):
            require_choice("class_weights", weights, ["balanced"])
        for weight in weights if isinstance(weights, list) else []:
            require_positive("class_weights", weight, zero=True)


@dataclass(kw_only=True, repr=False)
class SequenceClassificationConfig(SequenceClassificationArguments, TrainingArguments):
    """Arguments of `SequenceClassificationTrainer`.

    Two defaults differ from `TrainingArguments`: `logging_steps` 10, and `train_sampling_strategy` `group_by_length`
    (rows of similar length share a batch, so there is little padding).

    Raises:
        ArgumentError: as `TrainingArguments`.
    """

    logging_steps: float = arg(10, "Steps between logs; below 1 a share of all steps.")
    train_sampling_strategy: str = arg("group_by_length", "Order of the training samples.")

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    def __post_init__(self) -> None:
        weights: Any = self.class_weights
        if isinstance(weights, (list, tuple)):  # words, when they come from the command line
            words = [str(weight) for weight in weights]
            self.class_weights = [float(word) for word in words] if all(map(_is_number, words)) else " ".join(words)
        super().__post_init__()


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
