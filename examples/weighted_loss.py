"""A custom loss by overriding `compute_loss`: the first tokens of an answer count three times.

`num_items_in_batch` is the number of trained tokens of the whole optimizer step, over all micro-batches and
processes: a sum divided by it is right for every accumulation and every number of processes.
"""

from typing import Any

import torch
from common import read_options, show

from finetune import SFTConfig, SFTTrainer


class FirstTokensTrainer(SFTTrainer):
    """Weighs the first five trained tokens of each row."""

    loss_is_scaled_for_ga = True  # what is returned below was divided by `num_items_in_batch`

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Returns the weighted sum of the token losses / the number of tokens."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        outputs = model(**inputs, use_cache=False)
        logits, targets = outputs.logits[:, :-1].float(), labels[:, 1:]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")  # (B, T - 1)
        trained = targets.ne(-100)
        weights = torch.where(trained.cumsum(1) <= 5, 3.0, 1.0) * trained
        count = trained.sum() if num_items_in_batch is None else num_items_in_batch
        loss = (losses * weights).sum() / count
        return (loss, outputs) if return_outputs else loss


options = read_options(__doc__, "runs/weighted-loss")
# The rows of a padding-free batch are concatenated in one row; here each needs its own.
args = SFTConfig(**options.settings(padding_free=False))
trainer = FirstTokensTrainer(model=options.model, args=args, train_dataset=options.rows())
trainer.train()
show(trainer)
