"""Supervised fine-tuning in one line: model, tokenizer, format, masks and labels are found by the trainer."""

from common import read_options

from finetune import SFTConfig, SFTTrainer

options = read_options(__doc__, "runs/sft-one-line")
# `max_steps` only keeps the example short.
args = SFTConfig(options.output_dir, max_steps=options.max_steps, report_to="none")

SFTTrainer(model=options.model, args=args, train_dataset=options.rows()).train()
