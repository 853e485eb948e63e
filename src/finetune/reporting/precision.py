"""Which number formats a run really uses, seen in its first update; another than the one asked for is an error."""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import ArgumentError
from finetune.optim.fused_backward import unwrap as unwrap_optimizer
from finetune.reporting.memory import tensors_in


class LivePrecision:
    """Watches the first micro-batch and the first update of a run, then leaves no trace.

    `text` says, after that, in which formats parameters, linear layers, gradients and optimizer state are.
    """

    def __init__(self, args: Any) -> None:
        self._asked = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        self._argument = "bf16" if args.bf16 else "fp16"
        # Hooks inside a compiled region would be compiled with it.
        self._watches = not getattr(args, "torch_compile", False)
        self._computed: Counter[torch.dtype] = Counter()
        self._gradients = self._parameters = self._state = ""

    @contextlib.contextmanager
    def micro_batch(self, model: nn.Module) -> Iterator[None]:
        """Within, notes what linear layers return.

        Raises:
            ArgumentError: none of them computed in the format that `bf16` or `fp16` asks for.
        """
        if not self._watches:
            yield
            return
        self._watches = False

        def note(_: Any, __: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                self._computed[output.dtype] += 1

        layers = [m for m in model.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
        handles = [layer.register_forward_hook(note) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if self._asked is not None and self._computed and self._asked not in self._computed:
            raise ArgumentError(
                f"`{self._argument}=True` asks for {_name(self._asked)}, but every linear layer computed in "
                f"{', '.join(_name(dtype) for dtype in self._computed)}: the loss is not computed through the model "
                f"that was wrapped for mixed precision (an overridden `compute_loss` that calls a module inside it?). "
                f"Call the `model` that `compute_loss` is given, or set `{self._argument}=False`."
            )

    def before_update(self, model: nn.Module, optimizer: Any) -> None:
        """Notes parameters and gradients; GaLore's projections count as such."""
        held = getattr(unwrap_optimizer(optimizer), "backward", None)
        projections = () if held is None else held.projections()
        self._parameters = _formats(model.parameters())
        self._gradients = _formats([*(p.grad for p in model.parameters() if p.grad is not None), *projections])

    def after_update(self, model: nn.Module, optimizer: Any) -> None:
        """Notes the optimizer's state; counters are left out."""
        state = dict(getattr(unwrap_optimizer(optimizer), "state", None) or {})
        self._state = _formats(tensor for tensor in tensors_in(state) if tensor.dim() > 0)

    @property
    def text(self) -> str:
        computed = ", ".join(_name(dtype) for dtype, _ in self._computed.most_common())
        parts = [
            ("parameters", self._parameters),
            ("linear layers", computed),
            ("gradients", self._gradients),
            ("optimizer", self._state),
        ]
        return "; ".join(f"{what} {formats}" for what, formats in parts if formats)


def _formats(tensors: Iterable[Tensor]) -> str:
    counts: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        counts[tensor.dtype] += tensor.numel()
    return ", ".join(_name(dtype) for dtype, _ in counts.most_common())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
