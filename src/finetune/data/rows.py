"""The shapes a row takes on its way from the user's dataset to the model, and the names of its columns.

- text: `text`, or the column that `dataset_text_field` names. Every token is trained, the end-of-text token included.
- messages: `messages` (and `tools`, `chat_template_kwargs`). Every token is trained, or with `assistant_only_loss` the
  assistant's turns alone.
- prompt-completion: `prompt` and `completion`, both text or both messages. The completion alone is trained by default.
- prepared: `input_ids`, `labels`, `length`, and `token_weights` where tokens count differently. All but `length` are
  lists with an item for each token.
- packed: several prepared rows one after another; `seq_lengths` holds the length of each.
- batch: padded, (rows, tokens) with `attention_mask`; padding-free, (1, tokens of all rows) with `position_ids`.

Labels are never shifted in the data: `labels[t]` is `input_ids[t]` or `IGNORE_INDEX`, and the loss compares the
logits of position t-1 with it. The first label of a sequence therefore never counts.

`train: False` or `weight: 0` in a message keeps an assistant turn out of the loss. Another `weight` multiplies the loss
of each of the turn's tokens; what the batch's loss is divided by stays the number of trained tokens. Of two turns of 10
tokens with nll 2 each and weights 1 and 0.5 the loss is (10 * 2 + 10 * 2 * 0.5) / 20 = 1.5.
"""

from dataclasses import dataclass
from typing import Any, NoReturn

from finetune.errors import DataFormatError

IGNORE_INDEX = -100
"""Label of a position that is not trained (the default `ignore_index` of `torch.nn.functional.cross_entropy`)."""

LENGTH = "length"
"""Column of prepared rows: how many tokens each has. Made anew for packed rows."""

WEIGHTS = "token_weights"
"""Column of rows in which tokens count differently: what the loss of each label is multiplied by."""


@dataclass
class Conversations:
    """A batch of conversations, element i belonging to row i.

    `train[i]` is None, or one number per *assistant* message of row i: the weight of that turn, 0 where it is not
    trained and 1 where nothing was said.
    """

    messages: list[list[dict[str, Any]]]
    train: list[list[float] | None]
    tools: list[list[Any] | None]
    template_kwargs: list[dict[str, Any] | None]


def fail(row: int, name: str, found: str, remedy: str) -> NoReturn:
    """Raises `DataFormatError` that names a row of the dataset `name`, what was found there, and what to do."""
    raise DataFormatError(f"Row {row} of the {name} dataset: {found}. {remedy}".rstrip())


def type_name(value: Any) -> str:
    """Returns the type of a value as messages name it, for instance `None` or `` `int` ``."""
    return "None" if value is None else f"`{type(value).__name__}`"
