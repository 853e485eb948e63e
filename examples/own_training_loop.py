"""A custom training loop by overriding `train`: the loop calls the parts of the trainer."""

from typing import Any

from common import read_options, show

from finetune import SFTConfig, SFTTrainer


class PlainLoopTrainer(SFTTrainer):
    """One batch, one step, nothing else."""

    def train(self, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Trains `max_steps` batches and returns the last loss."""
        loader = self.get_train_dataloader()
        self.create_optimizer_and_scheduler(num_training_steps=self.args.max_steps)
        assert self.optimizer is not None
        model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        loss = None
        # Attention within packed samples, the fused loss, ...: what `SFTTrainer.train` would turn on.
        with self.model_features():
            while self.state.global_step < self.args.max_steps:
                for batch in loader:
                    model.train()
                    loss = self.compute_loss(model, self._prepare_inputs(batch))
                    self.accelerator.backward(loss)
                    self.optimizer.step()
                    self.lr_scheduler.step()
                    self.optimizer.zero_grad()
                    self.state.global_step += 1
                    self.log({"loss": loss.item()})
                    if self.state.global_step >= self.args.max_steps:
                        break
        return loss


options = read_options(__doc__, "runs/own-training-loop")
args = SFTConfig(**options.settings())
trainer = PlainLoopTrainer(model=options.model, args=args, train_dataset=options.rows())
trainer.train()
show(trainer)
