"""A path or Hub id to a model or tokenizer, with one clear error when that is not possible."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from finetune.errors import ArgumentError, ModelLoadError, nearest, one_line
from finetune.models.architecture import CAUSAL, language_model_class, takes_images
from finetune.models.load_options import options_of_config, warn_of_unused_options
from finetune.models.paths import check_model_path, refuse_adapter_folder

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
# A head that the checkpoint lacks is ordinary (classification); most of the weights missing is a wrong folder.
_MISSING_WEIGHTS_LIMIT = 0.5


def load_model(
    model: str | os.PathLike[str] | nn.Module,
    *,
    auto_class: str | type | None = None,
    model_init_kwargs: Mapping[str, Any] | None = None,
    dtype: str | torch.dtype | None = None,
    quantization_config: Any = None,
    trust_remote_code: bool = False,
) -> Any:
    """Returns the model that `model` names, or `model` itself if it is one already.

    Weights are float32 unless `dtype` or `model_init_kwargs["dtype"]` says otherwise, as in TRL: mixed precision
    computes in bfloat16 and keeps float32 masters. `auto_class` is a class with `from_pretrained`, or its name in
    transformers; None takes the one that keeps the whole checkpoint (`models/architecture.py`). Nothing is placed on a
    device here except by a `device_map`.

    Raises:
        ModelLoadError: the folder or id cannot be read, holds an adapter alone, or its weights belong to another model.
        ArgumentError: `dtype` is unknown, or an option is given twice.
    """
    kwargs = dict(model_init_kwargs or {})
    if isinstance(model, nn.Module):
        warn_of_unused_options(model, kwargs, quantization_config)
        return model
    name = os.fspath(model)
    if quantization_config is not None:
        _set_once(kwargs, "quantization_config", quantization_config)
    if dtype is not None:
        _set_once(kwargs, "dtype", dtype)
    kwargs["dtype"] = parse_dtype(kwargs.get("dtype", kwargs.pop("torch_dtype", None)))
    kwargs.setdefault("trust_remote_code", trust_remote_code)
    check_model_path(name)
    refuse_adapter_folder(name)
    loader = _auto_class(_class_of(name, kwargs) if auto_class is None else auto_class)
    try:
        loaded = loader.from_pretrained(name, output_loading_info=True, **kwargs)
    except Exception as error:
        raise _load_error("model", name, error) from error
    found, info = loaded if isinstance(loaded, tuple) else (loaded, {})
    _check_weights(found, info, name)
    _forget_unused_conversions(found)
    return found


def _forget_unused_conversions(model: Any) -> None:
    """Keeps of the renamings that saving reverts those that renamed a weight of the checkpoint.

    transformers does so itself, but not under ZeRO-3: there BERT would be saved with `LayerNorm.gamma`, whatever it was
    loaded with.
    """
    known = getattr(model, "_weight_conversions", None)
    if isinstance(known, list) and all(hasattr(each, "was_used") for each in known):
        model._weight_conversions = [each for each in known if each.was_used()]


def load_config(model: str | os.PathLike[str], *, trust_remote_code: bool = False, **kwargs: Any) -> PretrainedConfig:
    """Returns the configuration of a model without its weights: the cheap first check of a path or id.

    Raises `ModelLoadError` as `load_model` does.
    """
    from transformers import AutoConfig

    name = os.fspath(model)
    check_model_path(name)
    refuse_adapter_folder(name)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **kwargs)
    except Exception as error:
        raise _load_error("model", name, error) from error


def load_tokenizer(
    model_or_path: str | os.PathLike[str] | nn.Module,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> PreTrainedTokenizerBase:
    """Returns the tokenizer stored beside a model, given the path, the Hub id, or the loaded model.

    A loaded model remembers where it came from (`config._name_or_path`); one built from a config does not, and then
    the tokenizer has to be passed. Raises `ModelLoadError`.
    """
    from transformers import AutoTokenizer

    name = _origin(model_or_path)
    check_model_path(name)
    options = {"revision": revision} if revision is not None else {}
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **options, **kwargs)
    except Exception as error:
        raise _load_error("tokenizer", name, error) from error


def load_processing_class(
    model_or_path: str | os.PathLike[str] | nn.Module,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Returns what turns rows into tokens: the tokenizer, or the processor of a model that takes images too.

    Where the processor cannot be made (often a package is missing), a warning says why, and the tokenizer is returned:
    text needs no more, but the folder that is saved will have no processor. Raises `ModelLoadError` without a
    tokenizer.
    """
    options = {} if revision is None else {"revision": revision}
    if _has_processor(model_or_path, trust_remote_code, options):
        from transformers import AutoProcessor

        name = _origin(model_or_path)
        try:
            found: Any = AutoProcessor.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
            if hasattr(found, "get_vocab") or hasattr(found, "tokenizer"):
                return found
            cause = f"{type(found).__name__} has no tokenizer"
        except Exception as error:
            cause = f"{type(error).__name__}: {one_line(error)}"
        warnings.warn(
            f"The processor of {name!r} cannot be made ({cause}), so its tokenizer is used: for rows of text that is "
            "enough, but what is saved will have no processor. Install what is missing, or pass `processing_class`.",
            stacklevel=4,
        )
    return load_tokenizer(model_or_path, trust_remote_code=trust_remote_code, **options)


def _has_processor(model_or_path: Any, trust_remote_code: bool, options: dict[str, Any]) -> bool:
    if isinstance(model_or_path, nn.Module):
        return takes_images(getattr(model_or_path, "config", None))
    try:
        return takes_images(load_config(model_or_path, trust_remote_code=trust_remote_code, **options))
    except ModelLoadError:  # a folder without configuration may hold a tokenizer all the same
        return False


def _class_of(name: str, kwargs: Mapping[str, Any]) -> str:
    """Returns the auto class that keeps the whole checkpoint; `CAUSAL`, which says what is wrong, if there is none."""
    config = kwargs.get("config")
    if isinstance(config, (str, os.PathLike)) or config is None:
        options = options_of_config(kwargs)
        try:
            config = load_config(config or name, trust_remote_code=kwargs["trust_remote_code"], **options)
        except ModelLoadError:
            return CAUSAL
    return language_model_class(config)


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | str:
    """Returns a torch dtype or "auto" (as stored in the checkpoint); None is float32.

    >>> parse_dtype("bfloat16"), parse_dtype(None), parse_dtype("auto")
    (torch.bfloat16, torch.float32, 'auto')
    """
    if dtype is None:
        return torch.float32
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    short = str(dtype).removeprefix("torch.")
    short = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}.get(short, short)
    if short not in _DTYPES:
        raise ArgumentError(
            f"`dtype` is {dtype!r}; allowed are {', '.join(map(repr, _DTYPES))}.{nearest(short, _DTYPES)} "
            "It is set by `--dtype` or `model_init_kwargs`."
        )
    return getattr(torch, short)


def _auto_class(auto_class: str | type) -> Any:
    if not isinstance(auto_class, str):
        return auto_class
    import transformers

    found = getattr(transformers, auto_class, None)
    if found is None or not hasattr(found, "from_pretrained"):
        allowed = [name for name in dir(transformers) if name.startswith("AutoModel")]
        raise ArgumentError(
            f"`auto_class` is {auto_class!r}, which transformers does not have.{nearest(auto_class, allowed)}"
        )
    return found


def _set_once(kwargs: dict[str, Any], name: str, value: Any) -> None:
    if name in kwargs and kwargs[name] is not value and kwargs[name] != value:
        raise ArgumentError(
            f"`{name}` is given twice, as an argument and in `model_init_kwargs`, with different values. Keep one."
        )
    kwargs[name] = value


def _origin(model_or_path: Any) -> str:
    if not isinstance(model_or_path, nn.Module):
        return os.fspath(model_or_path)
    name = getattr(getattr(model_or_path, "config", None), "_name_or_path", "") or ""
    if not name:
        raise ModelLoadError(
            f"`model` ({type(model_or_path).__name__}) was built in this process, so there is no folder to read its "
            "tokenizer from. Pass it as `processing_class`."
        )
    return name


def _load_error(what: str, name: str, error: Exception) -> ModelLoadError:
    """Returns one error for the dozen ways in which transformers, safetensors and the Hub client can fail."""
    cause = one_line(error)
    subject = f"Model {name!r}" if what == "model" else f"The {what} of {name!r}"
    if isinstance(error, TypeError) and "unexpected keyword argument" in cause:
        remedy = "Check the spelling of the options it is loaded with (`model_init_kwargs`)."
    elif isinstance(error, ImportError):
        remedy = "Install the missing package."
        if "flash" in cause.lower():
            remedy = "Install the missing package, or set `attn_implementation='sdpa'` (in `model_init_kwargs`)."
    elif Path(name).expanduser().is_dir():
        files = ", ".join(sorted(each.name for each in Path(name).expanduser().iterdir()))
        remedy = f"The folder holds: {files}. Save it again with `save_pretrained`, or copy it again if it was cut off."
    else:
        return ModelLoadError(
            f"{subject} was not found: there is no local folder of that name, and it could not be "
            f"loaded from the Hub ({type(error).__name__}: {cause}). Check the spelling, the network, and `HF_TOKEN` "
            "for gated models; offline (`HF_HUB_OFFLINE=1`) it must be in the cache already."
        )
    return ModelLoadError(f"{subject} cannot be loaded: {type(error).__name__}: {cause.rstrip('.')}. {remedy}")


def _check_weights(model: nn.Module, info: Mapping[str, Any], name: str) -> None:
    missing = {str(key) for key in info.get("missing_keys", ())}
    if not missing:
        return
    sizes = {key: parameter.numel() for key, parameter in model.named_parameters()}
    total = sum(sizes.values())
    share = sum(size for key, size in sizes.items() if key in missing) / total if total else 0.0
    if share > _MISSING_WEIGHTS_LIMIT:
        raise ModelLoadError(
            f"{share:.0%} of the weights of {type(model).__name__} are not in {name!r} and would start at random "
            f"(first: {sorted(missing)[0]}). The weights there belong to another architecture than its config.json "
            "says: check `model`."
        )
