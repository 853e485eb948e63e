"""Project in backward: each full gradient becomes its low-rank projection the moment it exists, and is freed.

`optimizer.step()` stays at its ordinary place. Gradient accumulation adds projections, data parallelism averages
projections, clipping scales projections by the global norm. At any time one full gradient of a projected weight
exists.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from finetune.errors import ArgumentError
from finetune.wrappers import unwrap_optimizer

if TYPE_CHECKING:
    from finetune.optim.galore import GaLoreOptimizer
    from finetune.optim.galore_basis import Basis

_IGNORED = "_ddp_params_and_buffers_to_ignore"


class ProjectInBackward:
    """The hooks on the projected weights of one optimizer, and the projections of the current window.

    The basis of a window comes from its first micro-batch, because later gradients must be added in the same
    coordinates. `close` removes the hooks; they also fall silent when the optimizer is gone.
    """

    def __init__(self, optimizer: "GaLoreOptimizer"):
        self._optimizer = weakref.ref(optimizer)
        self._group_of = {p: g for g in optimizer.param_groups if "rank" in g for p in g["params"]}
        self._projections: dict[Tensor, Tensor] = {}
        self._full_norms: dict[Tensor, Tensor] = {}
        self._repeated = False
        self._reduced = False
        self._ranks = world_size()
        self._channel: Any = None
        if self._ranks > 1:
            # Of its own, so that these messages never interleave with DDP's on a different order per rank.
            self._channel = torch.distributed.new_group()
            for p in self._group_of:
                torch.distributed.broadcast(p.data, 0, group=self._channel)
        self._handles = [p.register_post_accumulate_grad_hook(self._hook) for p in self._group_of]

    @torch.no_grad()
    def _hook(self, p: Tensor) -> None:
        optimizer = self._optimizer()
        if optimizer is None or p.grad is None:
            return
        gradient = optimizer.gradient_of(p)
        known = self._projections.get(p)
        low = optimizer.project(p, self._group(p), gradient, refresh=known is None)
        if known is None:
            self._projections[p] = low
            self._full_norms[p] = torch.linalg.vector_norm(gradient)
        else:
            # In float32: the sum is small, and many micro-batches would lose their last bits in bfloat16.
            self._projections[p] = known.float().add_(low)
            self._repeated = True
        p.grad = None

    def _group(self, p: Tensor) -> dict[str, Any]:
        """Returns the group of `p` now: loading a checkpoint replaces the group dictionaries."""
        optimizer = self._optimizer()
        assert optimizer is not None
        group = self._group_of[p]
        if not any(group is g for g in optimizer.param_groups):
            self._group_of = {q: g for g in optimizer.param_groups if "rank" in g for q in g["params"]}
        return self._group_of[p]

    def take(self, p: Tensor) -> Tensor | None:
        """Returns the window's projection of `p` in the type of its basis, or None."""
        low = self._projections.get(p)
        if low is None:
            return None
        optimizer = self._optimizer()
        assert optimizer is not None
        state = optimizer.state[p]
        basis = state.get("basis_left", state.get("basis_right"))
        return low.to(basis.dtype)

    def projections(self) -> list[Tensor]:
        """Returns the projections that are held now."""
        return list(self._projections.values())

    def clear(self) -> None:
        """Forgets the window's projections."""
        self._projections.clear()
        self._full_norms.clear()
        self._repeated = self._reduced = False

    def average(self, tensor: Tensor) -> Tensor:
        """Returns the mean of `tensor` over the data-parallel ranks."""
        if self._ranks == 1:
            return tensor
        total = tensor.contiguous().clone()
        torch.distributed.all_reduce(total, group=self._channel)
        return total.div_(self._ranks)

    def broadcast(self, basis: "Basis") -> None:
        """Makes every rank hold the basis of the first rank to the last bit."""
        for tensor in basis:
            if tensor is not None and self._ranks > 1:
                torch.distributed.broadcast(tensor, 0, group=self._channel)

    def reduce(self) -> None:
        """Averages the window's projections over the ranks, once, in one message per type."""
        if self._ranks == 1 or self._reduced:
            return
        missing = [p for p in self._group_of if p not in self._projections]
        if missing:
            raise ArgumentError(
                f"{len(missing)} of {len(self._group_of)} projected weights got no gradient on this rank. Weights that "
                f"take turns need `optim=galore_adamw` (without `_layerwise`) and `ddp_find_unused_parameters=True`."
            )
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for p in self._group_of:
            by_type.setdefault(self._projections[p].dtype, []).append(p)
        for members in by_type.values():
            flat = self.average(torch.cat([self._projections[p].reshape(-1) for p in members]))
            pieces = flat.split([self._projections[p].numel() for p in members])
            for p, piece in zip(members, pieces, strict=True):
                self._projections[p] = piece.view_as(self._projections[p])
        self._reduced = True

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """Scales gradients and projections so that their global norm is at most `max_norm`; returns the norm before.

        A weight that was projected once, on one rank, counts with the norm of its full gradient, so the result is the
        one of the ordinary run. After accumulation, or averaging over ranks, the full gradient never existed and the
        norm of its projection counts. `max_norm=inf` only measures.
        """
        self.reduce()
        optimizer = self._optimizer()
        assert optimizer is not None
        exact = not self._repeated and self._ranks == 1
        norms: list[Tensor] = []
        held: list[Tensor] = []
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            low = self._projections.get(p)
            if low is not None:
                norms.append(self._full_norms[p] if exact else torch.linalg.vector_norm(low))
                held.append(low)
            elif p.grad is not None:
                norms.append(torch.linalg.vector_norm(p.grad))
                held.append(p.grad)
        if not norms:
            return torch.tensor(0.0)
        total = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device, torch.float32) for n in norms]))
        factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
        for tensor in held:
            tensor.mul_(factor.to(tensor.device))
        return total

    def close(self) -> None:
        """Removes the hooks and what they hold."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()


def optimizer_logs(optimizer: Any) -> dict[str, float]:
    """Returns what the optimizer wants in the log beyond the usual, for example GaLore's captured energy."""
    from finetune.optim.galore import GaLoreOptimizer

    inner = unwrap_optimizer(optimizer)
    return inner.stats() if isinstance(inner, GaLoreOptimizer) else {}


def describe_optimizer(optimizer: Any) -> str:
    """Returns what the optimizer says about itself on one line, such as how many weights GaLore projects, or ""."""
    describe = getattr(unwrap_optimizer(optimizer), "describe", None)
    return str(describe()) if callable(describe) else ""


def release_optimizer(optimizer: Any) -> None:
    """Removes whatever the optimizer hung on the model; call it when training ends, also after an exception."""
    from finetune.optim.apollo import ApolloAdamW
    from finetune.optim.galore import GaLoreOptimizer

    inner = unwrap_optimizer(optimizer)
    if isinstance(inner, (GaLoreOptimizer, ApolloAdamW)):
        inner.release()
    elif _is_lomo(inner):
        # The package keeps no handles, but registers one and the same function on every parameter.
        for p in inner.model.parameters():
            hooks = p._backward_hooks or {}
            for key in [key for key, hook in hooks.items() if hook is inner.grad_func]:
                del hooks[key]


def hide_from_ddp(model: nn.Module, parameters: Sequence[Tensor]) -> Callable[[], None]:
    """Makes DistributedDataParallel leave `parameters` of `model` alone. Returns a function that undoes it."""
    wanted = {id(p) for p in parameters}
    names = {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in wanted}
    attributes = vars(model)
    before = attributes.get(_IGNORED)
    marked = [p for p in parameters if not hasattr(p, "_ddp_ignored")]
    hide = nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    hide(model, sorted({*names, *(before or ())}))

    def show() -> None:
        attributes.pop(_IGNORED, None)
        if before is not None:
            attributes[_IGNORED] = before
        for p in marked:
            vars(p).pop("_ddp_ignored", None)

    return show


def works_in_backward(optimizer: Any) -> bool:
    """Returns whether the optimizer projects or updates weights inside backward (`_layerwise`, LOMO)."""
    from finetune.optim.apollo import ApolloAdamW
    from finetune.optim.galore import GaLoreOptimizer

    inner = unwrap_optimizer(optimizer)
    if isinstance(inner, GaLoreOptimizer):
        return inner.backward is not None
    if isinstance(inner, ApolloAdamW):
        return inner.works_in_backward
    return _is_lomo(inner)


def require_update_in_backward(args: Any, optim: str, *, clips: bool, instead_of_clipping: str, advice: str) -> None:
    """Raises `ArgumentError` for settings that need the whole gradient of a step to exist before any weight moves.

    `clips` says whether `max_grad_norm` is one of them; the two texts complete the message.
    """
    # transformers' own arguments have no such policy, and act like "log".
    policy = getattr(args, "nonfinite_policy", "log")
    broken = [
        text
        for wrong, text in (
            (args.gradient_accumulation_steps != 1, "`gradient_accumulation_steps=1`"),
            (clips, f"`max_grad_norm=0` ({instead_of_clipping})"),
            (policy == "skip_step", "`nonfinite_policy='raise'` or `'log'` (the weights have moved when a step ends)"),
            (args.fp16, "`fp16=False`"),
            (world_size() > 1, "one process"),
        )
        if wrong
    ]
    if broken:
        raise ArgumentError(
            f"`optim={optim}` updates weights inside backward, which needs {' and '.join(broken)}. {advice}"
        )


def _is_lomo(inner: Any) -> bool:
    return type(inner).__module__.partition(".")[0] == "lomo_optim"


def world_size() -> int:
    """Returns the number of processes of this run."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1
