"""A callback that stops the training: it returns what to change as a dictionary, no control object needed."""

from typing import Any

from common import read_options, show

from finetune import SFTConfig, SFTTrainer, TrainerCallback


class StopWhenGood(TrainerCallback):
    """Stops and saves once the loss is below a share of the first one that was logged."""

    def __init__(self, share: float) -> None:
        self.share = share

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> Any:
        """Returns the flags to set, or None to go on."""
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        if losses and losses[-1] < self.share * losses[0]:
            return {"should_training_stop": True, "should_save": True}
        return None


options = read_options(__doc__, "runs/stopping-callback")
args = SFTConfig(**options.settings(logging_steps=1))
trainer = SFTTrainer(model=options.model, args=args, train_dataset=options.rows(), callbacks=[StopWhenGood(share=0.9)])
trainer.train()
show(trainer)
