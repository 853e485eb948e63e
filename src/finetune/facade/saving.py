"""The saving half of the facade: checkpoints, weights, and the Hub."""

from finetune.facade.base import TrainerBase


class SavingMethods(TrainerBase):
    """Checkpoints and the Hub. Use `Trainer`."""
