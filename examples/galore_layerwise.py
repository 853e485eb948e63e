"""GaLore layer by layer: each gradient is projected as soon as backward has made it, so they never exist all at once.

Here with gradient accumulation, which works because the projected gradients are what is accumulated.
"""

from common import read_options, show

from finetune import SFTConfig, SFTTrainer

options = read_options(__doc__, "runs/galore-layerwise")
args = SFTConfig(
    **options.settings(
        optim="galore_adamw_layerwise",
        optim_target_modules=["attn", "mlp"],
        optim_args="rank=8, update_proj_gap=50, scale=0.25",
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
    )
)
trainer = SFTTrainer(model=options.model, args=args, train_dataset=options.rows())
trainer.train()
show(trainer)
