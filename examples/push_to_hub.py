"""Upload checkpoints while training, and the model with its card at the end.

Log in first (`hf auth login`). `HF_ENDPOINT` names another server than huggingface.co.
"""

import os

from common import read_options, show

from finetune import SFTConfig, SFTTrainer

options = read_options(__doc__, "runs/push-to-hub")
args = SFTConfig(
    **options.settings(
        push_to_hub=True,
        hub_model_id=os.environ.get("HUB_MODEL_ID", "finetune-demo"),
        hub_strategy="every_save",
        hub_private_repo=True,
        save_strategy="steps",
        save_steps=max(1, options.max_steps // 2),
    )
)
trainer = SFTTrainer(model=options.model, args=args, train_dataset=options.rows())
trainer.train()
show(trainer)
print(trainer.push_to_hub(commit_message="Done"))
