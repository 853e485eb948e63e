"""A dataset that is read while training, for data that fits neither memory nor disk. `max_steps` ends the run."""

from common import read_options, show
from datasets import load_dataset

from finetune import SFTConfig, SFTTrainer

options = read_options(__doc__, "runs/streaming")
stream = load_dataset("json", data_files=str(options.data / "train.jsonl"), split="train", streaming=True)
trainer = SFTTrainer(
    model=options.model, args=SFTConfig(**options.settings()), train_dataset=stream.shuffle(seed=0, buffer_size=200)
)
trainer.train()
show(trainer)
