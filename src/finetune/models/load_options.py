"""The options a model is loaded with (`model_init_kwargs`, `quantization_config`): which act, and where."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

# Options of `from_pretrained` that say where the files of a model are.
_PLACES = (
    *("revision", "subfolder", "token", "cache_dir", "local_files_only", "force_download", "proxies"),
    *("code_revision", "gguf_file"),
)


def options_of_config(model_init_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns those of the options that the configuration of the model is read with too."""
    given = model_init_kwargs or {}
    return {name: given[name] for name in _PLACES if given.get(name) is not None}


def warn_of_unused_options(
    model: object, model_init_kwargs: Mapping[str, Any] | None, quantization_config: Any
) -> None:
    """Warns, once, of options that say how to load a model, when `model` is loaded already."""
    given = {"model_init_kwargs": bool(model_init_kwargs), "quantization_config": quantization_config is not None}
    named = " and ".join(f"`{name}`" for name, is_given in given.items() if is_given)
    if not named:
        return
    warnings.warn(
        f"`model` is loaded already ({type(model).__name__}): no effect of {named}. Pass `model` as a path or Hub id, "
        f"or drop {named}.",
        stacklevel=4,
    )


def without_device_map(model_init_kwargs: Mapping[str, Any], args: Any) -> dict[str, Any]:
    """Returns the options without `device_map`, with a warning, where several processes train or DeepSpeed does.

    There each process holds the model, or its shard, on one device; a map would spread each copy over all devices.
    """
    options = dict(model_init_kwargs)
    if options.get("device_map") is None or (args.world_size == 1 and args.deepspeed_plugin is None):
        return options
    who = "DeepSpeed places the model" if args.deepspeed_plugin is not None else f"{args.world_size} processes train"
    warnings.warn(
        f"`model_init_kwargs['device_map']` is {options.pop('device_map')!r}, and {who}: it is left out, each process "
        "uses its own device. Drop it, or start one process.",
        stacklevel=4,
    )
    return options
