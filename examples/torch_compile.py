"""`torch.compile`, layer by layer: the first steps take long, the others are faster; the log counts compilations."""

from common import read_options, show

from finetune import SFTConfig, SFTTrainer

options = read_options(__doc__, "runs/torch-compile")
args = SFTConfig(**options.settings(torch_compile=True))
trainer = SFTTrainer(model=options.model, args=args, train_dataset=options.rows())
trainer.train()
show(trainer)
