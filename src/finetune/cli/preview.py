"""`finetune preview`: the rows of a data set as the model is trained on them, before any training."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from finetune.arguments import arg

_TRAINED, _GIVEN, _END = "\033[32m", "\033[2m", "\033[0m"


@dataclass
class PreviewArguments:
    """What to show."""

    rows: int = arg(3, "Rows to show.")
    counted_rows: int = arg(1000, "Rows to count tokens in, from the start of the data set.")


def run_preview(argv: Sequence[str] | None = None) -> None:
    """Prints rows with the trained tokens in colour (between ⟦ ⟧ where there is none), and counts over more rows.

    Takes the arguments of `finetune sft`. Only the tokenizer of the model is loaded.
    """
    from finetune.arguments.parse import parse_arguments
    from finetune.cli.datasets import load_datasets
    from finetune.cli.script_arguments import ModelConfig, ScriptArguments, with_model_options
    from finetune.errors import ArgumentError
    from finetune.sft.config import SFTConfig

    types = (PreviewArguments, ScriptArguments, SFTConfig, ModelConfig)
    options, script_args, args, model_args = parse_arguments(types, argv, prog="finetune preview")
    for name in ("rows", "counted_rows"):
        if (number := getattr(options, name)) < 1:
            raise ArgumentError(f"`{name}` is {number}; it must be at least 1.")
    if not model_args.model_name_or_path:
        raise ArgumentError("no model was named. Give a folder or a Hub id: `--model_name_or_path`.")
    from datasets import Dataset

    from finetune.data.audit import audit_table
    from finetune.data.pipeline import prepare_split
    from finetune.data.rows import IGNORE_INDEX
    from finetune.data.settings import DataSettings
    from finetune.sft.build import load_tokenizer_for_sft

    dataset, _ = load_datasets(script_args, evaluate=False)
    args = with_model_options(args, model_args)
    tokenizer = load_tokenizer_for_sft(args, model_args.model_name_or_path).processing_class
    some = Dataset.from_list(list(islice(dataset, max(options.rows, options.counted_rows))))
    split = prepare_split(some, tokenizer, DataSettings.from_args(args, packing=False), say=lambda line: None)
    for number, row in enumerate(islice(split.dataset, options.rows)):
        trained = sum(label != IGNORE_INDEX for label in row["labels"])
        print(f"--- row {number}: {len(row['labels'])} tokens, {trained} of them trained on")
        print(marked_text(tokenizer, row, colours=sys.stdout.isatty()) + "\n")
    print(audit_table({"train": split.audit}))


def marked_text(tokenizer: Any, row: dict[str, Any], *, colours: bool) -> str:
    """Returns the text of a tokenized row with the stretches that are trained on marked."""
    start, end = (_TRAINED, _END) if colours else ("⟦", "⟧")
    parts = []
    for is_trained, ids in stretches(row["input_ids"], row["labels"]):
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        given = f"{_GIVEN}{text}{_END}" if colours else text
        parts.append(f"{start}{text}{end}" if is_trained else given)
    return "".join(parts)


def stretches(input_ids: Sequence[int], labels: Sequence[int]) -> Iterator[tuple[bool, list[int]]]:
    """Yields the longest runs of tokens that are all trained on, or all not.

    >>> list(stretches([5, 6, 7], [-100, 6, 7]))
    [(False, [5]), (True, [6, 7])]
    """
    from finetune.data.rows import IGNORE_INDEX

    run: list[int] = []
    for index, token in enumerate(input_ids):
        if run and (labels[index] == IGNORE_INDEX) != (labels[index - 1] == IGNORE_INDEX):
            yield labels[index - 1] != IGNORE_INDEX, run
            run = []
        run.append(token)
    if run:
        yield labels[len(input_ids) - 1] != IGNORE_INDEX, run
