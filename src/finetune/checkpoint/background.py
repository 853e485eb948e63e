"""What a save in the background may do: whether it may be one, what it may copy late, how much it takes."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from finetune.distributed.memory import free_bytes
from finetune.wrappers import is_peft_model, unwrap_optimizer


def saves_in_background(trainer: Any) -> bool:
    """Returns whether the next checkpoint is written while training goes on: `async_save`, or what is safe if unset.

    Unset, it is when one process trains, the copy takes at most half of the free memory, and nothing reads the folder
    as soon as `_save_checkpoint` returns: no push to the Hub, no callback with an `on_save`, no override.
    """
    args = trainer.args
    if args.async_save is not None:
        return args.async_save
    if args.world_size > 1 or args.push_to_hub or not _is_own(type(trainer)._save_checkpoint):
        return False
    if not all(_is_own(type(callback).on_save) for callback in trainer.callback_handler.callbacks):
        return False
    needed = bytes_needed(trainer.model, trainer.optimizer, weights_only=args.save_only_model)
    return needed <= (free_bytes(torch.device("cpu")) + trainer._writer.held_bytes) // 2


def changes_in_step(trainer: Any) -> frozenset[int]:
    """Returns the storages (their addresses) that nothing but the optimizer's step will change.

    Those of the trained weights and of the optimizer's state, if the optimizer is one of torch's and no code of the
    user runs between a save and the next step: no callback, no trainer class, no loss function. Else nothing.
    """
    optimizer: Any = unwrap_optimizer(trainer.optimizer)
    own = [type(trainer), *(type(callback) for callback in trainer.callback_handler.callbacks)]
    foreign = trainer.compute_loss_func is not None or not all(kind.__module__.startswith("finetune.") for kind in own)
    if foreign or trainer.args.world_size > 1 or not type(optimizer).__module__.startswith("torch.optim."):
        return frozenset()
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    tensors += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return frozenset(tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.dim() > 0)


def _is_own(method: Any) -> bool:
    """Whether a method is this package's, or the one of transformers' base class that does nothing."""
    return method.__module__.startswith("finetune.") or method.__qualname__.startswith("TrainerCallback.")


def bytes_needed(model: nn.Module, optimizer: Any, *, weights_only: bool) -> int:
    """Returns about how many bytes the next checkpoint takes: weights to be saved plus optimizer state, plus 1 MiB.

    Before the first step there is no optimizer state yet, and two values per trained parameter are assumed.
    """
    peft = is_peft_model(model)
    parameters = [p for p in model.parameters() if p.requires_grad or not peft]
    needed = _num_bytes(parameters) + (1 << 20)
    if weights_only or optimizer is None:
        return needed
    state = getattr(optimizer, "state", {})
    tensors = [t for entry in state.values() if isinstance(entry, dict) for t in entry.values()]
    held = _num_bytes([t for t in tensors if isinstance(t, torch.Tensor)])
    return needed + (held or 2 * _num_bytes([p for p in parameters if p.requires_grad]))


def _num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
