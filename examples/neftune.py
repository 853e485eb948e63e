"""NEFTune: noise on the embeddings while training (arXiv:2310.05914). Evaluation and the saved model have none."""

from common import read_options, show

from finetune import SFTConfig, SFTTrainer

options = read_options(__doc__, "runs/neftune")
args = SFTConfig(**options.settings(neftune_noise_alpha=5.0))
trainer = SFTTrainer(model=options.model, args=args, train_dataset=options.rows())
trainer.train()
show(trainer)
