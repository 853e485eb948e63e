"""What changes the model for the time of a run, entered on one stack: the order, and nothing else.

Each feature restores what it found, so the model is the same object with the same behaviour after success, an
exception or an interrupt. Only the special tokens stay those of the tokenizer, because the model is saved with them.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from torch import nn

from finetune.distributed.accelerator import planned_zero_stage
from finetune.features.compiled import compiled_blocks
from finetune.features.garbage import garbage_control
from finetune.features.lookups import settled_lookups
from finetune.models.activation import activation_checkpointing, use_cache
from finetune.models.adapters import reentrant_checkpointing_kwargs
from finetune.models.tokens import align_special_tokens

if TYPE_CHECKING:
    from finetune.arguments import TrainingArguments


def enter(
    stack: ExitStack,
    model: nn.Module,
    args: "TrainingArguments",
    processing_class: Any,
    neftune_noise_alpha: float | None,
    recomputes: bool,
) -> Callable[[], dict[str, float]]:
    """Enters on `stack` what `args` ask for: Liger kernels before anything wraps the model, then the hooks.

    `recomputes`: whether activations are computed again in the backward pass.

    Returns a function that gives what the features add to each log.
    """
    stack.enter_context(garbage_control(args.torch_empty_cache_steps))
    stack.enter_context(settled_lookups())
    if args.use_liger_kernel:
        from finetune.kernels.liger import apply_liger, liger_parity

        handle = apply_liger(model, _as_dict(args.liger_kernel_config))
        stack.callback(handle.remove)
        stack.enter_context(liger_parity(model, handle, mixed=args.mixed_precision != "no"))
    stack.enter_context(use_cache(model, bool(args.use_cache)))
    kwargs = _as_dict(args.activation_checkpointing_kwargs)
    if recomputes:
        stage = planned_zero_stage(args) or 0
        kwargs = reentrant_checkpointing_kwargs(model, kwargs, stage)
    stack.enter_context(activation_checkpointing(model, recomputes, kwargs))
    if processing_class is not None:
        align_special_tokens(model, processing_class)
    if neftune_noise_alpha is not None:
        from finetune.features.neftune import neftune

        stack.enter_context(neftune(model, neftune_noise_alpha))
    if args.torch_compile_backend is None:
        return dict
    # Last, so that what the others hang on the layers is compiled with them.
    compiled = compiled_blocks(model, backend=args.torch_compile_backend, mode=args.torch_compile_mode)
    return stack.enter_context(compiled).logs


def _as_dict(value: Any) -> dict[str, Any] | None:
    assert value is None or isinstance(value, dict)  # JSON strings were parsed when the arguments were made
    return value
