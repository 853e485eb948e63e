"""Memory: what a phase used, and what lies in it (parameters, gradients, optimizer state)."""

import gc
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLING_SECONDS = 0.005
# Tensors of a parameter's size that an optimizer keeps for it, for classes whose state appears in the first step.
_STATE_TENSORS = {"Adam": 2, "AdamW": 2, "NAdam": 2, "RAdam": 2, "Adamax": 2, "Lion": 1, "RMSprop": 1, "Adadelta": 2}


def rss_bytes() -> int:
    """Returns the resident memory of this process now."""
    import psutil

    return psutil.Process().memory_info().rss


def peak_rss_bytes() -> int:
    """Returns the highest resident memory of this process since it started."""
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset  # pyright: ignore[reportAttributeAccessIssue]
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_bytes() -> int | None:
    """Returns the highest memory torch allocated on the current accelerator; None where it does not count it."""
    device = _counting_device()
    return None if device is None else int(device.max_memory_allocated())


def _counting_device() -> Any:
    """Returns `torch.cuda`, `torch.xpu`, ... when present and counting, else None (CPU; MPS keeps no peak)."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    module = getattr(torch, accelerator.type, None) if accelerator is not None else None
    return module if module is not None and hasattr(module, "max_memory_allocated") else None


class MemoryTracker:
    """Measures phases and writes them into metrics, with the names of `transformers.TrainerMemoryTracker`.

    `{stage}_mem_cpu_alloc_delta` is the memory a phase kept, in bytes; `..._peaked_delta` what it needed on top for
    a while. Stages are `init`, `train`, `eval` and `test`. A phase inside another one (evaluation during
    training) belongs to the outer one. Resident memory is sampled every 5 ms by a sleeping thread.
    """

    def __init__(self, skip: bool = True) -> None:
        self.skip = skip
        self._stages: list[str] = []
        self._done: dict[str, dict[str, int]] = {}
        self._before_init: dict[str, int] = {}
        self._sampler: _PeakSampler | None = None

    def start(self, stage: str) -> None:
        """Begins `stage`. Starting the outermost stage again (an earlier run ended in an error) restarts it."""
        if self.skip:
            return
        if self._stages and self._stages[0] == stage:
            self._stages = []
            if self._sampler is not None:
                self._sampler.stop()
        self._stages.append(stage)
        if len(self._stages) > 1:
            return
        gc.collect()
        self._device = _counting_device()
        if self._device is not None:
            self._device.empty_cache()
            self._device.reset_peak_memory_stats()
            self._device_before = int(self._device.memory_allocated())
        self._before = rss_bytes()
        self._sampler = _PeakSampler()
        if stage == "init":
            self._before_init = {"before_init_mem_cpu": self._before}
            if self._device is not None:
                self._before_init["before_init_mem_gpu"] = self._device_before

    def stop(self, metrics: dict[str, Any] | None = None) -> None:
        """Ends the innermost stage; adds what it used, and before it `init`, to `metrics` unless it was nested."""
        if self.skip or not self._stages:
            return
        stage = self._stages.pop()
        if self._stages or self._sampler is None:
            return
        peak = self._sampler.stop()
        self._sampler = None
        gc.collect()
        now = rss_bytes()
        measured = {
            f"{stage}_mem_cpu_alloc_delta": now - self._before,
            f"{stage}_mem_cpu_peaked_delta": max(0, peak - now),
        }
        if self._device is not None:
            device_now, device_peak = int(self._device.memory_allocated()), int(self._device.max_memory_allocated())
            measured[f"{stage}_mem_gpu_alloc_delta"] = device_now - self._device_before
            measured[f"{stage}_mem_gpu_peaked_delta"] = max(0, device_peak - device_now)
        if metrics is None:
            self._done[stage] = measured
            return
        metrics.update(self._done.pop("init", {}))
        metrics.update(measured)
        metrics.update(self._before_init)
        self._before_init = {}


class _PeakSampler:
    """Watches resident memory until `stop`, which returns the highest value seen."""

    def __init__(self) -> None:
        self._peak = rss_bytes()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-peak", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopped.wait(_SAMPLING_SECONDS):
            self._peak = max(self._peak, rss_bytes())

    def stop(self) -> int:
        self._stopped.set()
        self._thread.join()
        return max(self._peak, rss_bytes())


@dataclass(frozen=True)
class MemoryUse:
    """What the tensors of a training occupy on this process, in bytes; shared storage counts once.

    `dtypes` says how many parameter elements there are of each dtype, `live` ones of this process.
    """

    parameters: int
    gradients: int
    optimizer: int
    buffers: int
    dtypes: dict[str, int]

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.buffers


def memory_use(model: nn.Module, optimizer: Any = None) -> MemoryUse:
    """Returns what `model` and `optimizer` hold now. Reads sizes only, never values.

    >>> layer = nn.Linear(3, 2)
    >>> memory_use(layer).parameters, memory_use(layer).dtypes
    (32, {'float32': 8})
    """
    seen: set[int] = set()
    parameters = list(model.parameters())
    dtypes: dict[str, int] = {}
    for parameter in parameters:
        name = str(parameter.dtype).removeprefix("torch.")
        dtypes[name] = dtypes.get(name, 0) + parameter.numel()
    return MemoryUse(
        parameters=bytes_of(parameters, seen),
        gradients=bytes_of((p.grad for p in parameters if p.grad is not None), seen),
        optimizer=bytes_of(tensors_in(dict(getattr(optimizer, "state", None) or {})), seen),
        buffers=bytes_of(model.buffers(), seen),
        dtypes=dtypes,
    )


def expected_state_bytes(model: nn.Module, optimizer: Any) -> int | None:
    """Returns the state that an unwrapped optimizer will have after its first step; None if its class is unknown."""
    tensors = _STATE_TENSORS.get(type(optimizer).__name__)
    if tensors is None:
        return None
    return sum(tensors * p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def bytes_of(tensors: Iterable[Tensor], seen: set[int]) -> int:
    """Returns the memory of `tensors` on this process; memory that is in `seen` counts no more."""
    total = 0
    for tensor in (part for each in tensors for part in stored(each)):
        if tensor.device.type == "meta":
            continue
        storage = tensor.untyped_storage()
        # An empty storage (freed by FSDP) has address 0, which is not shared by anything.
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def stored(tensor: Tensor) -> Iterator[Tensor]:
    """Yields the tensors in which `tensor` has its values on this process: its shard, or what a quantised one holds."""
    local: Any = getattr(tensor, "to_local", None)
    tensor = local() if local is not None else tensor
    names: Any = getattr(tensor, "__tensor_flatten__", None)
    if names is None:
        yield tensor
        return
    for name in names()[0]:
        yield from stored(getattr(tensor, name))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yields the tensors in nested dictionaries, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for member in value.values():
            yield from tensors_in(member)
    elif isinstance(value, list | tuple):
        for member in value:
            yield from tensors_in(member)
