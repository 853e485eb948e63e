"""The formats of FSDP and DeepSpeed: the one module that knows these two.

Their own loaders would unpickle, so they run with torch forced to safe loading, and with a list of the classes that
their files legitimately name.
"""

import contextlib
import inspect
import io
import logging
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune import environment
from finetune.checkpoint import layout
from finetune.checkpoint.files import numpy_array_globals
from finetune.checkpoint.writer import agreeing
from finetune.distributed.accelerator import fsdp_version, zero_stage
from finetune.errors import CheckpointError, first_line
from finetune.models.adapters import unwrap
from finetune.wrappers import is_peft_model, unwrap_optimizer

logger = logging.getLogger(__name__)


def uses_fsdp(accelerator: Any) -> bool:
    """Returns whether the model is sharded by FSDP, version 1 or 2."""
    return fsdp_version(accelerator) is not None


def uses_deepspeed(accelerator: Any) -> bool:
    """Returns whether DeepSpeed owns model and optimizer."""
    return zero_stage(accelerator) is not None


def is_sharded(accelerator: Any) -> bool:
    """Returns whether all processes have to take part in saving the model."""
    return uses_deepspeed(accelerator) or uses_fsdp(accelerator)


def save_sharded(
    output_dir: str | os.PathLike[str], *, accelerator: Any, model: nn.Module, model_wrapped: Any, optimizer: Any
) -> bool:
    """Returns whether model and optimizer are sharded, after writing the shards of both. A collective.

    Raises:
        CheckpointError: a write failed, here or on another process.
    """
    folder = Path(output_dir)
    if uses_deepspeed(accelerator):
        with agreeing():
            _save_deepspeed(folder, model, model_wrapped)
    elif uses_fsdp(accelerator):
        from accelerate.utils import save_fsdp_model, save_fsdp_optimizer

        plugin = accelerator.state.fsdp_plugin
        with agreeing():
            save_fsdp_model(plugin, accelerator, model, str(folder), **_adapter_only(save_fsdp_model, accelerator))
        with agreeing():
            save_fsdp_optimizer(plugin, accelerator, optimizer, model, str(folder))
    else:
        return False
    return True


def load_sharded_optimizer(folder: Path, *, accelerator: Any, model: nn.Module, optimizer: Any) -> bool:
    """Returns whether the optimizer is sharded, after restoring it. DeepSpeed restored it with the weights."""
    if uses_fsdp(accelerator):
        from accelerate.utils import load_fsdp_optimizer

        if not layout.sharded_parts(folder):
            raise CheckpointError(
                f"`{folder}` was not written by FSDP: no `pytorch_model_fsdp*` in it. Resume with the same distributed "
                "setup, or pass another `resume_from_checkpoint`."
            )
        plugin = accelerator.state.fsdp_plugin
        if fsdp_version(accelerator) == 1 and "FULL_STATE_DICT" not in str(plugin.state_dict_type):
            # What is loaded are the shards of what the optimizer holds, and a new one holds nothing.
            from torch.distributed.checkpoint.state_dict import _init_optim_state

            _init_optim_state(unwrap_optimizer(optimizer))
        with safe_loading(folder), restoring(folder):
            load_fsdp_optimizer(
                plugin, accelerator, optimizer, model, str(folder), **_adapter_only(load_fsdp_optimizer, accelerator)
            )  # fmt: skip
        return True
    return uses_deepspeed(accelerator)


def owns_schedule(accelerator: Any, lr_scheduler: Any) -> bool:
    """Returns whether DeepSpeed saves and restores the schedule with its engine."""
    if not uses_deepspeed(accelerator):
        return False
    from accelerate.utils import DeepSpeedSchedulerWrapper

    return isinstance(lr_scheduler, DeepSpeedSchedulerWrapper)


def save_engine_weights(output_dir: str | os.PathLike[str], model: nn.Module, model_wrapped: Any) -> None:
    """Writes the weights in DeepSpeed's own format."""
    with agreeing():
        _save_deepspeed(Path(output_dir), model, model_wrapped)


def load_sharded_weights(
    checkpoint: str | os.PathLike[str], *, accelerator: Any, model: Any, model_wrapped: Any
) -> None:
    """Loads weights (DeepSpeed: optimizer and schedule too) that were written sharded, into the prepared model.

    Raises:
        CheckpointError: the folder has no such format, or names classes that are not loaded.
    """
    folder = Path(checkpoint)
    with safe_loading(folder), restoring(folder):
        if uses_deepspeed(accelerator):
            if not any(folder.glob("global_step*")):
                raise CheckpointError(
                    f"`{folder}` was not written by DeepSpeed: no `global_step*` folder. Resume with the same "
                    "distributed setup, or pass another `resume_from_checkpoint`."
                )
            loaded, _ = model_wrapped.load_checkpoint(str(folder), load_module_strict=not has_adapters(model))
            if loaded is None:
                raise CheckpointError(f"DeepSpeed found nothing to load in `{folder}`.")
        else:
            from accelerate.utils import load_fsdp_model

            plugin = accelerator.state.fsdp_plugin
            load_fsdp_model(
                plugin, accelerator, model_wrapped, str(folder), **_adapter_only(load_fsdp_model, accelerator)
            )


@contextlib.contextmanager
def safe_loading(folder: Path) -> Iterator[None]:
    """Makes every `torch.load` in the block a safe one, whatever its caller asked for.

    Raises:
        CheckpointError: a metadata file of `torch.distributed.checkpoint`, which is a pickle, names something else
            than that module's own classes.
    """
    for path in folder.rglob(".metadata"):
        _MetadataReader.check(path)
    with environment.temporarily("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1"):
        with torch.serialization.safe_globals([*_deepspeed_globals(), *numpy_array_globals()]):
            yield


class _MetadataReader(pickle.Unpickler):
    """Resolves only what `torch.distributed.checkpoint` puts into its metadata: descriptions, no code."""

    ALLOWED = frozenset(
        {("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch.serialization", "_get_layout")}
        | {("torch.distributed.checkpoint.filesystem", "_StoragePrefix"), ("collections", "OrderedDict")}
        | {("pathlib", name) for name in ("Path", "PosixPath", "PurePosixPath", "PureWindowsPath")}
        | {("pathlib._local", name) for name in ("Path", "PosixPath", "PurePosixPath", "PureWindowsPath")}
        | {("torch.distributed.checkpoint.metadata", name) for name in (
            "Metadata", "TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING", "ChunkStorageMetadata",
            "BytesStorageMetadata", "MetadataIndex", "StorageMeta")}
    )  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype))
        if is_dtype or (module, name) in self.ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names `{module}.{name}`")

    @classmethod
    def check(cls, path: Path) -> None:
        try:
            cls(io.BytesIO(path.read_bytes())).load()
        except Exception as error:
            raise CheckpointError(
                f"`{path}` cannot be loaded safely ({type(error).__name__}: {error}); it is damaged or not what FSDP "
                "wrote. Pass another `resume_from_checkpoint`."
            ) from error


_MISFITS = (
    *(ValueError, LookupError, TypeError, RuntimeError, AttributeError, OSError, AssertionError),
    pickle.UnpicklingError,
)


@contextlib.contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Turns what loaders raise about content that does not fit into a `CheckpointError` about `path`."""
    try:
        yield
    except CheckpointError:
        raise
    except _MISFITS as e:
        raise CheckpointError(
            f"`{path}` does not fit this run ({type(e).__name__}: {first_line(e)}). "
            "Resume with the model, `optim` and `lr_scheduler_type` it was saved with, or pass another "
            "`resume_from_checkpoint`."
        ) from e


def _save_deepspeed(folder: Path, model: nn.Module, engine: Any) -> None:
    exclude = accepts_exclusion(engine) and has_adapters(model)
    with _failing_at_the_end(engine):
        engine.save_checkpoint(str(folder), **({"exclude_frozen_parameters": True} if exclude else {}))


@contextlib.contextmanager
def _failing_at_the_end(engine: Any) -> Iterator[None]:
    """Raises a failed write of DeepSpeed at the end of the block only: the other processes wait in its barriers."""
    files = getattr(engine, "checkpoint_engine", None)
    errors: list[Exception] = []

    def catching(write: Callable[..., Any]) -> Callable[..., Any]:
        def attempt(*args: Any, **kwargs: Any) -> Any:
            try:
                return write(*args, **kwargs)
            except Exception as error:
                errors.append(error)

        return attempt

    names = [name for name in ("save", "makedirs") if hasattr(files, name)]
    for name in names:
        setattr(files, name, catching(getattr(files, name)))
    try:
        yield
    finally:
        for name in names:
            delattr(files, name)
    if errors:
        raise errors[0]


def has_adapters(model: nn.Module) -> bool:
    # What is loaded into is the engine around the model, and the adapter's checkpoint lacks the frozen weights.
    return is_peft_model(unwrap(model, keep_adapters=True))


def accepts_exclusion(engine: Any) -> bool:
    return "exclude_frozen_parameters" in inspect.signature(engine.save_checkpoint).parameters


def _adapter_only(function: Any, accelerator: Any) -> dict[str, bool]:
    # Under FSDP1 PEFT finds none of the adapter's tensors (`gathered.naming_as_unsharded`); nobody would notice.
    wanted = fsdp_version(accelerator) != 1
    return {"adapter_only": wanted} if "adapter_only" in inspect.signature(function).parameters else {}


def _deepspeed_globals() -> list[Any]:
    if "deepspeed" not in sys.modules:
        return []
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
