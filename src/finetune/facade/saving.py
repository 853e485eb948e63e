"""The saving half of the facade: checkpoints, weights, and the Hub."""

from typing import Any

from torch import nn

from finetune.checkpoint import manager as checkpoints
from finetune.facade.base import TrainerBase
from finetune.hub import card, repo


class SavingMethods(TrainerBase):
    """Checkpoints and the Hub. Use `Trainer`."""
