"""Muon with the right split: hidden matrices by orthogonalised momentum, everything else by AdamW."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from finetune.errors import ArgumentError
from finetune.optim.groups import target_weight_names


def muon_parameters(model: nn.Module) -> list[Tensor]:
    """Returns the weights Muon steps: every linear layer except the output layer, unless tied to an embedding."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    names = set(target_weight_names(model, "all-linear", "muon"))
    return [p for name, p in model.named_parameters() if name in names and id(p) not in embeddings]


class MuonAdamW(Optimizer):
    """`torch.optim.Muon` for `muon_params`, `torch.optim.AdamW` for the rest, as one optimizer.

    Both halves share this object's `param_groups` and `state`, so a scheduler, a checkpoint and gradient clipping see
    one ordinary optimizer whose state is tensors only. Each given group is split into an AdamW group, then a Muon
    group; empty ones are left out. Source: Jordan et al., "Muon", 2024, as implemented in torch.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        *,
        muon_params: Iterable[Tensor],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
    ):
        chosen = {id(p) for p in muon_params}
        adam: list[dict[str, Any]] = []
        hidden: list[dict[str, Any]] = []
        for group in params:
            shared = {key: value for key, value in group.items() if key != "params"}
            for wanted, into in ((False, adam), (True, hidden)):
                members = [p for p in group["params"] if (id(p) in chosen) is wanted]
                if members:
                    into.append({**shared, "params": members})
        if not hidden:
            raise ArgumentError("`optim=muon` found no hidden matrix to train; choose `optim=adamw_torch`.")
        self._halves: list[Optimizer] = [
            torch.optim.Muon(
                hidden,
                lr=lr,
                weight_decay=weight_decay,
                momentum=momentum,
                nesterov=nesterov,
                ns_steps=ns_steps,
                adjust_lr_fn=adjust_lr_fn,
            )
        ]
        if adam:
            # First, so that the learning rate of group 0 is an ordinary one.
            self._halves.insert(0, torch.optim.AdamW(adam, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self._complete = False
        super().__init__([group for half in self._halves for group in half.param_groups], {"lr": lr})
        self._complete = True
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group while the object is made. Raises `ArgumentError` later: neither half would step the group."""
        if self._complete:
            raise ArgumentError(
                "`optim=muon` takes no parameter groups after it was made. Make the parameters trainable before, or "
                "make a new optimizer."
            )
        super().add_param_group(param_group)

    def _share(self) -> None:
        """Makes both halves work on this object's groups and state."""
        start = 0
        for half in self._halves:
            end = start + len(half.param_groups)
            half.param_groups = self.param_groups[start:end]
            half.state = self.state
            start = end

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Steps both halves; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for half in self._halves:
            half.step()
        return loss
