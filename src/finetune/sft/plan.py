"""What an SFT run does with its rows, decided once from the arguments and the first row. No model needed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from finetune.data.preparation.formats import RowFormat, detect_format
from finetune.data.preparation.formatting import formatted_row
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
        eval_padding_free: evaluation batches are one row of samples whatever `padding_free` says, because their rows
            hold several.
        completion_only_loss: prompt tokens are not trained; by default where rows have `prompt` and `completion`, or
            tokens with a `completion_mask`. The rows are those that `formatting_func` returns.
        assistant_only_loss: only what the assistant says is trained.
        skip_prepare: the rows are used as they are (`dataset_kwargs={"skip_prepare_dataset": True}`).
        reads_predictions: `compute_metrics` and the like read the logits of an evaluation, row by row.
    """

    padding_free: bool | None
    packing: bool
    eval_packing: bool
    eval_padding_free: bool
    completion_only_loss: bool
    assistant_only_loss: bool
    skip_prepare: bool
    reads_predictions: bool = False

    @property
    def pads_eval(self) -> bool:
        """Whether evaluation batches are padded whatever `padding_free` says, so that predictions have their rows."""
        return self.reads_predictions and not self.eval_packing

    @classmethod
    def resolve(
        cls,
        args: "SFTConfig",
        sample: Mapping[str, Any],
        formatting_func: Callable[..., Any] | None = None,
        *,
        reads_predictions: bool = False,
    ) -> "DataPlan":
        """Returns the plan for rows like `sample`.

        `eval_packing` follows `packing` where it is unset and nobody reads predictions.

        Raises:
            ArgumentError: every broken rule, in one message.
        """
        options = args.dataset_kwargs if isinstance(args.dataset_kwargs, dict) else {}
        row_format, row = _read(sample, args.dataset_text_field, formatting_func)
        completion_only = args.completion_only_loss
        if row_format is not None:
            completion_only = row_format.masks_prompt(row, completion_only)
        packs_samples = args.packing_strategy != "wrapped"
        eval_packing = args.eval_packing
        if eval_packing is None:
            eval_packing = bool(args.packing) and not reads_predictions
        plan = cls(
            padding_free=True if args.packing and packs_samples else args.padding_free,
            packing=bool(args.packing),
            eval_packing=eval_packing,
            eval_padding_free=eval_packing and packs_samples,
            completion_only_loss=bool(completion_only),
            assistant_only_loss=bool(args.assistant_only_loss),
            skip_prepare=bool(options.get("skip_prepare_dataset")),
            reads_predictions=reads_predictions,
        )
        broken = _broken_rules(plan, row_format, row)
        if not plan.skip_prepare and not {"image", "images"}.isdisjoint(sample):
            broken.append("The rows hold images, and this trainer trains on text. Remove the image columns.")
        if broken:
            raise ArgumentError(" ".join(broken))
        return plan

    def settle(self, *, padding_free: bool) -> "DataPlan":
        """Returns the plan with the question of padding answered."""
        return replace(self, padding_free=padding_free) if self.padding_free is None else self


def _read(
    sample: Mapping[str, Any], text_field: str, formatting_func: Callable[[dict[str, Any]], Any] | None
) -> tuple[RowFormat | None, Mapping[str, Any]]:
    """Returns what rows like `sample` are after `formatting_func`, and the row; no format if they cannot be read."""
    try:
        row, field = formatted_row(sample, formatting_func, text_field)
        return detect_format(row, field), row
    except DataFormatError:
        return None, sample  # said with all it takes when the rows are prepared


def _broken_rules(plan: DataPlan, row_format: RowFormat | None, row: Mapping[str, Any]) -> list[str]:
    """Returns what the rows cannot do, with what to change. The arguments alone are checked where they are made."""
    broken: list[str] = []
    if row_format is None:
        return broken
    if plan.assistant_only_loss and not row_format.can_mask_turns(row):
        broken.append(
            "`assistant_only_loss=True` needs rows of messages (or tokens with `assistant_masks`). Set "
            "`assistant_only_loss=False`, or give the rows a `messages` column."
        )
    if plan.completion_only_loss and not row_format.can_mask_prompt(row):
        broken.append(
            "`completion_only_loss=True` needs rows with `prompt` and `completion` (or tokens with a "
            "`completion_mask`); with a `formatting_func`, those it returns. Set `completion_only_loss=False` or None."
        )
    return broken
