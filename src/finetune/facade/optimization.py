"""Mixin of `Trainer`: optimizer, schedule, and what they say about themselves."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from finetune.errors import ArgumentError
from finetune.facade.base import TrainerBase
from finetune.optim import groups, registry, schedules
from finetune.optim.state_offload import offload_state


class OptimizerMethods(TrainerBase):
    """Optimizer and schedule. Use `Trainer`."""

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        """Creates both. transformers 5 no longer calls this; here an override of a subclass still is."""
        self.create_optimizer()
        self.create_scheduler(num_training_steps=num_training_steps)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Returns `self.optimizer`, built from `args.optim` when there is none yet. Called before the model is wrapped
        (after, under FSDP1, which replaces the parameters)."""
        if self.optimizer is None:
            model = self.model if model is None else model
            self.optimizer = registry.build_optimizer(
                self.args,
                model,
                cls_and_kwargs=self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, model),
                decay_names=self.get_decay_parameter_names(model),
            )
        if self.args.offload_optimizer_state:
            offload_state(self.optimizer)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Returns `self.lr_scheduler`, built from `args.lr_scheduler_type` when there is none yet."""
        if self.lr_scheduler is None:
            self.lr_scheduler = schedules.build_scheduler(
                self.args, self.optimizer if optimizer is None else optimizer, num_training_steps
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _optimizer_factory(self, max_steps: int) -> Callable[..., Any]:
        """Returns what makes the optimizer: `create_optimizer`, or an overridden `create_optimizer_and_scheduler`.

        An override may set `self.optimizer` and return nothing.
        """
        makes_both = type(self).create_optimizer_and_scheduler is not OptimizerMethods.create_optimizer_and_scheduler

        def create(*wrapped: nn.Module) -> Any:
            made: Any = None
            if makes_both:
                self.create_optimizer_and_scheduler(num_training_steps=max_steps)
            else:
                made = self.create_optimizer(*wrapped)
            made = self.optimizer if made is None else made
            if made is None:
                raise ArgumentError(
                    f"`{type(self).__name__}.create_optimizer` made no optimizer: return it, or set `self.optimizer`."
                )
            return made

        return create

    def _schedule_for(self, num_training_steps: int, **optimizer: Any) -> Any:
        """Returns what `create_scheduler` returns, or else has set as `self.lr_scheduler`."""
        made: Any = self.create_scheduler(num_training_steps=num_training_steps, **optimizer)
        made = self.lr_scheduler if made is None else made
        if made is None:
            raise ArgumentError(
                f"`{type(self).__name__}.create_scheduler` made no schedule: return it, or set `self.lr_scheduler`."
            )
        return made

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: nn.Module | None = None) -> tuple[Any, Any]:
        """Returns the class and the keyword arguments of the optimizer that `args.optim` names."""
        return registry.optimizer_cls_and_kwargs(args, model)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Returns the names of the parameters that `weight_decay` applies to: no biases, no norms."""
        return groups.decay_parameter_names(model)

    def _get_learning_rate(self) -> float:
        return schedules.current_learning_rate(self.lr_scheduler, self.optimizer)

    def get_learning_rates(self) -> list[float]:
        """Returns the learning rate of each parameter group."""
        return [group["lr"] for group in self._require_optimizer().param_groups]

    def get_num_trainable_parameters(self) -> int:
        """Returns the number of parameters that receive gradients."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def get_optimizer_group(self, param: Any = None) -> Any:
        """Returns the parameters of every group, or the group that holds `param`."""
        param_groups = self._require_optimizer().param_groups
        if param is None:
            return [group["params"] for group in param_groups]
        return next((group for group in param_groups if any(member is param for member in group["params"])), None)

    def _require_optimizer(self) -> Any:
        if self.optimizer is None:
            raise ArgumentError("There is no optimizer yet: call `create_optimizer` or `train` first.")
        return self.optimizer
