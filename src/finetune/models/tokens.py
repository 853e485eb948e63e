"""Special tokens: the tokenizer, the model's config and its generation config must name the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from finetune.compat import tokenizer_of
from finetune.errors import ArgumentError, nearest
from finetune.models.adapters import unwrap


def align_special_tokens(model: nn.Module, processing_class: Any) -> dict[str, int]:
    """Makes the configs of `model` name the special tokens of the tokenizer; returns what changed.

    Agrees with `align_special_tokens` of transformers' Trainer: a token the tokenizer does not define changes nothing,
    and end-of-sequence ids are only added, because a generation config may stop at several. With a tokenizer whose
    EOS is 7 and a generation config that stops at [2, 5], the result stops at [7, 2, 5].
    """
    tokenizer = tokenizer_of(processing_class)
    base: Any = unwrap(model)
    if getattr(base, "config", None) is None:
        return {}
    config = base.config.get_text_config()
    generation = getattr(base, "generation_config", None)
    changed: dict[str, int] = {}
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        token_id = getattr(tokenizer, name, None)
        if token_id is None or _agrees(config, generation, name, token_id):
            continue
        changed[name] = token_id
        several = name == "eos_token_id"
        declared = getattr(config, name, None)
        setattr(config, name, _first(token_id, declared) if several and isinstance(declared, list) else token_id)
        if generation is not None:
            setattr(generation, name, _first(token_id, getattr(generation, name)) if several else token_id)
    return changed


def choose_pad_token(processing_class: Any, model: nn.Module | None = None, pad_token: str | None = None) -> int:
    """Sets the padding token and returns its id: `pad_token`, else the tokenizer's own, else its EOS.

    Padding by EOS is safe here because padding is masked by position, never by id: an EOS that ends an answer stays
    supervised. The token must be in the vocabulary; none is added silently. The configs of `model` are told.

    Raises `ArgumentError` if there is no such token, or if its row lies outside the model's embedding.
    """
    tokenizer = tokenizer_of(processing_class)
    token = pad_token or tokenizer.pad_token or tokenizer.eos_token
    if token is None:
        raise ArgumentError(
            f"The tokenizer ({type(tokenizer).__name__}) has neither a padding nor an EOS token. Name a token of its "
            "vocabulary with `pad_token`."
        )
    token_id = _known_id(tokenizer, token, "pad_token")
    if tokenizer.pad_token != token:
        tokenizer.pad_token = token
    if model is not None:
        base: Any = unwrap(model)
        rows = base.get_input_embeddings().weight.shape[0]
        if 0 < rows <= token_id:
            raise ArgumentError(
                f"`pad_token` {token!r} has id {token_id}, but the model's embedding has {rows} rows. Name a token "
                "with a smaller id, or add rows with `finetune.models.tokens.add_tokens`."
            )
        base.config.get_text_config().pad_token_id = token_id
        if getattr(base, "generation_config", None) is not None:
            base.generation_config.pad_token_id = token_id
    return token_id


def choose_eos_token(processing_class: Any, eos_token: str, model: nn.Module | None = None) -> int:
    """Makes `eos_token` the end-of-sequence token of tokenizer and model; returns its id.

    Generation keeps the stop tokens it had and gains this one. Raises `ArgumentError` if it is not in the vocabulary.
    """
    tokenizer = tokenizer_of(processing_class)
    token_id = _known_id(tokenizer, eos_token, "eos_token")
    tokenizer.eos_token = eos_token
    if model is not None:
        base: Any = unwrap(model)
        base.config.get_text_config().eos_token_id = token_id
        generation = getattr(base, "generation_config", None)
        if generation is not None:
            generation.eos_token_id = _first(token_id, generation.eos_token_id)
    return token_id


def add_tokens(
    model: nn.Module,
    processing_class: Any,
    tokens: Sequence[str],
    *,
    special: bool = True,
    pad_to_multiple_of: int | None = None,
) -> list[int]:
    """Adds `tokens` to the vocabulary and rows for them to embedding and head; returns the ids that are new.

    Tokens already known are skipped and the embedding never shrinks (many models have spare rows). New rows start at
    the mean of the old ones with their covariance, so the loss does not jump (transformers' `mean_resizing`).

    With 100 tokens, 128 embedding rows and 3 new tokens the result is [100, 101, 102] and the model is unchanged.
    """
    tokenizer = tokenizer_of(processing_class)
    known = tokenizer.get_vocab()
    fresh = [token for token in dict.fromkeys(tokens) if token not in known]
    if not fresh:
        return []
    tokenizer.add_tokens(fresh, special_tokens=special)
    base: Any = unwrap(model)
    if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=pad_to_multiple_of)
    return [int(each) for each in tokenizer.convert_tokens_to_ids(fresh)]


def _known_id(tokenizer: Any, token: str, argument: str) -> int:
    vocabulary = tokenizer.get_vocab()
    if token not in vocabulary:
        raise ArgumentError(
            f"`{argument}` is {token!r}, which is not in the vocabulary of the tokenizer "
            f"({type(tokenizer).__name__}, {len(vocabulary)} tokens).{nearest(token, vocabulary)} Name one of its "
            "tokens, or add it first with `finetune.models.tokens.add_tokens`."
        )
    return int(vocabulary[token])


def _agrees(config: Any, generation: Any, name: str, token_id: int) -> bool:
    return token_id in _as_list(getattr(config, name, None)) and (
        generation is None or token_id in _as_list(getattr(generation, name))
    )


def _as_list(ids: Any) -> list[Any]:
    return ids if isinstance(ids, list) else [ids]


def _first(token_id: int, ids: Any) -> list[int]:
    return [token_id, *(each for each in _as_list(ids) if each is not None and each != token_id)]
