"""What GaLore does with a projection: AdamW, AdamW with 8-bit moments, Adafactor.

Formulas and their order are those of `galore_torch` 1.0 without its defects: weight decay, betas and `eps` are those
asked for, and nothing but tensors is kept.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from finetune.optim.galore import GaLoreOptimizer
from finetune.optim.galore_basis import Basis
from finetune.optim.groups import ParameterGroup

# Below this many entries bitsandbytes keeps 32-bit moments too: there is nothing to save.
_SMALLEST_8BIT = 4096
_BLOCK = 256


class GaLoreAdamW(GaLoreOptimizer):
    """AdamW on projections. Bias correction multiplies the step and `eps` is added outside, as in `galore_torch`."""

    def __init__(
        self,
        params: Iterable[ParameterGroup],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        **galore: Any,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, **galore)

    def update_from(self, gradient: Tensor, p: Tensor, state: dict[str, Any], group: ParameterGroup) -> Tensor:
        """Returns the bias-corrected Adam direction times the learning rate."""
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(gradient)
            state["exp_avg_sq"] = torch.zeros_like(gradient)
        beta1, beta2 = group["betas"]
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.mul_(beta1).add_(gradient, alpha=1.0 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
        return (mean / square.sqrt().add_(group["eps"])).mul_(adam_step_size(group, int(state["step"].item())))

    def moment_bytes(self, shape: tuple[int, ...], p: Tensor) -> int:
        """Returns the bytes of two moments in the parameter's type."""
        return 2 * math.prod(shape) * p.element_size()

    def rotate(self, state: dict[str, Any], old: Basis, new: Basis) -> None:
        """Expresses both moments in the new basis."""
        if "exp_avg" in state:
            state["exp_avg"], state["exp_avg_sq"] = turn_moments(state["exp_avg"], state["exp_avg_sq"], old, new)


def turn_moments(mean: Tensor, square: Tensor, old: Basis, new: Basis) -> tuple[Tensor, Tensor]:
    """Returns both moments in the coordinates of the new basis: the mean exactly, the squares by `turn_squares`."""
    if old.left is not None and new.left is not None:
        turn = new.left.t() @ old.left  # (r, r)
        mean, square = turn @ mean, turn_squares(turn, square)
    if old.right is not None and new.right is not None:
        turn = new.right @ old.right.t()  # (r, r)
        mean, square = mean @ turn.t(), turn_squares(turn, square.t()).t()
    return mean.contiguous(), square.contiguous()


def turn_squares(turn: Tensor, square: Tensor) -> Tensor:
    """Returns squared coordinates (r, n) or (r,) after `turn` (r, r), as if the old coordinates were independent.

    The part of a new direction that lies outside the old space gets the average of the old squares: zero would make
    Adam overshoot there for as long as the second moment remembers.
    """
    weights = turn.square()
    outside = (1.0 - weights.sum(dim=1)).clamp_(min=0.0)  # (r,)
    average = square.mean(dim=0, keepdim=True)  # (1, n) or (1,)
    return weights @ square + (outside.unsqueeze(1) * average if square.dim() == 2 else outside * average)


def adam_step_size(group: ParameterGroup, step: int) -> float:
    """Returns the learning rate with both bias corrections folded in."""
    beta1, beta2 = group["betas"]
    return group["lr"] * math.sqrt(1.0 - beta2**step) / (1.0 - beta1**step)


class GaLoreAdamW8bit(GaLoreAdamW):
    """AdamW whose moments are 8-bit blocks of bitsandbytes, for projections and for ordinary weights alike.

    Parameters in `wide` (embeddings) and everything under 4096 entries keep moments in the gradient's type.
    """

    def __init__(self, params: Iterable[ParameterGroup], *args: Any, wide: Iterable[Tensor] = (), **kwargs: Any):
        self._wide = {id(p) for p in wide}
        self._maps: dict[torch.device, tuple[Tensor, Tensor]] = {}
        super().__init__(params, *args, **kwargs)

    def update_from(self, gradient: Tensor, p: Tensor, state: dict[str, Any], group: ParameterGroup) -> Tensor:
        """Returns the bias-corrected Adam direction times the learning rate."""
        if id(p) in self._wide or gradient.numel() < _SMALLEST_8BIT:
            return super().update_from(gradient, p, state, group)
        from bitsandbytes.functional import optimizer_update_8bit_blockwise

        gradient = gradient.contiguous()
        if "exp_avg" not in state:
            blocks = -(-gradient.numel() // _BLOCK)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(gradient, dtype=torch.uint8)
                state[f"{name}_scale"] = torch.zeros(blocks, dtype=torch.float32, device=p.device)
        first, second = self._code_maps(p.device)
        # The kernel steps a weight in place; a weight of zeros becomes minus the update.
        moved = torch.zeros_like(gradient)
        beta1, beta2 = group["betas"]
        optimizer_update_8bit_blockwise(
            "adam",
            gradient,
            moved,
            state["exp_avg"],
            state["exp_avg_sq"],
            beta1,
            beta2,
            0.0,
            0.0,
            group["eps"],
            int(state["step"].item()),
            group["lr"],
            first,
            second,
            state["exp_avg_scale"],
            state["exp_avg_sq_scale"],
            weight_decay=0.0,
            gnorm_scale=1.0,
            skip_zeros=False,
        )
        return moved.neg_()

    def moment_bytes(self, shape: tuple[int, ...], p: Tensor) -> int:
        """Returns the bytes of two 8-bit moments with their scales, or of two ordinary ones where those are kept."""
        count = math.prod(shape)
        if id(p) in self._wide or count < _SMALLEST_8BIT:
            return super().moment_bytes(shape, p)
        return 2 * (count + 4 * -(-count // _BLOCK))

    def _code_maps(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns the values that the codes of the first and of the second moment stand for."""
        if device not in self._maps:
            from bitsandbytes.functional import create_dynamic_map

            self._maps[device] = (
                create_dynamic_map(signed=True).to(device),
                create_dynamic_map(signed=False).to(device),
            )
        return self._maps[device]

    def rotate(self, state: dict[str, Any], old: Basis, new: Basis) -> None:
        """Decodes both moments, expresses them in the new basis and encodes them again."""
        if "exp_avg_scale" not in state:
            super().rotate(state, old, new)
            return
        from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

        names = ("exp_avg", "exp_avg_sq")
        maps = dict(zip(names, self._code_maps(state["exp_avg"].device), strict=True))
        decoded = [
            dequantize_blockwise(state[name], absmax=state[f"{name}_scale"], code=maps[name], blocksize=_BLOCK)
            for name in names
        ]
        wide_old, wide_new = (Basis(*(None if t is None else t.float() for t in basis)) for basis in (old, new))
        for name, turned in zip(names, turn_moments(decoded[0], decoded[1], wide_old, wide_new), strict=True):
            state[name], code = quantize_blockwise(turned, code=maps[name], blocksize=_BLOCK)
            state[f"{name}_scale"] = code.absmax


class GaLoreAdafactor(GaLoreOptimizer):
    """Adafactor on projections, with an external learning rate."""

    wide_gradients = True

    def __init__(
        self,
        params: Iterable[ParameterGroup],
        lr: float = 1e-3,
        eps: float = 1e-30,
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        **galore: Any,
    ):
        defaults = {"lr": lr, "eps": eps, "clip_threshold": clip_threshold, "decay_rate": decay_rate, "beta1": beta1}
        super().__init__(params, {**defaults, "weight_decay": weight_decay}, **galore)

    def update_from(self, gradient: Tensor, p: Tensor, state: dict[str, Any], group: ParameterGroup) -> Tensor:
        """Returns the update with root mean square at most `clip_threshold`, times the learning rate."""
        factored = gradient.dim() >= 2
        if factored and "exp_avg_sq_row" not in state:
            state["exp_avg_sq_row"] = gradient.new_zeros(gradient.shape[:-1])
            state["exp_avg_sq_col"] = gradient.new_zeros(gradient.shape[:-2] + gradient.shape[-1:])
        elif not factored and "exp_avg_sq" not in state:
            state["exp_avg_sq"] = torch.zeros_like(gradient)
        keep = 1.0 - float(state["step"].item()) ** group["decay_rate"]
        square = gradient.square().add_(group["eps"])
        if factored:
            row, column = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
            row.mul_(keep).add_(square.mean(dim=-1), alpha=1.0 - keep)
            column.mul_(keep).add_(square.mean(dim=-2), alpha=1.0 - keep)
            inverse_row = (row / row.mean(dim=-1, keepdim=True)).rsqrt_().unsqueeze(-1)
            update = torch.mul(inverse_row, column.unsqueeze(-2).rsqrt()).mul_(gradient)
        else:
            state["exp_avg_sq"].mul_(keep).add_(square, alpha=1.0 - keep)
            update = state["exp_avg_sq"].rsqrt().mul_(gradient)
        update.div_((_root_mean_square(update) / group["clip_threshold"]).clamp_(min=1.0)).mul_(group["lr"])
        if group["beta1"] is not None:
            mean = state.setdefault("exp_avg", torch.zeros_like(update))
            mean.mul_(group["beta1"]).add_(update, alpha=1.0 - group["beta1"])
            update = mean.clone()
        return update

    def rotate(self, state: dict[str, Any], old: Basis, new: Basis) -> None:
        """Expresses the moments in the new basis; averages over the projected dimension do not change."""
        if "exp_avg_sq_row" not in state:
            return
        if old.left is not None and new.left is not None:
            turn = new.left.t() @ old.left  # (r, r)
            state["exp_avg_sq_row"] = turn_squares(turn, state["exp_avg_sq_row"])
            if "exp_avg" in state:
                state["exp_avg"] = turn @ state["exp_avg"]
        if old.right is not None and new.right is not None:
            turn = new.right @ old.right.t()  # (r, r)
            state["exp_avg_sq_col"] = turn_squares(turn, state["exp_avg_sq_col"])
            if "exp_avg" in state:
                state["exp_avg"] = state["exp_avg"] @ turn.t()

    def moment_bytes(self, shape: tuple[int, ...], p: Tensor) -> int:
        """Returns the bytes of the factored or plain averages, and of the first moment if there is one, in float32."""
        factored = len(shape) >= 2
        count = math.prod(shape[:-1]) + math.prod((*shape[:-2], shape[-1])) if factored else math.prod(shape)
        return 4 * (count + (math.prod(shape) if self.defaults["beta1"] is not None else 0))

    def apply(self, p: Tensor, update: Tensor, group: ParameterGroup) -> None:
        """Decays the weight, then subtracts `update`, both in float32."""
        wide = p.float()
        if group["weight_decay"] != 0:
            wide = wide * (1.0 - group["lr"] * group["weight_decay"])
        p.copy_(wide - update)


def _root_mean_square(tensor: Tensor) -> Tensor:
    return tensor.norm(2) / tensor.numel() ** 0.5
