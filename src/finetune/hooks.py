"""What each engine part may ask of the trainer, and nothing else.

`Trainer` satisfies these protocols by having the methods; the type checker proves it. Engine functions receive
one of them instead of a `Trainer`, so they can be tested with a fake of a few methods. Methods are looked up at each
call, which is what keeps user overrides working.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class LoopHooks(Protocol):
    """Called by `engine/loop.py` while training."""

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]: ...

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor: ...

    def _clip_grad_norm(self, model: nn.Module) -> Any: ...

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any: ...

    def _get_learning_rate(self) -> float: ...

    def floating_point_ops(self, inputs: dict[str, Any]) -> int: ...

    def _maybe_log_save_evaluate(
        self,
        tr_loss: Tensor,
        grad_norm: Any,
        model: nn.Module,
        trial: Any,
        epoch: float,
        ignore_keys_for_eval: list[str] | None,
        start_time: float,
        learning_rate: float | None = None,
    ) -> None: ...


class EvalHooks(Protocol):
    """Called by `engine/evaluation.py`."""

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]: ...

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]: ...


class SaveHooks(Protocol):
    """Called while a checkpoint is written."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None: ...

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None: ...

    def _save_scaler(self, output_dir: str) -> None: ...

    def _save_rng_state(self, output_dir: str) -> None: ...
