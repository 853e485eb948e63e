"""LoRA: the model stays as it is, a small adapter is trained and saved (needs `pip install peft`)."""

from common import read_options, show
from peft import LoraConfig

from finetune import SFTConfig, SFTTrainer

options = read_options(__doc__, "runs/lora")
trainer = SFTTrainer(
    model=options.model,
    args=SFTConfig(**options.settings(learning_rate=5e-3)),
    train_dataset=options.rows(),
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model()
show(trainer)
