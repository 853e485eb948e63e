"""What an SFT run does with its rows, decided once from the arguments and the first row. No model needed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from finetune.data.formats import Kind, detect_format, formatted_row
from finetune.errors import ArgumentError, DataFormatError

if TYPE_CHECKING:
    from finetune.sft.config import SFTConfig


@dataclass(frozen=True)
class DataPlan:
    """The decisions of one SFT run about its data.

    Attributes:
        padding_free: batches are one row of concatenated samples; always so for `bfd` packing. None: where the model
            keeps samples apart, which only a look at it tells (`settle`).
        packing, eval_packing: rows are filled up to `max_length` with several samples.
        completion_only_loss: prompt tokens are not trained; by default where rows have `prompt` and `completion`.
        assistant_only_loss: only what the assistant says is trained.
        conversational: rows hold messages.
        skip_prepare: the rows are used as they are (`dataset_kwargs={"skip_prepare_dataset": True}`).
    """

    padding_free: bool | None
    packing: bool
    eval_packing: bool
    packing_strategy: str
    completion_only_loss: bool
    assistant_only_loss: bool
    conversational: bool
    skip_prepare: bool

    @classmethod
    def resolve(
        cls, args: "SFTConfig", sample: Mapping[str, Any], formatting_func: Callable[..., Any] | None = None
    ) -> "DataPlan":
        """Returns the plan for rows like `sample`.

        Raises:
            ArgumentError: every broken rule, in one message.
        """
        has_completion = "prompt" in sample and "completion" in sample
        completion_only = args.completion_only_loss
        if completion_only is None:
            completion_only = has_completion and formatting_func is None
        options = args.dataset_kwargs if isinstance(args.dataset_kwargs, dict) else {}
        plan = cls(
            padding_free=True if args.packing and args.packing_strategy != "wrapped" else args.padding_free,
            packing=bool(args.packing),
            eval_packing=bool(args.packing if args.eval_packing is None else args.eval_packing),
            packing_strategy=args.packing_strategy,
            completion_only_loss=bool(completion_only),
            assistant_only_loss=bool(args.assistant_only_loss),
            conversational=_is_conversational(sample, args.dataset_text_field, formatting_func),
            skip_prepare=bool(options.get("skip_prepare_dataset")),
        )
        broken = [message for applies, message in RULES if applies(args, plan, sample, formatting_func)]
        if broken:
            raise ArgumentError(" ".join(broken))
        return plan

    def settle(self, *, padding_free: bool) -> "DataPlan":
        """Returns the plan with the question of padding answered."""
        return replace(self, padding_free=padding_free) if self.padding_free is None else self


def _is_conversational(
    sample: Mapping[str, Any], text_field: str, formatting_func: Callable[[dict[str, Any]], Any] | None
) -> bool:
    """Returns whether rows like `sample` are read as messages; false for rows that cannot be read at all."""
    try:
        row_format = detect_format(*formatted_row(sample, formatting_func, text_field))
    except DataFormatError:
        return False  # said with all it takes when the rows are prepared
    return row_format.kind in (Kind.CHAT, Kind.CHAT_PROMPT_COMPLETION)


Rule = tuple[Callable[["SFTConfig", DataPlan, Mapping[str, Any], Any], bool], str]

# Each row: when it applies, and what to do about it.
RULES: list[Rule] = [
    (
        lambda args, plan, row, func: plan.assistant_only_loss and not plan.conversational,
        "`assistant_only_loss=True` needs rows of messages. Set `assistant_only_loss=False`, or give the rows a "
        "`messages` column.",
    ),
    (
        lambda args, plan, row, func: plan.completion_only_loss and func is not None,
        "`formatting_func` turns rows into plain text, so `completion_only_loss=True` has no prompt to leave out. Drop "
        "one of them.",
    ),
    (
        lambda args, plan, row, func: (
            bool(args.completion_only_loss) and not ({"completion", "completion_mask", "labels"} & row.keys())
        ),
        "`completion_only_loss=True` needs rows with `prompt` and `completion` (or a `completion_mask`). Set "
        "`completion_only_loss=False` or None.",
    ),
    (
        lambda args, plan, row, func: (plan.packing or plan.eval_packing) and args.max_length is None,
        "`packing=True` fills rows up to `max_length`, which is None. Set `max_length`.",
    ),
    (
        lambda args, plan, row, func: args.packing_strategy not in ("bfd", "bfd_split", "wrapped"),
        "`packing_strategy` must be 'bfd', 'bfd_split' or 'wrapped'.",
    ),
    (
        lambda args, plan, row, func: args.truncation_mode not in ("keep_start", "keep_end"),
        "`truncation_mode` must be 'keep_start' or 'keep_end'.",
    ),
    (
        lambda args, plan, row, func: args.loss_type not in ("nll", "dft", "chunked_nll"),
        "`loss_type` must be 'nll', 'dft' or 'chunked_nll'.",
    ),
    (
        lambda args, plan, row, func: args.max_length is not None and args.max_length < 2,
        "`max_length` must be at least 2: the first token of a row is never predicted.",
    ),
    (
        lambda args, plan, row, func: "image" in row or "images" in row,
        "The rows hold images, and this trainer trains on text. Remove the image columns.",
    ),
]
