"""GaLore: Adam-family optimizers whose moments live in a low-rank subspace of each gradient.

Groups that carry `rank` are projected, the others are optimised in the ordinary way; all are ordinary parameter
groups, so schedules, clipping and checkpoints act on them as on any optimizer. The state holds tensors only:
`step`, the basis, and the moments. Formulas and their order agree with `galore_torch` 1.0, which makes it the
reference: with `svd="exact"` the trajectories agree to 1e-6. Source: Zhao et al., "GaLore", 2024, algorithm 2.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from finetune.errors import ArgumentError, CheckpointError
from finetune.optim.fused_backward import ProjectInBackward
from finetune.optim.galore_basis import (
    Basis,
    Side,
    coordinate_basis,
    exact_basis,
    project,
    project_back,
    randomized_basis,
    side_of,
)
from finetune.optim.groups import ParameterGroup, partition

_FIXED_BY_CHECKPOINT = ("rank", "proj_type")


@dataclass(frozen=True)
class GaLoreSettings:
    """What `optim_args` can say about the projection.

    `update_proj_gap` is in optimizer steps; `scale` multiplies the update; `stagger` spreads the refreshes of the
    layers over the gap so that no step pays for all of them; `rotate_moments` expresses the moments in the new basis
    at each refresh, where GaLore leaves them as they were. Rotation is off because it did not pay: a two-layer model on
    text, rank 16, 400 steps, ended at 1.742 against 1.718 without (5 seeds, beta2 0.999), and at 1.742 against 1.750
    (3 seeds, beta2 0.98).
    """

    rank: int = 128
    update_proj_gap: int = 200
    scale: float = 0.25
    proj_type: str = "std"
    svd: str = "randomized"
    rotate_moments: bool = False
    stagger: bool = True


class GaLoreOptimizer(Optimizer):
    """Projection, basis refresh, state and bookkeeping; subclasses turn a gradient into an update.

    `targets` are the parameters to project, `settings` how; a group that already has a `rank` is projected as well.
    With `in_backward` the projection happens inside backward (see `ProjectInBackward`). `release` calls `on_release`.
    """

    wide_gradients = False

    def __init__(
        self,
        params: Iterable[ParameterGroup],
        defaults: dict[str, Any],
        *,
        targets: Iterable[Tensor],
        settings: GaLoreSettings,
        in_backward: bool = False,
        seed: int = 0,
        on_release: Callable[[], None] | None = None,
    ):
        groups = partition(list(params), [(targets, asdict(settings))])
        super().__init__(groups, defaults)
        self.seed = seed
        self._on_release = on_release
        self._index = {p: i for i, p in enumerate(self.targets())}
        self._refresh_seconds = 0.0
        self.backward = ProjectInBackward(self) if in_backward else None
        # The trainer asks for this first: gradients that are projected in backward cannot be clipped from outside.
        self.clip_grad_norm = None if self.backward is None else self.backward.clip

    def targets(self) -> list[Tensor]:
        """Returns the projected parameters, in group order."""
        return [p for group in self.param_groups if "rank" in group for p in group["params"]]

    def update_from(self, gradient: Tensor, p: Tensor, state: dict[str, Any], group: ParameterGroup) -> Tensor:
        """Returns what to subtract from the parameter, in the space of `gradient`; changes `state` in place."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Updates every parameter that has a gradient or a projection; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.backward is not None:
            self.backward.reduce()
        for group in self.param_groups:
            for p in group["params"]:
                self._step_parameter(p, group)
        if self.backward is not None:
            self.backward.clear()
        return loss

    def _step_parameter(self, p: Tensor, group: ParameterGroup) -> None:
        low = self.backward.take(p) if self.backward is not None else None
        if low is None and p.grad is None:
            return
        projected = "rank" in group
        if low is None:
            gradient = self.gradient_of(p)
            low = self.project(p, group, gradient) if projected else gradient
        state = self.state[p]
        state.setdefault("step", torch.zeros(()))
        state["step"] += 1
        update = self.update_from(low, p, state, group)
        if projected:
            update = project_back(update, _basis_in(state)).mul_(group["scale"])
        self.apply(p, update, group)

    def apply(self, p: Tensor, update: Tensor, group: ParameterGroup) -> None:
        """Subtracts `update`, then decays the weight by the learning rate times `weight_decay`."""
        p.sub_(update)
        if group["weight_decay"] > 0.0:
            p.add_(p, alpha=-group["lr"] * group["weight_decay"])

    def gradient_of(self, p: Tensor) -> Tensor:
        """Returns the gradient as the update rule wants it."""
        assert p.grad is not None
        if p.grad.is_sparse:
            raise ArgumentError("GaLore does not take sparse gradients: build the embedding with `sparse=False`.")
        narrow = self.wide_gradients and p.grad.dtype in (torch.float16, torch.bfloat16)
        return p.grad.float() if narrow else p.grad

    @torch.no_grad()
    def project(self, p: Tensor, group: ParameterGroup, gradient: Tensor, *, refresh: bool = True) -> Tensor:
        """Returns the projection of `gradient`, after renewing the basis when this step is due for it."""
        state = self.state[p]
        step = state.setdefault("step", torch.zeros(()))
        if refresh and self._due(p, group, int(step.item())):
            self._refresh(p, group, state, gradient)
        return project(gradient, _basis_in(state))

    def _due(self, p: Tensor, group: ParameterGroup, step: int) -> bool:
        gap = group["update_proj_gap"]
        offset = self._index[p] * gap // len(self._index) if group.get("stagger") else 0
        return "refreshes" not in self.state[p] or (step - offset) % gap == 0

    def _refresh(self, p: Tensor, group: ParameterGroup, state: dict[str, Any], gradient: Tensor) -> None:
        """Renews the basis in `state`. A gradient with NaN or infinite values leaves the basis as it is."""
        if gradient.dim() != 2 or getattr(p, "device_mesh", None) is not None:
            raise ArgumentError(
                "GaLore needs whole weight matrices, and this run shards them (FSDP or tensor parallelism). Use data "
                "parallelism with `optim=galore_adamw_layerwise`, or keep the sharding with `optim=adamw_8bit`."
            )
        started = time.perf_counter()
        side, rank = side_of(gradient.shape, group["proj_type"]), group["rank"]
        old = _basis_in(state)
        sync = self.backward.average if self.backward is not None else None
        finite = torch.isfinite(gradient).all().float()
        if (finite if sync is None else sync(finite)) < 1:
            if old == Basis(None, None):
                # Without `refreshes` it counts as missing, so the next gradient brings a basis of its own.
                _put(state, coordinate_basis(gradient, rank, side))
            return
        if group.get("svd", "exact") == "exact":
            basis, energy = exact_basis(gradient if sync is None else sync(gradient), rank, side)
        else:
            basis, energy = randomized_basis(
                gradient,
                rank,
                side,
                previous=old if "refreshes" in state else None,
                generator=self._generator(p, int(state["step"].item())),
                **({} if sync is None else {"reduce": sync}),
            )
        if self.backward is not None:
            self.backward.broadcast(basis)
        if group.get("rotate_moments") and "refreshes" in state:
            self.rotate(state, old, basis)
        _put(state, basis)
        # In the state, so that a resumed run logs the numbers of an uninterrupted one.
        state["captured_energy"] = energy
        state["refreshes"] = state.get("refreshes", torch.zeros(())) + 1
        self._refresh_seconds += time.perf_counter() - started

    def _generator(self, p: Tensor, step: int) -> torch.Generator:
        """Returns a generator that depends on seed, parameter and step only: nothing to save, nothing disturbed."""
        generator = torch.Generator(device=p.device)
        return generator.manual_seed((self.seed * 1_000_003 + self._index[p]) * 1_000_003 + step)

    def rotate(self, state: dict[str, Any], old: Basis, new: Basis) -> None:
        """Expresses the moments in the new basis."""
        raise NotImplementedError

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops gradients, and projections that no step has consumed."""
        super().zero_grad(set_to_none)
        if self.backward is not None:
            self.backward.clear()

    def stats(self) -> dict[str, float]:
        """Returns refreshes so far, seconds spent in them since this process began, and the mean captured energy of
        the current bases.

        Reads the device: call it when logging. Seconds are host time; on a GPU they leave out queued kernels.
        """
        projected = [state for state in self.state.values() if "captured_energy" in state]
        if not projected:
            return {}
        energies = torch.stack([torch.as_tensor(state["captured_energy"]).float().cpu() for state in projected])
        return {
            "galore_refreshes": float(sum(state["refreshes"] for state in projected)),
            "galore_refresh_seconds": self._refresh_seconds,
            "galore_captured_energy": energies.mean().item(),
        }

    def moment_bytes(self, shape: tuple[int, ...], p: Tensor) -> int:
        """Returns the bytes of the moments of parameter `p` whose gradient, or its projection, has `shape`."""
        raise NotImplementedError

    def planned_state(self) -> dict[str, int]:
        """Returns the bytes, before the first step, of `moments`, `bases` and `gradients`; `projected` are the moments
        of the projected weights alone. In layerwise mode their gradients are projections."""
        planned = {"moments": 0, "bases": 0, "gradients": 0, "projected": 0}
        for group in self.param_groups:
            for p in group["params"]:
                shape = tuple(p.shape)
                if "rank" in group:
                    rank, (m, n) = min(group["rank"], *shape), shape
                    side: Side = side_of(p.shape, group["proj_type"])
                    shape = {"left": (rank, n), "right": (m, rank), "full": (rank, rank)}[side]
                    basis = {"left": m * rank, "right": rank * n, "full": (m + n) * rank}[side]
                    planned["bases"] += basis * p.element_size()
                    planned["projected"] += self.moment_bytes(shape, p)
                planned["moments"] += self.moment_bytes(shape, p)
                held = p.shape if self.backward is None else shape
                planned["gradients"] += math.prod(held) * p.element_size()
        return planned

    def describe(self) -> str:
        """Returns one line: how many weights are projected and how many bytes of moments and gradients that saves."""
        planned, targets = self.planned_state(), self.targets()
        full = sum(self.moment_bytes(tuple(p.shape), p) for p in targets)
        gradients = sum(p.numel() * p.element_size() for p in targets) if self.backward is not None else 0
        narrow = sum(
            group["rank"] > min(p.shape) for group in self.param_groups if "rank" in group for p in group["params"]
        )
        low = planned["projected"] + planned["bases"]
        text = (
            f"GaLore projects {len(self._index)} weights: moments and bases take {low / 2**20:.1f} MiB instead of "
            f"{full / 2**20:.1f} MiB of full moments"
        )
        if gradients:
            text += f", and {gradients / 2**20:.1f} MiB of gradients are projected as backward makes them"
        return text + (f" ({narrow} weights are narrower than the rank)." if narrow else ".")

    def release(self) -> None:
        """Removes the hooks of `in_backward` from the parameters; the run is over."""
        if self.backward is not None:
            self.backward.close()
        if self._on_release is not None:
            self._on_release()
            self._on_release = None

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads what `state_dict` returned, every tensor in the type it was saved in.

        Raises `CheckpointError` when rank or projection differ from the checkpoint's: its moments would not fit.
        """
        for mine, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            for key in _FIXED_BY_CHECKPOINT:
                if mine.get(key) != saved.get(key):
                    raise CheckpointError(
                        f"The checkpoint was trained with GaLore `{key}={saved.get(key)}` and this run has "
                        f"`{key}={mine.get(key)}`. Set it in `optim_args` as it was, or start without the optimizer."
                    )
        super().load_state_dict(dict(state_dict))
        saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        for saved_id, p in zip(saved_ids, parameters, strict=True):
            for key, value in state_dict["state"].get(saved_id, {}).items():
                # torch casts state to the parameter's type, which would round float32 and break 8-bit state.
                if isinstance(value, Tensor):
                    self.state[p][key] = value.detach().to("cpu" if key == "step" else p.device, copy=True)


def _basis_in(state: Mapping[str, Any]) -> Basis:
    return Basis(state.get("basis_left"), state.get("basis_right"))


def _put(state: dict[str, Any], basis: Basis) -> None:
    state.update({f"basis_{name}": t for name, t in basis._asdict().items() if t is not None})
