"""Tokenizer and model of an SFT run: the tokenizer first, so that rows are prepared and checked before weights load."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from finetune.compat import tokenizer_of
from finetune.data.chat.templates import adopt_chat_template, fit_vocabulary
from finetune.data.preparation.packing import SEQ_LENGTHS
from finetune.data.preparation.pretokenized import highest_token_id
from finetune.distributed import ranks
from finetune.distributed.accelerator import planned_zero_stage
from finetune.distributed.divided import whole_where_used
from finetune.errors import ArgumentError
from finetune.kernels.attention import packed_unsupported_reason, use_packed_attention
from finetune.kernels.isolation import probe_isolation, require_isolation
from finetune.models.adapters import add_adapters, cast_given_adapters, prepare_quantized, unwrap
from finetune.models.load import load_model, load_processing_class
from finetune.models.load_options import warn_of_unused_options, without_device_map
from finetune.models.paths import refuse_adapter_folder
from finetune.models.tokens import choose_eos_token
from finetune.models.traits import learned_positions
from finetune.sft.config import SFTConfig
from finetune.sft.recompute import longest_row


@dataclass(frozen=True)
class SFTTokenizer:
    """A tokenizer, or a processor with one, ready for rows: EOS and chat template chosen.

    `added` are tokens that the model has no rows for yet. `is_cloned`: the template is another tokenizer's, so the
    model follows its EOS.
    """

    processing_class: Any
    added: list[str]
    is_cloned: bool


def load_tokenizer_for_sft(args: SFTConfig, model: Any, processing_class: Any = None) -> SFTTokenizer:
    """Returns the tokenizer for the rows of `model` (a name, or loaded). No weights are read."""
    if processing_class is None:
        processing_class = load_processing_class(
            model, revision=_init_kwargs(args).get("revision"), trust_remote_code=args.trust_remote_code
        )
    if args.eos_token is not None:
        choose_eos_token(processing_class, args.eos_token)
    path = args.chat_template_path
    if path is None:
        return SFTTokenizer(processing_class, [], False)
    inner = tokenizer_of(processing_class)
    added = adopt_chat_template(inner, path, "chat_template_path")
    if inner is not processing_class:
        processing_class.chat_template = inner.chat_template
    return SFTTokenizer(processing_class, added, not path.endswith((".jinja", ".j2")))


def check_model_options(args: SFTConfig, model: Any, quantization_config: Any) -> None:
    """Warns of options of loading when `model` is loaded already; raises `ModelLoadError` for an adapter's folder."""
    if isinstance(model, str):
        refuse_adapter_folder(model)
    else:
        warn_of_unused_options(model, _init_kwargs(args), quantization_config)


def load_model_for_sft(
    args: SFTConfig, model: Any, tokenizer: SFTTokenizer, quantization_config: Any, peft_config: Any
) -> nn.Module:
    """Returns the model, loaded if it was given by name, with rows for added tokens and with adapters if asked."""
    if isinstance(model, str):
        model = load_model(
            model,
            model_init_kwargs=without_device_map(_init_kwargs(args), args),
            quantization_config=quantization_config,
            trust_remote_code=args.trust_remote_code,
        )
    if args.eos_token is not None:
        choose_eos_token(tokenizer.processing_class, args.eos_token, model)
    added = (
        fit_vocabulary(model, tokenizer_of(tokenizer.processing_class), tokenizer.added) if tokenizer.is_cloned else []
    )
    if peft_config is None:
        cast_given_adapters(model)
        return model
    checkpointing = args.gradient_checkpointing is not False  # unset is decided when training starts
    model = prepare_quantized(model, activation_checkpointing=checkpointing)
    return add_adapters(
        model,
        peft_config,
        added_token_ids=added,
        zero_stage=planned_zero_stage(args) or 0,
        activation_checkpointing=checkpointing,
    )


def _init_kwargs(args: SFTConfig) -> dict[str, Any]:
    assert not isinstance(args.model_init_kwargs, str)  # parsed when the arguments were made
    return {**(args.model_init_kwargs or {})}


def check_rows(model: nn.Module, processing_class: Any, train_dataset: Any, eval_dataset: Any) -> None:
    """Raises `ArgumentError` for prepared rows that do not fit the model's tables of tokens and of positions.

    Tokens are read only if the tokenizer has more of them than the embedding has rows; streams are not. In rows of
    several samples each sample has positions of its own.
    """
    splits = [train_dataset, *(eval_dataset.values() if isinstance(eval_dataset, Mapping) else [eval_dataset])]
    _check_vocabulary(model, tokenizer_of(processing_class), splits)
    positions = learned_positions(model)
    longest = max(map(_longest_sample, splits))
    if positions is not None and longest > positions:
        raise ArgumentError(
            f"The longest row has {longest} tokens, and {type(unwrap(model)).__name__} has {positions} positions. Set "
            f"`max_length={positions}`."
        )


def _longest_sample(split: Any) -> int:
    """Returns the tokens of the longest row, or of the longest sample in packed rows; 0 for a stream."""
    if not hasattr(split, "__len__") or SEQ_LENGTHS not in (getattr(split, "column_names", None) or ()):
        return longest_row(split, None) or 0
    columns = split.with_format("arrow", columns=[SEQ_LENGTHS])
    samples = (table[SEQ_LENGTHS].combine_chunks().flatten().to_numpy() for table in columns.iter(batch_size=10_000))
    return max((int(lengths.max(initial=0)) for lengths in samples), default=0)


def _check_vocabulary(model: nn.Module, tokenizer: Any, splits: list[Any]) -> None:
    embedding = getattr(unwrap(model), "get_input_embeddings", None)
    rows = 0 if embedding is None else embedding().weight.shape[0]
    if not 0 < rows < len(tokenizer):  # no row at all: sharded while loading
        return
    highest = max(map(highest_token_id, splits))
    if highest >= rows:
        raise ArgumentError(
            f"The data has the token {tokenizer.convert_ids_to_tokens(highest)!r} (id {highest}), and the model's "
            f"embedding has {rows} rows. Tokens that were added to the tokenizer need rows of their own: call "
            "`model.resize_token_embeddings(len(tokenizer))` before you make the trainer."
        )


def brings_packed_attention(model: nn.Module) -> bool:
    """Returns whether the model was loaded with a FlashAttention, which keeps the samples of a row apart itself."""
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None) or ""
    return "flash" in implementation


def uses_virtual_tokens(model: nn.Module) -> bool:
    """Returns whether PEFT puts learned tokens before each row of a batch (prompt tuning, prefix tuning, ...)."""
    configs = getattr(model, "peft_config", None)
    return isinstance(configs, dict) and any(config.is_prompt_learning for config in configs.values())


def refuse_virtual_tokens(model: nn.Module) -> None:
    """Raises `ArgumentError` for a model that has them: they need a row for each sample."""
    if uses_virtual_tokens(model):
        raise ArgumentError(
            "PEFT puts its virtual tokens before each row of a batch, and `padding_free` (and packing by `bfd`) "
            "make one row of many samples. Set `padding_free=False`, and `packing=False` or "
            "`packing_strategy='wrapped'`."
        )


def can_be_padding_free(model: nn.Module) -> bool:
    """Returns whether batches without padding train the same: the model takes them, and a probe moved no neighbour.

    All processes call it, and learn what the first one found: under FSDP it alone may have read the weights.
    """
    return ranks.broadcast_object(_can_be_padding_free_here(model))


def _can_be_padding_free_here(model: nn.Module) -> bool:
    if uses_virtual_tokens(model) or brings_packed_attention(model) or packed_unsupported_reason(model) is not None:
        return False
    if any(parameter.numel() == 0 or parameter.is_meta for parameter in model.parameters()):
        return False  # not here, or divided while it was loaded
    with use_packed_attention(model):
        try:
            return probe_isolation(model).isolated
        except (ArgumentError, TypeError, ValueError, RuntimeError, AttributeError, LookupError):
            return False  # models of images and text refuse such a batch in many ways


def prove_isolation(model: nn.Module) -> None:
    """Raises `ArgumentError` in all processes unless a probe shows that samples of a packed row are kept apart.

    What counts is what the first process finds, which has the weights also where FSDP leaves the others without. A
    model that ZeRO-3 divided while it was loaded is made whole in all processes, a module at a time.
    """
    problem = None
    if not any(parameter.is_meta for parameter in model.parameters()):
        try:
            with whole_where_used(model):
                require_isolation(model)
        except ArgumentError as error:
            problem = str(error)
    problem = ranks.broadcast_object(problem)
    if problem is not None:
        raise ArgumentError(problem)
