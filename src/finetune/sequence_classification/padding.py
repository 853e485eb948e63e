"""Whether a classifier's trunk leaves padding out."""

from typing import Any

from torch import nn

from finetune.data.pipeline import say_on_main_process
from finetune.errors import ArgumentError
from finetune.kernels.unpadded import why_not_unpadded
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
        reason = why_not_unpadded(model, getattr(tokenizer, "padding_side", "right"))
    if reason is not None and args.padding_free:
        raise ArgumentError(f"`padding_free=True` is not possible: {reason}. Leave it out, or set it to False.")
    say_on_main_process(f"batches: {'padding-free' if reason is None else f'padded, because {reason}'}")
    return reason is None
