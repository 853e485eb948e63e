"""How long rows may be, the padding token, what batches are padded to, and whether the trunk leaves padding out."""

from typing import Any

from torch import nn

from finetune.data.preparation.pipeline import say_on_main_process
from finetune.data.sources import is_iterable_dataset
from finetune.distributed.ranks import broadcast_object
from finetune.errors import ArgumentError
from finetune.features.compiled import length_bucket
from finetune.kernels.unpadded import why_not_unpadded
from finetune.models.adapters import unwrap
from finetune.models.tokens import choose_pad_token
from finetune.models.traits import max_positions
from finetune.sequence_classification.config import SequenceClassificationConfig


def settle_padding_free(args: SequenceClassificationConfig, model: nn.Module, tokenizer: Any) -> bool:
    """Returns whether the trunk of `model` leaves padding out, and says which on one line.

    `padding_free` unset means so wherever the probe of `why_not_unpadded` shows that it gives the same logits. Raises
    `ArgumentError` with the reason if it is True and cannot be.
    """
    if args.padding_free is False:
        return False
    if args.torch_compile_backend is not None:
        reason = "compiled layers want few different shapes"
    elif args.pad_to_multiple_of is not None:
        reason = "`pad_to_multiple_of` asks for padding"
    else:
        # Under FSDP the first process alone may have read the weights, and all must do the same.
        reason = broadcast_object(why_not_unpadded(model, getattr(tokenizer, "padding_side", "right")))
    if reason is not None and args.padding_free:
        raise ArgumentError(f"`padding_free=True` is not possible: {reason}. Leave it out, or set it to False.")
    say_on_main_process(f"batches: {'padding-free' if reason is None else f'padded, because {reason}'}")
    return reason is None


def longest_row(max_length: int | None, tokenizer: Any, model: Any) -> int | None:
    """Returns the most tokens a row may have: `max_length`, what the tokenizer says, what the model has positions for.

    A tokenizer that knows no limit says 1e30; then RoBERTa's positions count, which start behind the padding token.
    """
    limits = [max_length] if max_length is not None else []
    known = getattr(tokenizer, "model_max_length", None)
    if known is not None and known < 1e9:
        limits.append(int(known))
    elif (positions := max_positions(model)) is not None:
        limits.append(positions)
    return min(limits) if limits else None


def padding_multiple(args: SequenceClassificationConfig, max_length: int | None, model: Any) -> int | None:
    """Returns what batches are padded to a multiple of: compiled layers want few different lengths."""
    if args.pad_to_multiple_of is not None or args.torch_compile_backend is None:
        return args.pad_to_multiple_of
    return length_bucket(max_length, max_positions(model))


def settle_padding(tokenizer: Any, model: Any, pad_token: str | None, dataset: Any) -> None:
    """Chooses the padding token and tells the model's config.

    A decoder's head reads the last token that is not padding, by its id. If padding is the end-of-sequence token and
    rows end with it, that is the wrong token; then another special token of the vocabulary becomes the padding token,
    so that training here and inference anywhere read the same one. Without another one, the token before is read in
    both; attention only looks back, so it is as if the rows had no end token.
    """
    same = tokenizer.pad_token in (None, tokenizer.eos_token)
    if pad_token is None and same and _ends_with(dataset, tokenizer.eos_token_id):
        known = [str(token) for token in tokenizer.added_tokens_decoder.values() if getattr(token, "special", True)]
        last_resort = (tokenizer.eos_token, tokenizer.bos_token)
        free = [token for token in [*tokenizer.all_special_tokens, *known] if token not in last_resort]
        pad_token = next(iter(sorted(free, key=lambda token: "pad" not in token.lower())), None)
    if getattr(unwrap(model), "config", None) is not None:
        choose_pad_token(tokenizer, model, pad_token)


def _ends_with(dataset: Any, token_id: int | None) -> bool:
    """Returns whether one of the first 1000 rows (64 of a stream) ends with the token."""
    if token_id is None:
        return False
    rows = dataset.take(64) if is_iterable_dataset(dataset) else dataset.select(range(min(len(dataset), 1000)))
    return any(row["input_ids"][-1] == token_id for row in rows)
