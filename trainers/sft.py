r"""Supervised fine-tuning of a causal language model.

All weights:

    finetune sft \
        --model_name_or_path Qwen/Qwen2.5-0.5B \
        --dataset_name trl-lib/Capybara \
        --learning_rate 2e-5 --num_train_epochs 1 --packing \
        --per_device_train_batch_size 2 --gradient_accumulation_steps 8 \
        --output_dir Qwen2.5-0.5B-SFT

A LoRA adapter on local rows (`text`, `prompt` and `completion`, or `messages`), a tenth held out for evaluation:

    finetune sft \
        --model_name_or_path ./my-model --dataset_name rows.jsonl \
        --dataset_train_split "train[:90%]" --dataset_test_split "train[90%:]" --eval_strategy epoch \
        --use_peft --lora_target_modules all-linear --learning_rate 2e-4 \
        --output_dir my-adapter

Several processes: `finetune sft --accelerate_config ddp --num_processes 4 ...`. Arguments from a file: `--config
run.yaml`; the command line takes precedence. `--help` lists all arguments. To continue an interrupted run, repeat its
command with `--resume_from_checkpoint auto`. From a checkout, `accelerate launch trainers/sft.py ...` works as well.
"""

from collections.abc import Sequence
from typing import Any


def parse(argv: Sequence[str] | None = None, prog: str | None = None) -> tuple[Any, Any, Any, Any]:
    """Returns (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig), checked early."""
    from finetune import SFTConfig, parse_program

    return parse_program(SFTConfig, argv, prog=prog, description=__doc__)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Trains and saves."""
    script_args, training_args, model_args, dataset_args = parse(argv, prog)

    from finetune import (
        SFTTrainer,
        finish_program,
        get_peft_config,
        get_quantization_config,
        ignore_bias_buffers,
        load_datasets,
        with_model_options,
    )

    train_dataset, eval_dataset = load_datasets(script_args, dataset_args, evaluate=training_args.eval_strategy != "no")
    trainer = SFTTrainer(
        model=model_args.model_name_or_path,
        args=with_model_options(training_args, model_args),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    if script_args.ignore_bias_buffers:
        ignore_bias_buffers(trainer.model)
    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    finish_program(trainer, result, {"dataset_name": script_args.dataset_name})


if __name__ == "__main__":
    from finetune import run_program

    raise SystemExit(run_program(main))
