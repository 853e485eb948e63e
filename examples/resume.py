"""Stop in the middle, resume from the checkpoint, and end with the weights of a run that never stopped, bit by bit."""

import torch
from common import read_options, show

from finetune import SFTConfig, SFTTrainer

options = read_options(__doc__, "runs/resume")
half = max(1, options.max_steps // 2)


def make(folder: str, steps: int) -> SFTTrainer:
    """Returns a trainer for `steps` steps that saves after half of all."""
    settings = {"max_steps": steps, "save_strategy": "steps", "save_steps": half, "lr_scheduler_type": "constant"}
    args = SFTConfig(**options.settings(output_dir=f"{options.output_dir}/{folder}", logging_steps=1, **settings))
    return SFTTrainer(model=options.model, args=args, train_dataset=options.rows())


whole = make("whole", options.max_steps)
whole.train()
make("resumed", half).train()
resumed = make("resumed", options.max_steps)
resumed.train(resume_from_checkpoint=True)
show(resumed)
pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
print("the same weights:", all(torch.equal(one, other) for one, other in pairs))
