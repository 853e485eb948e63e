"""Fine-tune and evaluate on a GLUE task, or on your own CSV or JSON files, with the flags of the well-known script.

    python examples/run_glue.py \
        --model_name_or_path google-bert/bert-base-cased --task_name mrpc --do_train --do_eval \
        --max_seq_length 128 --per_device_train_batch_size 32 --learning_rate 2e-5 --num_train_epochs 3 \
        --output_dir runs/mrpc

    python examples/run_glue.py \
        --model_name_or_path ./my-model --train_file train.csv --validation_file dev.csv --test_file test.csv \
        --do_train --do_eval --do_predict --output_dir runs/mine

Several processes: `accelerate launch examples/run_glue.py ...`. The metrics are those of the benchmark, computed here:
nothing is downloaded but the dataset of `--task_name`. Written to `output_dir`: the model and its card,
`all_results.json`, and `predict_results_<task>.txt` with one line for each test row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from finetune import (
    ArgumentError,
    SequenceClassificationConfig,
    SequenceClassificationTrainer,
    check_before_start,
    load_datasets,
    parse_arguments,
    run_program,
)

# Task: text columns, and the metrics of the benchmark.
TASKS: dict[str, tuple[list[str], list[str]]] = {
    "cola": (["sentence"], ["matthews_correlation"]),
    "mnli": (["premise", "hypothesis"], ["accuracy"]),
    "mrpc": (["sentence1", "sentence2"], ["accuracy", "f1"]),
    "qnli": (["question", "sentence"], ["accuracy"]),
    "qqp": (["question1", "question2"], ["accuracy", "f1"]),
    "rte": (["sentence1", "sentence2"], ["accuracy"]),
    "sst2": (["sentence"], ["accuracy"]),
    "stsb": (["sentence1", "sentence2"], ["pearson", "spearman"]),
    "wnli": (["sentence1", "sentence2"], ["accuracy"]),
}


@dataclass
class GlueArguments:
    """Task, files and model."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Folder or Hub id."})
    task_name: str | None = field(default=None, metadata={"help": f"One of {', '.join(TASKS)}."})
    train_file: str | None = field(default=None, metadata={"help": "CSV or JSON file to train on."})
    validation_file: str | None = field(default=None, metadata={"help": "CSV or JSON file to evaluate on."})
    test_file: str | None = field(default=None, metadata={"help": "CSV or JSON file to predict."})
    max_seq_length: int | None = field(default=None, metadata={"help": "Another name for `max_length`."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first rows only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first rows only."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Predict the first rows only."})
    dataset_name: str = field(default="nyu-mll/glue", metadata={"help": "Where the tasks of `task_name` are."})


@dataclass
class GlueConfig(SequenceClassificationConfig):
    """Arguments of training, with the length of the well-known script."""

    max_length: int | None = field(default=128, metadata={"help": "Longest sequence in tokens."})


def read_data(options: GlueArguments) -> dict[str, Any]:
    """Returns the datasets by what they are used for: "train", "validation", "validation_mm", "test", ..."""
    from finetune import ScriptArguments

    def read(name: str, split: str = "train", config: str | None = None, limit: int | None = None) -> Any:
        asked = ScriptArguments(dataset_name=name, dataset_config=config, dataset_train_split=split)
        rows = load_datasets(asked, evaluate=False)[0]
        return rows if limit is None else rows.select(range(min(limit, len(rows))))

    limits = {"train": options.max_train_samples, "validation": options.max_eval_samples}
    limits["test"] = options.max_predict_samples
    if options.task_name is None:
        files = {"train": options.train_file, "validation": options.validation_file, "test": options.test_file}
        if files["train"] is None:
            raise ArgumentError("give `--task_name`, or your own `--train_file` (and `--validation_file`).")
        return {part: read(file, limit=limits[part]) for part, file in files.items() if file is not None}
    if options.task_name not in TASKS:
        raise ArgumentError(f"`--task_name` is {options.task_name!r}; there are {', '.join(TASKS)}.")
    splits = ["train", "validation", "test"]
    if options.task_name == "mnli":
        splits = ["train", "validation_matched", "test_matched", "validation_mismatched", "test_mismatched"]
    return {
        split.replace("_matched", "").replace("mismatched", "mm"): read(
            options.dataset_name, split, options.task_name, limits[split.split("_")[0]]
        )
        for split in splits
    }


def write_predictions(path: Path, trainer: Any, rows: Any) -> None:
    """Writes `index<TAB>class or number` for every row."""
    predicted = trainer.predict(rows, metric_key_prefix="predict").predictions
    names, kind = trainer.task.names, trainer.task.problem_type
    if not trainer.is_world_process_zero():
        return
    if kind == "regression":
        written = [f"{row[0]:.3f}" for row in predicted]
    elif kind == "multi_label_classification":
        written = [" ".join(name for name, score in zip(names, row, strict=True) if score > 0) for row in predicted]
    else:
        written = [names[index] for index in predicted.argmax(-1)]
    lines = ["index\tprediction", *(f"{index}\t{text}" for index, text in enumerate(written))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, evaluates and predicts, as asked."""
    options, args = parse_arguments((GlueArguments, GlueConfig), argv)
    if args.do_train:
        check_before_start(args, options.model_name_or_path)
    elif not options.model_name_or_path:
        raise ArgumentError("No model given. Give a folder or a Hub id: `--model_name_or_path`.")
    data = read_data(options)
    texts, wanted = (args.text_columns, None) if options.task_name is None else TASKS[options.task_name]
    args = replace(args, max_length=options.max_seq_length or args.max_length, text_columns=texts)
    trainer = SequenceClassificationTrainer(
        model=options.model_name_or_path,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data.get("validation"),
    )

    if args.do_train:
        result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    for part in [part for part in data if part.startswith("validation")] if args.do_eval else []:
        metrics = trainer.evaluate(data[part])
        suffix = part.removeprefix("validation")
        if wanted is not None:
            kept = {f"eval_{name}" for name in [*wanted, "loss", "runtime", "samples_per_second", "steps_per_second"]}
            metrics = {name: value for name, value in metrics.items() if name in kept or name == "epoch"}
        metrics = {f"{name}{suffix}": value for name, value in metrics.items()}
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    for part in [part for part in data if part.startswith("test")] if args.do_predict else []:
        name = (options.task_name or "file") + part.removeprefix("test")
        write_predictions(Path(args.output_dir) / f"predict_results_{name}.txt", trainer, data[part])
    card: dict[str, Any] = {"tasks": "text-classification"}
    if options.task_name is not None:
        card |= {"language": "en", "dataset_tags": "glue", "dataset_args": options.task_name}
    if args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)
    trainer.end()


if __name__ == "__main__":
    raise SystemExit(run_program(main))
