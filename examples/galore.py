"""GaLore: all weights are trained, the optimizer keeps its state in a low-rank space. Targets are regular expressions.

The state of a 128 x 384 matrix at rank 8 is 8 x 384 instead of 128 x 384, twice (arXiv:2403.03507).
"""

from common import read_options, show

from finetune import SFTConfig, SFTTrainer

options = read_options(__doc__, "runs/galore")
args = SFTConfig(
    **options.settings(
        optim="galore_adamw",
        optim_target_modules=[r".*self_attn.*", r".*mlp.*"],
        optim_args="rank=8, update_proj_gap=50, scale=0.25",
    )
)
trainer = SFTTrainer(model=options.model, args=args, train_dataset=options.rows())
trainer.train()
show(trainer)
