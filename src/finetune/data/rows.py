"""The shapes a row takes on its way from the user's data set to the model.

Legend: T tokens of one row, B rows of a batch, N tokens of a flattened batch, S sequences packed into one row.

`TextRow` / `ChatRow` / `PromptCompletionRow`  ->  `TokenizedRow`  ->  (`PackedRow`)  ->  `Batch`

Labels are never shifted in the data: `labels[t]` is `input_ids[t]` or `IGNORE_INDEX`, and the loss compares the
logits of position t-1 with it. The first label of a sequence therefore never counts.
"""

from typing import Any, NoReturn, TypedDict

import torch
from typing_extensions import NotRequired

from finetune.errors import DataFormatError

IGNORE_INDEX = -100
"""Label of a position that is not trained (the default `ignore_index` of `torch.nn.functional.cross_entropy`)."""


LENGTH = "length"
"""Column of prepared rows: how many tokens each has. Made anew for packed rows."""

WEIGHTS = "token_weights"
"""Column of rows in which tokens count differently: what the loss of each label is multiplied by."""


class Message(TypedDict, total=False):
    """One turn of a conversation. `train: False` or `weight: 0` keeps an assistant turn out of the loss.

    Another `weight` multiplies the loss of each of the turn's tokens; what the batch's loss is divided by stays the
    number of trained tokens. Of two turns of 10 tokens with nll 2 each and weights 1 and 0.5 the loss is
    (10 * 2 + 10 * 2 * 0.5) / 20 = 1.5.
    """

    role: str
    content: Any
    tool_calls: Any
    train: bool | None
    weight: float | None


class TextRow(TypedDict):
    """Plain text; the column name is `dataset_text_field`. Every token is trained, the end-of-text token included."""

    text: str


class ChatRow(TypedDict):
    """A conversation. Every token is trained, or the assistant turns alone with `assistant_only_loss`."""

    messages: list[Message]
    tools: NotRequired[list[dict[str, Any]] | str | None]
    chat_template_kwargs: NotRequired[dict[str, Any] | None]


class PromptCompletionRow(TypedDict):
    """A prompt and its completion, both text or both messages. The completion alone is trained by default."""

    prompt: str | list[Message]
    completion: str | list[Message]
    tools: NotRequired[list[dict[str, Any]] | str | None]
    chat_template_kwargs: NotRequired[dict[str, Any] | None]


class TokenizedRow(TypedDict):
    """A row that `pipeline.prepare_split` makes, each list of length T.

    >>> TokenizedRow(input_ids=[5, 6, 7, 2], labels=[-100, -100, 7, 2])["labels"]
    [-100, -100, 7, 2]
    """

    input_ids: list[int]
    labels: list[int]
    length: NotRequired[int]
    completion_mask: NotRequired[list[int]]
    assistant_masks: NotRequired[list[int]]
    token_weights: NotRequired[list[float]]


class PackedRow(TypedDict):
    """Several tokenized rows one after another; `seq_lengths` (S) sums to T."""

    input_ids: list[int]
    labels: list[int]
    seq_lengths: list[int]
    token_weights: NotRequired[list[float]]


class Batch(TypedDict, total=False):
    """What a collator returns. Padded: (B, T) with `attention_mask`. Padding-free: (1, N) with `position_ids`."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    token_weights: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    cu_seq_lens_q: torch.Tensor
    cu_seq_lens_k: torch.Tensor
    max_length_q: int
    max_length_k: int


def fail(row: int, name: str, found: str, remedy: str) -> NoReturn:
    """Raises `DataFormatError` that names a row of the data set `name`, what was found there, and what to do."""
    raise DataFormatError(f"Row {row} of the {name} data set: {found}. {remedy}".rstrip())


def type_name(value: Any) -> str:
    """Returns the type of a value as messages name it, for instance `None` or `` `int` ``."""
    return "None" if value is None else f"`{type(value).__name__}`"
