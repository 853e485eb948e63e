"""The memory of one run: predicted before its first step, measured in its first update and at its end."""

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from finetune.files import format_bytes, write_atomically
from finetune.models.adapters import unwrap
from finetune.reporting.memory import bytes_of, expected_state_bytes, peak_device_bytes, tensors_in
from finetune.reporting.memory_estimate import MemoryEstimate, single
from finetune.reporting.planned_step import PlannedStep, mixed_dtype
from finetune.wrappers import is_peft_model, unwrap_optimizer

FILE = "memory_usage.json"
_SHOWN = ("weights", "gradients", "moments", "bases", "activations", "peak")


class RunMemory:
    """Bytes per group on this process. `predicted` and `measured` hold the groups that are known.

    Weights, gradients, moments and bases are always known. With `skip_memory_metrics=False` one process also traces its
    activations and its peak before the run (`planned_step.py`: seconds, more for large models), and measures what
    autograd keeps in the first micro-batch. `finetune plan` does the same for any number of processes.
    """

    def __init__(self, model: nn.Module, optimizer: Any, args: Any) -> None:
        self.predicted: dict[str, int] = _held(model, optimizer)
        self.measured: dict[str, int] = {}
        self.unknown = ""
        measures = not getattr(args, "skip_memory_metrics", True)
        # Hooks of saved tensors would be compiled, and would keep those of offloading from acting.
        others = getattr(args, "torch_compile", False) or getattr(args, "activation_offloading", False)
        self._counts = measures and not others
        self._weights = {storage_of(p) for p in model.parameters()}
        if measures:
            row, self.unknown = _traced(model, args)
            if row is not None:
                self.predicted |= {**row.groups, "peak": row.peak}

    @contextlib.contextmanager
    def micro_batch(self, model: nn.Module) -> Iterator[None]:
        """Context manager: counts what autograd keeps, in the first micro-batch of the run only."""
        if not self._counts:
            yield
            return
        self._counts = False
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            key = storage_of(tensor)
            if key and key not in self._weights:
                kept[key] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            yield
        self.measured["activations"] = sum(kept.values())

    def before_update(self, model: nn.Module, optimizer: Any) -> None:
        """Measures the gradients, GaLore's projections among them. Called before the first update of the run."""
        seen: set[int] = set()
        held = getattr(unwrap_optimizer(optimizer), "backward", None)
        projections = () if held is None else held.projections()
        gradients = (p.grad for p in model.parameters() if p.grad is not None)
        self.measured["gradients"] = bytes_of([*gradients, *projections], seen)

    def after_update(self, model: nn.Module, optimizer: Any) -> None:
        """Nothing: the state is measured at the end."""

    def finish(self, model: nn.Module, optimizer: Any) -> None:
        """Measures what lies there at the end of the run."""
        seen: set[int] = set()
        self.measured["weights"] = bytes_of([*model.parameters(), *model.buffers()], seen)
        bases: list[Tensor] = []
        moments: list[Tensor] = []
        for state in dict(getattr(unwrap_optimizer(optimizer), "state", None) or {}).values():
            for name, value in state.items() if isinstance(state, dict) else ():
                (bases if str(name).startswith("basis") else moments).extend(tensors_in(value))
        self.measured["moments"], self.measured["bases"] = bytes_of(moments, seen), bytes_of(bases, seen)
        device = peak_device_bytes()
        if device is not None:
            self.measured["peak"] = device

    def start_text(self) -> str:
        """Returns the prediction on one line."""
        text = _groups_text(self.predicted)
        if "moments" not in self.predicted:
            text += ", moments known after the first step"
        return f"{text} (predicted)" + (f"; activations not predicted: {self.unknown}" if self.unknown else "")

    def end_text(self) -> str:
        """Returns what was measured on one line."""
        return f"{_groups_text(self.measured)} (measured)"

    def write(self, folder: str) -> None:
        """Writes both sides to `folder/memory_usage.json`, from which `report.html` has its table."""
        content = {"predicted": self.predicted, "measured": self.measured}
        write_atomically(os.path.join(folder, FILE), json.dumps(content, indent=2) + "\n")


def memory_rows(content: dict[str, dict[str, int]]) -> list[dict[str, str]]:
    """Returns the rows of the report's table from what `RunMemory.write` wrote."""
    return [
        {"group": group}
        | {side: format_bytes(content[side][group]) for side in ("predicted", "measured") if group in content[side]}
        for group in _SHOWN
        if any(group in content[side] for side in ("predicted", "measured"))
    ]


def storage_of(tensor: Tensor) -> int:
    """Returns the address of a tensor's memory, 0 if it has none here."""
    local: Any = getattr(tensor, "to_local", None)
    tensor = local() if local is not None else tensor
    return 0 if tensor.device.type == "meta" else tensor.untyped_storage().data_ptr()


def _groups_text(groups: dict[str, int]) -> str:
    shown = [f"{name} {format_bytes(groups[name])}" for name in _SHOWN if groups.get(name)]
    return ", ".join(shown) or "nothing"


def _held(model: nn.Module, optimizer: Any) -> dict[str, int]:
    """Returns the groups that need no trace: what is allocated or follows from the parameters' sizes."""
    inner = unwrap_optimizer(optimizer)
    parameters = list(model.parameters())
    groups = {"weights": bytes_of([*parameters, *model.buffers()], set())}
    trained = [p for p in parameters if p.requires_grad]
    if getattr(inner, "backward", None) is None:
        groups["gradients"] = sum(p.numel() * p.element_size() for p in trained)
    if callable(plan := getattr(inner, "planned_state", None)):
        planned: Any = plan()
        groups |= {name: planned[name] for name in ("moments", "bases", "gradients") if name in planned}
    elif (moments := expected_state_bytes(model, inner)) is not None:
        groups["moments"] = moments
    return groups


def _traced(model: nn.Module, args: Any) -> tuple[MemoryEstimate | None, str]:
    """Returns the traced row of this run, or why it cannot be traced."""
    base: Any = unwrap(model)
    length = getattr(args, "max_length", None)
    reason = ""
    if args.world_size > 1:
        # Making a second optimizer, or a model under ZeRO-3, would talk to processes that are not listening.
        reason = "`finetune plan --num_processes` predicts several processes"
    elif not length:
        reason = "`max_length` gives rows no length"
    elif is_peft_model(unwrap(model, keep_adapters=True)):
        reason = "the model has adapters; `finetune plan --use_peft` knows them"
    elif not hasattr(base, "get_output_embeddings") or not hasattr(getattr(base, "config", None), "model_type"):
        reason = f"{type(base).__name__} is not a language model of transformers"
    if reason:
        return None, reason
    stored = next(base.parameters()).dtype
    try:
        with PlannedStep(base.config, args, stored, autocast=mixed_dtype(args)) as step:
            return single(step.trace()), ""
    except Exception as error:
        # The run itself must not depend on whether every operation of a model has a fake counterpart.
        return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
