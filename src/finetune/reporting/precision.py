"""Which number formats a run really uses, seen in its first update; another than the one asked for is an error."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import ArgumentError
from finetune.reporting.memory import stored, tensors_in
from finetune.wrappers import unwrap_optimizer


class LivePrecision:
    """Watches the first micro-batch and the first update of a run, then leaves no trace.

    `text` says, after that, in which formats parameters, linear layers, gradients and optimizer state are; `announce`
    is called with it once.
    """

    def __init__(self, args: Any, announce: Callable[[str], None] | None = None) -> None:
        # A launcher may ask for mixed precision in place of an argument.
        mixed = getattr(args, "mixed_precision", None) or ("bf16" if args.bf16 else "fp16" if args.fp16 else "no")
        self._asked = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}.get(str(mixed))
        self._argument = str(mixed)
        self._optim = str(getattr(getattr(args, "optim", ""), "value", getattr(args, "optim", "")))
        self._announce = announce
        # Hooks inside a compiled region would be compiled with it.
        self._watches = not getattr(args, "torch_compile", False)
        self._computed: Counter[torch.dtype] = Counter()
        self._gradients = self._parameters = self._state = ""

    @contextlib.contextmanager
    def micro_batch(self, model: nn.Module) -> Iterator[None]:
        """Context manager: notes what linear layers return.

        Raises:
            ArgumentError: none of them computed in the format that `bf16` or `fp16` asks for; or, without these, none
                computed in float32 although all weights are.
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
        self._check_computed(model)

    def _check_computed(self, model: nn.Module) -> None:
        if self._asked is None or not self._computed or self._asked in self._computed:
            return
        found = ", ".join(_name(dtype) for dtype in self._computed)
        if self._asked is not torch.float32:
            raise ArgumentError(
                f"`{self._argument}=True` asks for {_name(self._asked)}, but every linear layer computed in {found}: "
                "the loss is not computed through the model that was wrapped for mixed precision (an overridden "
                "`compute_loss` that calls a module inside it?). Call the `model` that `compute_loss` is given, or set "
                f"`{self._argument}=False`."
            )
        if {p.dtype for p in model.parameters()} == {torch.float32}:
            raise ArgumentError(
                f"The weights are float32 and neither `bf16` nor `fp16` is set, but every linear layer computed in "
                f"{found}: something switched autocast on. Set `bf16=True` or `fp16=True` if that is what you want, or "
                "leave `torch.autocast` out of the training."
            )

    def before_update(self, model: nn.Module, optimizer: Any) -> None:
        """Notes parameters and gradients; GaLore's projections count as such."""
        held = getattr(unwrap_optimizer(optimizer), "backward", None)
        projections = () if held is None else held.projections()
        self._parameters = _formats(model.parameters())
        self._gradients = _formats([*(p.grad for p in model.parameters() if p.grad is not None), *projections])

    def after_update(self, model: nn.Module, optimizer: Any) -> None:
        """Notes the optimizer's state without its counters, and announces everything that was noted.

        Raises:
            ArgumentError: `optim` names an optimizer with an 8- or 4-bit state, and none of it is.
        """
        state = dict(getattr(unwrap_optimizer(optimizer), "state", None) or {})
        parts = [part for each in tensors_in(state) if each.dim() > 0 for part in stored(each)]
        self._state = _formats(parts)
        low = any(bits in self._optim for bits in ("8bit", "4bit"))
        # Shards may be too small to be quantised on one rank only, which must not stop alone.
        whole = not any(hasattr(p, "device_mesh") or hasattr(p, "ds_id") for p in model.parameters())
        if low and whole and parts and all(part.dtype.itemsize > 1 for part in parts):
            raise ArgumentError(
                f"`optim={self._optim}` asks for a state of few bits, but all of it is {self._state}: every trained "
                "weight is too small to be quantised (fewer than 4,096 values, or an embedding). Set "
                "`optim=adamw_torch`, which is exact and here as small."
            )
        if self._announce is not None:
            self._announce(self.text)

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
