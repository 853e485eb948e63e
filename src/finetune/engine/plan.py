"""How many steps, batches and samples a run has, and where a resumed one starts. Arithmetic only.

Example: 10 batches per epoch, accumulation 4, 2 epochs. An epoch has 3 updates of 4, 4 and 2 batches, the run has
6 updates. A run resumed at update 4 starts in epoch 1 with 1 update, hence 4 batches, already done.

>>> plan = StepPlan.resolve(
...     num_batches=10, num_examples=20, accumulation=4, num_train_epochs=2, max_steps=-1, total_batch_size=8
... )
>>> plan.max_steps, [plan.batches_in_update(u) for u in range(plan.updates_per_epoch)]
(6, [4, 4, 2])
>>> plan.resume_at(4)
ResumePoint(epoch=1, updates_done=1, batches_done=4)
"""

import math
import sys
from dataclasses import dataclass
from typing import Any

from finetune.errors import ArgumentError


@dataclass(frozen=True)
class ResumePoint:
    """Where in the data a run starts: epoch, and what is done of it in updates and in micro-batches."""

    epoch: int = 0
    updates_done: int = 0
    batches_done: int = 0


@dataclass(frozen=True)
class StepPlan:
    """The schedule of one `train()` call. Agrees with `transformers.Trainer.set_initial_training_values`.

    Attributes:
        num_train_epochs: epochs to iterate over, the last one possibly not to its end.
        updates_per_epoch: optimizer steps per epoch.
        batches_per_epoch: micro-batches per epoch and process; for an unsized stream the whole run is one epoch.
        accumulation: micro-batches per optimizer step.
        num_examples: rows of the dataset (an upper bound for an unsized stream).
        num_train_samples: rows seen by the whole run, all processes together.
        total_batch_size: rows per optimizer step, all processes together.
        max_steps: optimizer steps of the whole run.
    """

    num_train_epochs: int
    updates_per_epoch: int
    batches_per_epoch: int
    accumulation: int
    num_examples: int
    num_train_samples: float
    total_batch_size: int
    max_steps: int

    @classmethod
    def resolve(
        cls,
        *,
        num_batches: int | None,
        num_examples: int | None,
        accumulation: int,
        num_train_epochs: float,
        max_steps: int,
        total_batch_size: int,
    ) -> "StepPlan":
        """Returns the plan for a loader of `num_batches` micro-batches (None: not known).

        Raises:
            ArgumentError: the loader has no batch, or no length while `max_steps` does not give one.
        """
        if num_batches == 0:
            raise ArgumentError(
                f"The training data has {num_examples or 0} rows and gives no batch. Pass more rows, or lower "
                "`per_device_train_batch_size` where `dataloader_drop_last` drops all of them."
            )
        if num_batches is None:
            if max_steps <= 0:
                raise ArgumentError(
                    f"The training dataset has no known length and `max_steps` is {max_steps}. "
                    "Set `max_steps` to a positive number of optimizer steps."
                )
            samples = max_steps * total_batch_size
            return cls(
                num_train_epochs=sys.maxsize,
                updates_per_epoch=max_steps,
                batches_per_epoch=max_steps * accumulation,
                accumulation=accumulation,
                num_examples=samples,
                num_train_samples=samples,
                total_batch_size=total_batch_size,
                max_steps=max_steps,
            )
        updates = max(math.ceil(num_batches / accumulation), 1)
        rows = num_examples if num_examples is not None else num_batches * total_batch_size
        if max_steps >= 0:
            epochs, samples = math.ceil(max_steps / updates), max_steps * total_batch_size
        else:
            epochs, samples = math.ceil(num_train_epochs), rows * num_train_epochs
            max_steps = math.ceil(num_train_epochs * updates)
        return cls(
            num_train_epochs=epochs,
            updates_per_epoch=updates,
            batches_per_epoch=num_batches,
            accumulation=accumulation,
            num_examples=rows,
            num_train_samples=samples,
            total_batch_size=total_batch_size,
            max_steps=max_steps,
        )

    @property
    def has_epochs(self) -> bool:
        """Whether the length of an epoch is known; a stream without length is read until `max_steps`."""
        return self.num_train_epochs != sys.maxsize

    @property
    def values(self) -> tuple[int, int, int, float, int, int, int]:
        """The plan in the order of `transformers.Trainer.set_initial_training_values`."""
        return (
            self.num_train_epochs,
            self.updates_per_epoch,
            self.num_examples,
            self.num_train_samples,
            self.total_batch_size,
            self.batches_per_epoch,
            self.max_steps,
        )

    @classmethod
    def from_values(cls, accumulation: int, values: tuple[Any, ...]) -> "StepPlan":
        """Returns the plan that has these `values`, as an override of that method may return them."""
        epochs, updates, examples, samples, total_batch_size, batches, max_steps = values
        return cls(epochs, updates, batches, accumulation, examples, samples, total_batch_size, max_steps)

    def batches_in_update(self, update: int) -> int:
        """Returns how many micro-batches update number `update` of an epoch has: fewer for the last one."""
        if update < self.updates_per_epoch - 1:
            return self.accumulation
        return self.batches_per_epoch % self.accumulation or self.accumulation

    def resume_at(self, global_step: int, *, skip_data: bool = True) -> ResumePoint:
        """Returns where a run that has done `global_step` updates continues.

        With `skip_data` False (`ignore_data_skip`) the data starts at the beginning of that epoch again.
        """
        epoch, updates = divmod(global_step, self.updates_per_epoch)
        if not skip_data:
            return ResumePoint(epoch=epoch)
        return ResumePoint(epoch=epoch, updates_done=updates, batches_done=updates * self.accumulation)
