"""APOLLO: Adam's moments in a random low-rank space tell how much to scale each channel of the full gradient.

Formulas agree with `apollo_torch` 1.0.3; the random projection comes from (seed, parameter, step) and is made anew at
each use, so the state is tensors only and holds no projection. Source: Zhu et al., "APOLLO", 2024, algorithm 1.
"""

import math
import weakref
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from finetune.optim.galore_basis import Basis, project, side_of
from finetune.optim.groups import ParameterGroup, partition

_LARGEST_GROWTH = 1.01


@dataclass(frozen=True)
class ApolloSettings:
    """What `optim_args` can say. `scale_type` is "channel", or "tensor" for APOLLO-Mini (rank 1)."""

    rank: int = 128
    update_proj_gap: int = 200
    scale: float = 1.0
    proj_type: str = "std"
    scale_type: str = "channel"


class ApolloAdamW(Optimizer):
    """AdamW whose `targets` are scaled by low-rank moments; every other parameter takes ordinary AdamW steps.

    With `in_backward` a target is updated, and its gradient freed, as soon as backward has made it: gradient
    accumulation and clipping are then impossible, and `step()` only does the other parameters.
    """

    def __init__(
        self,
        params: Iterable[ParameterGroup],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        targets: Iterable[Tensor],
        settings: ApolloSettings,
        in_backward: bool = False,
        seed: int = 0,
    ):
        groups = partition(list(params), [(targets, asdict(settings))])
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.seed = seed
        projected = [p for group in self.param_groups if "rank" in group for p in group["params"]]
        self._index = {p: i for i, p in enumerate(projected)}
        self._handles = _hook(self, projected) if in_backward else []

    @property
    def works_in_backward(self) -> bool:
        return bool(self._handles)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Updates every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, group)
        return loss

    @torch.no_grad()
    def update(self, p: Tensor, group: ParameterGroup) -> None:
        """Takes one step for `p` from `p.grad`."""
        assert p.grad is not None
        state = self.state[p]
        step = state.setdefault("step", torch.zeros(()))
        low = self._project(p, group, int(step.item())) if "rank" in group else p.grad
        if "exp_avg" not in state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(low), torch.zeros_like(low)
        step += 1
        count = int(step.item())
        beta1, beta2 = group["betas"]
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.mul_(beta1).add_(low, alpha=1.0 - beta1)
        square.mul_(beta2).addcmul_(low, low, value=1.0 - beta2)
        direction = mean / square.sqrt().add_(group["eps"])
        if "rank" in group:
            direction = self._scaled_gradient(p.grad, low, direction, state, group)
        step_size = group["lr"] * math.sqrt(1.0 - beta2**count) / (1.0 - beta1**count)
        p.add_(direction, alpha=-step_size)
        if group["weight_decay"] > 0.0:
            p.add_(p, alpha=-group["lr"] * group["weight_decay"])

    def _project(self, p: Tensor, group: ParameterGroup, step: int) -> Tensor:
        """Returns the projection of `p.grad` by a Gaussian matrix with variance 1/rank."""
        assert p.grad is not None
        gradient, rank = p.grad, group["rank"]
        period = step // group["update_proj_gap"]
        generator = torch.Generator(device=p.device)
        generator.manual_seed((self.seed * 1_000_003 + self._index[p]) * 1_000_003 + period)
        left = side_of(gradient.shape, group["proj_type"]) == "left"
        shape = (gradient.shape[0], rank) if left else (rank, gradient.shape[1])
        matrix = (torch.randn(shape, generator=generator, device=p.device) / math.sqrt(rank)).to(gradient.dtype)
        return project(gradient, Basis(matrix, None) if left else Basis(None, matrix))

    def _scaled_gradient(
        self, gradient: Tensor, low: Tensor, direction: Tensor, state: dict[str, Any], group: ParameterGroup
    ) -> Tensor:
        """Returns the full gradient, scaled as Adam scaled its projection, with its growth per step limited."""
        if group["scale_type"] == "channel":
            # Channels run along the dimension that projecting kept.
            dim = 0 if side_of(gradient.shape, group["proj_type"]) == "left" else 1
            factor = direction.norm(dim=dim, keepdim=True) / (low.norm(dim=dim, keepdim=True) + 1e-8)
        else:
            factor = direction.norm() / (low.norm() + 1e-8)
        scaled = gradient * factor
        norm = scaled.norm()
        if "update_norm" in state:
            # The limiter of Fira (Chen et al., 2024): a sudden gradient cannot multiply the update.
            limit = (norm / (state["update_norm"] + 1e-8)).clamp_(min=_LARGEST_GROWTH) / _LARGEST_GROWTH
            scaled, norm = scaled / limit, norm / limit
        state["update_norm"] = norm
        return scaled * math.sqrt(group["scale"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned; step counts stay on the host."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            if "step" in state:
                state["step"] = state["step"].to("cpu", torch.float32, copy=True)

    def release(self) -> None:
        """Removes the hooks of `in_backward` from the parameters; the run is over."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _hook(optimizer: ApolloAdamW, parameters: list[Tensor]) -> list[Any]:
    alive = weakref.ref(optimizer)

    def update_and_free(p: Tensor) -> None:
        owner = alive()
        if owner is not None and p.grad is not None:
            # Looked up each time, because loading a checkpoint replaces the group dictionaries.
            owner.update(p, next(g for g in owner.param_groups if any(p is q for q in g["params"])))
            p.grad = None

    return [p.register_post_accumulate_grad_hook(update_and_free) for p in parameters]
