"""What training holds in memory, moment by moment: two updates run on fake tensors, which have sizes but no content.

Every tensor's memory is noted when it appears and when it goes, and belongs to one of `GROUPS`. Nothing is allocated
and no device is needed. Kernels are those of the CPU: what a kernel needs inside itself is not seen, nor is what an
allocator rounds up.
"""

import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from finetune.wrappers import clips_its_own_gradients, unwrap_optimizer

# Weights with buffers; gradients with GaLore's projections; moments: all optimizer state but GaLore's bases;
# activations: what the forward pass keeps for the backward pass; temporary: everything else.
GROUPS = ("weights", "gradients", "moments", "bases", "activations", "temporary")


@dataclass(frozen=True)
class MemoryTrace:
    """Bytes of every group over two updates.

    `samples` (moments, groups) holds the moments at which the total had grown; `dtypes` says which number formats the
    optimizer state has, with their elements.
    """

    samples: np.ndarray
    dtypes: dict[str, int]

    def largest(self, group: str) -> int:
        """Returns the most that `group` ever held."""
        return int(self.samples[:, GROUPS.index(group)].max(initial=0))

    def peak(self, factors: dict[str, float] | None = None) -> tuple[int, dict[str, int]]:
        """Returns the largest total, and what each group holds at that moment.

        `factors` scales groups first: `{"moments": 1 / 8}` is the peak when eight ranks share the moments.
        """
        scale = np.array([(factors or {}).get(group, 1.0) for group in GROUPS])
        scaled = self.samples * scale
        at = int(scaled.sum(axis=1).argmax())
        return int(scaled[at].sum()), {group: int(value) for group, value in zip(GROUPS, scaled[at], strict=True)}

    def most(self, *scaled: tuple[str, float], during_pass: bool) -> int:
        """Returns the largest sum of the groups, each times its factor, while activations are kept or while none are.

        Between passes gradients are clipped and weights updated. The first update, which makes the moments, is left
        out.
        """
        moments = self.samples[:, GROUPS.index("moments")]
        passing = self.samples[:, GROUPS.index("activations")] > 0
        rows = self.samples[(passing == during_pass) & (moments == moments.max(initial=0))]
        total = sum(rows[:, GROUPS.index(group)] * factor for group, factor in scaled)
        return int(np.max(total, initial=0))


def trace_updates(
    make_model: Callable[[], nn.Module],
    make_optimizer: Callable[[nn.Module], Any],
    loss_of: Callable[[nn.Module], Tensor],
    *,
    accumulation: int = 1,
    max_grad_norm: float = 1.0,
    fake: bool = True,
) -> MemoryTrace:
    """Returns the memory of two updates: forward, backward, clipping, step, gradients dropped.

    The three functions are called with fake tensors in force, and their results are dropped. A third micro-batch of an
    update would add nothing, so at most two are run. Questions about values (`.item()`, `nonzero()`) are answered with
    "one" and "all positions". `fake=False` runs on real tensors, for comparison. Random state is left as it was.
    """
    recorder = _Recorder(fake)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        if fake:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(recorder)
        model = make_model()
        recorder.label("weights", [*model.parameters(), *model.buffers()])
        for parameter in model.parameters():
            if parameter.requires_grad:
                # Before the optimizer's own hooks, which may consume the gradient.
                parameter.register_post_accumulate_grad_hook(lambda p: recorder.label("gradients", [p.grad]))
        optimizer = make_optimizer(model)
        if callable(train := getattr(optimizer, "train", None)):
            train()  # schedule-free optimizers step in no other mode
        for _ in range(2):
            for _ in range(min(accumulation, 2)):
                loss = loss_of(model)
                recorder.label_rest("activations")
                loss.backward()
                del loss
            _label_state(recorder, optimizer)
            recorder.label_rest("gradients")  # projections
            _clip(model, optimizer, max_grad_norm)
            optimizer.step()
            _label_state(recorder, optimizer)
            optimizer.zero_grad(set_to_none=True)
            for parameter in model.parameters():
                parameter.grad = None
        samples = recorder.samples()
        formats = _state_formats(optimizer)
    return MemoryTrace(samples, formats)


def _clip(model: nn.Module, optimizer: Any, max_grad_norm: float) -> None:
    if max_grad_norm <= 0:
        return
    if clips_its_own_gradients(optimizer):
        unwrap_optimizer(optimizer).clip_grad_norm(max_grad_norm)
    else:
        nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)


def _label_state(recorder: "_Recorder", optimizer: Any) -> None:
    for state in optimizer.state.values():
        for name, value in state.items():
            recorder.label("bases" if str(name).startswith("basis") else "moments", tree_iter(value))


def _state_formats(optimizer: Any) -> dict[str, int]:
    formats: dict[str, int] = {}
    for state in optimizer.state.values():
        for value in tree_iter(state):
            if isinstance(value, Tensor) and value.dim() > 0:
                name = str(value.dtype).removeprefix("torch.")
                formats[name] = formats.get(name, 0) + value.numel()
    return formats


class _Recorder(TorchDispatchMode):
    """Notes when memory appears and goes. Groups are decided later, because a gradient is born a temporary."""

    def __init__(self, fake: bool) -> None:
        super().__init__()
        self._fake = fake
        self._alive: dict[int, tuple[int, Any]] = {}
        self._bytes: list[int] = []
        self._group: list[str | None] = []
        self._events: list[int] = []  # number of a memory + 1 when it appears, minus that when it goes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._fake and func is torch.ops.aten._local_scalar_dense.default:
            return 1
        if self._fake and func is torch.ops.aten.nonzero.default:
            found = torch.empty(args[0].numel(), args[0].dim(), dtype=torch.long, device=args[0].device)
            self._note(found)
            return found
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._note(value)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or storage.nbytes() == 0:
            return
        number = len(self._bytes)
        self._bytes.append(storage.nbytes())
        self._group.append(None)
        self._events.append(number + 1)

        def gone(_: Any) -> None:
            self._alive.pop(key, None)
            self._events.append(-number - 1)

        self._alive[key] = (number, weakref.ref(storage, gone))

    def label(self, group: str, tensors: Iterable[Any]) -> None:
        """Puts the memory of `tensors` into `group`, from its appearance on; a group once given stays.

        Except for activations that turn out to be a gradient: the fused loss makes the head's in the forward pass.
        """
        for tensor in tensors:
            known = self._alive.get(tensor.untyped_storage()._cdata) if isinstance(tensor, Tensor) else None
            if known is not None and self._group[known[0]] in (None, "activations"):
                self._group[known[0]] = group

    def label_rest(self, group: str) -> None:
        """Puts all living memory without a group into `group`."""
        for number, _ in self._alive.values():
            if self._group[number] is None:
                self._group[number] = group

    def samples(self) -> np.ndarray:
        """Returns the groups' bytes at every moment after which something went: (moments, groups)."""
        columns = [GROUPS.index(group or "temporary") for group in self._group]
        now = np.zeros(len(GROUPS), dtype=np.int64)
        rows = []
        grew = False
        for event in self._events:
            number = abs(event) - 1
            if event < 0 and grew:
                rows.append(now.copy())
            grew = event > 0
            now[columns[number]] += self._bytes[number] if grew else -self._bytes[number]
        rows.append(now)
        return np.stack(rows)
