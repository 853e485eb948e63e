"""`torch.compile`: the first steps take long, the others are faster. Samples are padded to few different lengths."""

from common import read_options, show

from finetune import SFTConfig, SFTTrainer

options = read_options(__doc__, "runs/torch-compile")
args = SFTConfig(**options.settings(torch_compile=True, padding_free=False, pad_to_multiple_of=64))
trainer = SFTTrainer(model=options.model, args=args, train_dataset=options.rows())
trainer.train()
show(trainer)
