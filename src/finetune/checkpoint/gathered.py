"""Whole weights of a model that FSDP or DeepSpeed has sharded, cast or wrapped, under the names they had before."""

import contextlib
import functools
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finetune.checkpoint import backends, files
from finetune.models.adapters import unwrap
from finetune.wrappers import is_peft_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Gathered:
    """What `save_model` has to write. `state_dict` is None when the model can be asked itself. `skip`: the shards
    are written with the optimizer, and there is nothing else to write. `engine_format`: DeepSpeed cannot gather
    (`stage3_gather_16bit_weights_on_model_save` is off), so its own format has to do."""

    state_dict: dict[str, Tensor] | None = None
    skip: bool = False
    engine_format: bool = False


def gather_weights(accelerator: Any, model: nn.Module, model_wrapped: Any, *, for_checkpoint: bool) -> Gathered:
    """Returns the whole weights of a sharded model. A collective: called on all processes.

    With `for_checkpoint` a model of FSDP's `SHARDED_STATE_DICT` is not gathered: its shards are the checkpoint.
    """
    if backends.uses_fsdp(accelerator):
        kind = str(accelerator.state.fsdp_plugin.state_dict_type)
        if for_checkpoint and "FULL_STATE_DICT" not in kind:
            return Gathered(skip=True)
        return Gathered(accelerator.get_state_dict(model))
    if backends.uses_deepspeed(accelerator):
        zero3 = model_wrapped.config.get("zero_optimization", {}).get("stage") == 3
        if zero3 and not model_wrapped.zero_gather_16bit_weights_on_model_save():
            logger.warning(
                "`stage3_gather_16bit_weights_on_model_save` is off: the weights are written in DeepSpeed's own "
                "format; `zero_to_fp32.py` beside them makes a model of them."
            )
            return Gathered(engine_format=True)
        if zero3 and backends.has_adapters(model) and backends.accepts_exclusion(model_wrapped):
            gather = model_wrapped._zero3_consolidated_16bit_state_dict
            state_dict = gather(exclude_frozen_parameters=True)
        else:
            state_dict = accelerator.get_state_dict(model_wrapped)
        return Gathered(_with_masters(model_wrapped, state_dict, is_writer=accelerator.is_main_process))
    return Gathered()


def _with_masters(engine: Any, state_dict: dict[str, Tensor] | None, *, is_writer: bool) -> dict[str, Tensor] | None:
    """Returns DeepSpeed's weights with the float32 ones that its optimizer steps, where the model was float32.

    With `bf16` DeepSpeed casts the model itself, so what `state_dict` holds is rounded to 3 digits: an update of less
    than that would be lost when the model is saved. A collective.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    before: dict[str, torch.dtype] = getattr(engine, "weight_types", {})
    names: dict[int, list[str]] = {}
    parameters: dict[int, Any] = {}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        if parameter.requires_grad and before.get(name, parameter.dtype) != parameter.dtype:
            names.setdefault(id(parameter), []).append(name)
            parameters[id(parameter)] = parameter
    for key, parameter in parameters.items():
        master = safe_get_full_fp32_param(parameter)
        if master is None or not is_writer or state_dict is None:
            continue
        whole = master.detach().to("cpu", before[names[key][0]], copy=True)
        state_dict.update({name: whole for name in names[key] if name in state_dict})
    return state_dict


@contextlib.contextmanager
def naming_as_unsharded(model: Any) -> Iterator[None]:
    """Context manager: PEFT finds the names of an adapter's tensors in a model that FSDP1 wraps.

    PEFT looks for them under the names of the modules, which FSDP1 wraps one by one, and would save not a single one.
    For `modules_to_save` it asks each module for its `state_dict`, and needs only the names; under FSDP1 that gathers,
    and the one process that writes would wait for the others for ever.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not any(isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules()):
        yield
        return
    original = model.named_modules

    def named_modules(*args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        for name, module in original(*args, **kwargs):
            yield _without_wrapper(name), module

    holders = [getattr(module, "modules_to_save", None) for module in model.modules()]
    saved: list[Any] = [part for kept in holders if isinstance(kept, nn.ModuleDict) for part in kept.values()]
    model.named_modules = named_modules
    for part in saved:
        part.state_dict = functools.partial(_names_of_tensors, part)
    try:
        yield
    finally:
        del model.named_modules
        for part in saved:
            del part.state_dict


def _names_of_tensors(module: nn.Module) -> dict[str, None]:
    """Returns the names in the `state_dict` of a module that FSDP1 has wrapped, without gathering."""
    volatile = {
        _without_wrapper(f"{name}.{buffer}" if name else buffer)
        for name, part in module.named_modules()
        for buffer in part._non_persistent_buffers_set
    }
    names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    return dict.fromkeys(name for name in map(_without_wrapper, names) if name not in volatile)


def _without_wrapper(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_fsdp_wrapped_module")


def without_wrapper_prefixes(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns `state_dict` without what `torch.compile` (`_orig_mod.`) and DDP (`module.`) put into its names.

    >>> import torch
    >>> list(without_wrapper_prefixes({"module.a": torch.ones(1), "module._orig_mod.b": torch.ones(1)}))
    ['a', 'b']
    >>> list(without_wrapper_prefixes({"module.a": torch.ones(1), "head.b": torch.ones(1)}))
    ['module.a', 'head.b']
    """
    if state_dict and all(name.startswith("module.") for name in state_dict):
        state_dict = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in state_dict.items()}


def without_tied_copies(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Returns gathered weights with one name for each tied one: gathering copies, so they no longer share memory.

    A name goes only if its tensor equals the one it is tied to, bit for bit. `save_pretrained` of a model in one
    piece leaves the same names out.
    """
    tied = dict(getattr(unwrap(model), "all_tied_weights_keys", None) or {})
    prefix = "base_model.model." if is_peft_model(unwrap(model, keep_adapters=True)) else ""
    copies = {
        prefix + name
        for name, source in tied.items()
        if prefix + name in state_dict
        and prefix + source in state_dict
        and files.same_bits(state_dict[prefix + name], state_dict[prefix + source])
    }
    return {name: tensor for name, tensor in state_dict.items() if name not in copies}
