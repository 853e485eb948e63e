r"""Fine-tuning for sequence classification: one class, several classes, or a number for a text or a pair of texts.

All weights:

    finetune classify \
        --model_name_or_path google-bert/bert-base-cased \
        --dataset_name imdb --class_weights balanced \
        --learning_rate 2e-5 --num_train_epochs 2 --per_device_train_batch_size 16 --eval_strategy epoch \
        --output_dir bert-imdb

A LoRA adapter (the head is trained with it) on local rows with `text` and `label`, a tenth held out for evaluation:

    finetune classify \
        --model_name_or_path ./my-model --dataset_name rows.csv \
        --dataset_train_split "train[:90%]" --dataset_test_split "train[90%:]" --eval_strategy epoch \
        --use_peft --lora_target_modules all-linear --learning_rate 2e-4 \
        --output_dir my-adapter

Other columns: `--text_columns premise hypothesis --label_column entailed`. Several processes: `finetune classify
--accelerate_config ddp --num_processes 4 ...`. Arguments from a file: `--config run.yaml`; the command line takes
precedence. `--help` lists all arguments. To continue an interrupted run, repeat its command with
`--resume_from_checkpoint auto`. From a checkout, `accelerate launch trainers/sequence_classification.py ...` works as
well.
"""

from collections.abc import Sequence
from typing import Any


def parse(argv: Sequence[str] | None = None, prog: str | None = None) -> tuple[Any, Any, Any, Any]:
    """Returns (ScriptArguments, SequenceClassificationConfig, ModelConfig, DatasetMixtureConfig), checked early."""
    from finetune import SequenceClassificationConfig, parse_program

    return parse_program(SequenceClassificationConfig, argv, prog=prog, description=__doc__)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Trains, evaluates if asked, and saves."""
    script_args, training_args, model_args, dataset_args = parse(argv, prog)

    from finetune import (
        SequenceClassificationTrainer,
        finish_program,
        get_peft_config,
        get_quantization_config,
        ignore_bias_buffers,
        load_datasets,
        with_model_options,
    )

    train_dataset, eval_dataset = load_datasets(script_args, dataset_args, evaluate=training_args.eval_strategy != "no")
    trainer = SequenceClassificationTrainer(
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
    finish_program(trainer, result, {"dataset": script_args.dataset_name}, evaluate=eval_dataset is not None)


if __name__ == "__main__":
    from finetune import run_program

    raise SystemExit(run_program(main))
