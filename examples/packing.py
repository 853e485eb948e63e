"""Packing: rows of `max_length` tokens filled with several samples, which do not see each other."""

from common import read_options, show

from finetune import SFTConfig, SFTTrainer

options = read_options(__doc__, "runs/packing")
args = SFTConfig(**options.settings(packing=True, max_length=512, per_device_train_batch_size=4))
trainer = SFTTrainer(model=options.model, args=args, train_dataset=options.rows())
trainer.train()
show(trainer)
