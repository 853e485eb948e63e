"""Whether the batches of an SFT run are padded or one row of samples, and the collator that makes them."""

from typing import Any

from torch import nn

from finetune.data.loading.collate import DataCollatorForLanguageModeling
from finetune.errors import ArgumentError
from finetune.features.compiled import length_bucket
from finetune.kernels.attention import packed_unsupported_reason
from finetune.models.tokens import choose_pad_token
from finetune.models.traits import max_positions
from finetune.sft.build import brings_packed_attention, refuse_virtual_tokens, uses_virtual_tokens
from finetune.sft.config import SFTConfig
from finetune.sft.plan import DataPlan

_READS = (
    "code that reads the batches or logits of an evaluation (`compute_metrics`, `preprocess_logits_for_metrics`, "
    "`compute_loss_func`, an overridden `compute_loss` or `prediction_step`) expects one row per sample"
)


def settle_padding(
    plan: DataPlan, args: SFTConfig, model: nn.Module, *, has_collator: bool, reads_training: bool, reads_eval: bool
) -> DataPlan:
    """Returns the plan with the question of padding answered, unless it takes a pass of the model to know.

    `has_collator`: the user gave one. `reads_training` and `reads_eval`: code of the user's sees the batches or the
    logits, and expects a row per sample with its `attention_mask`, as every other trainer hands it over.

    Raises:
        ArgumentError: rows of several samples were asked for, and what was given cannot take them.
    """
    # Compiled layers want few different shapes, which rows without padding do not have.
    compiles = args.torch_compile_backend is not None
    if compiles or has_collator or reads_training or reads_eval or plan.packing:
        plan = plan.settle(padding_free=False)
    if plan.padding_free:
        refuse_virtual_tokens(model)
        if has_collator:
            raise ArgumentError("`padding_free` and `packing` need their own collator: drop `data_collator`.")
        # What reads the batches of training sees rows of several samples there, too.
        reason = _READS if plan.eval_padding_free and plan.reads_predictions else None
    else:
        reason = _why_not_packed(model, has_collator, reads_eval) if plan.eval_padding_free else None
    if reason is not None:
        raise ArgumentError(
            f"`eval_packing=True` makes evaluation rows of several samples, but {reason}. Set `eval_packing=False`."
        )
    return plan


def _why_not_packed(model: nn.Module, has_collator: bool, reads_eval: bool) -> str | None:
    """Returns why evaluation cannot take rows of several samples where training does not, or None."""
    if has_collator:
        return "they need their own collator, and a `data_collator` was given"
    if reads_eval:
        return _READS
    if uses_virtual_tokens(model):
        return "PEFT puts its virtual tokens before each row of a batch"
    reason = None if brings_packed_attention(model) else packed_unsupported_reason(model)
    return None if reason is None else f"the samples of a row cannot be kept apart in this model: {reason}"


def make_collator(
    plan: DataPlan, args: SFTConfig, model: nn.Module, processing_class: Any
) -> DataCollatorForLanguageModeling:
    """Returns the collator for the batches that the plan says."""
    multiple = args.pad_to_multiple_of
    if not multiple and args.torch_compile_backend is not None:
        multiple = length_bucket(args.max_length, max_positions(model))
    assert not isinstance(multiple, str)  # a number or None since the arguments were made
    return DataCollatorForLanguageModeling(
        pad_token_id=choose_pad_token(processing_class, model, args.pad_token),
        padding_free=bool(plan.padding_free),
        pad_to_multiple_of=multiple,
    )
