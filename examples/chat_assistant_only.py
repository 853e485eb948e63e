"""Chat rows of several turns, trained on what the assistant says and on nothing else."""

from typing import Any

from common import read_options, show

from finetune import SFTConfig, SFTTrainer

options = read_options(__doc__, "runs/chat")
rows: Any = options.rows()
chats = rows.map(
    lambda row: {"messages": [*row["prompt"], *row["completion"], {"role": "user", "content": "Thanks!"}]},
    remove_columns=rows.column_names,
)
args = SFTConfig(**options.settings(assistant_only_loss=True))
trainer = SFTTrainer(model=options.model, args=args, train_dataset=chats)
trainer.train()
show(trainer)
