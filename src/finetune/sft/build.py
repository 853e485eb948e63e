"""Model and tokenizer of an SFT run: loaded where they were given by name, with adapters and the tokens rows need."""

from typing import Any

from torch import nn

from finetune.data.templates import clone_chat_template, load_chat_template
from finetune.errors import ArgumentError
from finetune.kernels.attention import packed_unsupported_reason, use_packed_attention
from finetune.kernels.isolation import probe_isolation
from finetune.models.adapters import add_adapters, prepare_quantized
from finetune.models.load import load_model, load_tokenizer
from finetune.models.tokens import choose_eos_token
from finetune.sft.config import SFTConfig


def load_for_sft(
    args: SFTConfig, model: Any, processing_class: Any, quantization_config: Any, peft_config: Any
) -> tuple[nn.Module, Any]:
    """Returns model (with adapters) and tokenizer, loaded where they were given by name."""
    assert not isinstance(args.model_init_kwargs, str)  # parsed when the arguments were made
    init: dict[str, Any] = {**(args.model_init_kwargs or {})}
    given = model
    if isinstance(model, str):
        model = load_model(
            model,
            model_init_kwargs=init,
            quantization_config=quantization_config,
            trust_remote_code=args.trust_remote_code,
        )
    elif init or quantization_config is not None:
        raise ArgumentError(
            "`model_init_kwargs` and `quantization_config` act when the model is loaded here, but a loaded `model` "
            "was passed. Pass its name, or drop them."
        )
    if processing_class is None:
        processing_class = load_tokenizer(
            given if isinstance(given, str) else model,
            revision=init.get("revision"),
            trust_remote_code=args.trust_remote_code,
        )
    if args.eos_token is not None:
        choose_eos_token(processing_class, args.eos_token, model)
    added: list[int] = []
    if args.chat_template_path is not None:
        if args.chat_template_path.endswith((".jinja", ".j2")):
            processing_class.chat_template = load_chat_template(args.chat_template_path)
        else:
            model, processing_class, added = clone_chat_template(model, processing_class, args.chat_template_path)
    if peft_config is not None:
        checkpointing = bool(args.gradient_checkpointing)
        model = prepare_quantized(model, activation_checkpointing=checkpointing)
        model = add_adapters(
            model,
            peft_config,
            added_token_ids=added,
            zero_stage=getattr(args.deepspeed_plugin, "zero_stage", 0) or 0,
            activation_checkpointing=checkpointing,
        )
    return model, processing_class


def brings_packed_attention(model: nn.Module) -> bool:
    """Returns whether the model was loaded with a FlashAttention, which keeps the samples of a row apart itself."""
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None) or ""
    return "flash" in implementation


def can_be_padding_free(model: nn.Module) -> bool:
    """Returns whether batches without padding train the same: the model takes them, and a probe moved no neighbour."""
    if brings_packed_attention(model) or packed_unsupported_reason(model) is not None:
        return False
    if any(parameter.numel() == 0 or parameter.is_meta for parameter in model.parameters()):
        return False  # sharded while loading: a probe would need all processes
    with use_packed_attention(model):
        try:
            return probe_isolation(model).isolated
        except (ArgumentError, TypeError, ValueError):
            return False
