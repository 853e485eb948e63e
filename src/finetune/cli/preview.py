r"""Show rows of a dataset as a model would be trained on them, and count trained, truncated and dropped tokens.

Takes the arguments of `finetune sft`; only the tokenizer of the model is loaded.

    finetune preview --model_name_or_path ./my-model --dataset_name rows.jsonl \
        --max_length 512 --rows 2
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from finetune.arguments import arg


@dataclass
class PreviewArguments:
    """What to show."""

    rows: int = arg(3, "Rows to show.")
    counted_rows: int = arg(1000, "Rows to count tokens in, from the start of the dataset.")


def run_preview(argv: Sequence[str] | None = None) -> None:
    """Prints rows with the trained tokens in colour (between « » without colour), and counts over more rows.

    Takes the arguments of `finetune sft`. Only the tokenizer of the model is loaded.
    """
    from finetune.arguments.parse import parse_arguments
    from finetune.cli.datasets import load_datasets
    from finetune.cli.script_arguments import DatasetMixtureConfig, ModelConfig, ScriptArguments, with_model_options
    from finetune.errors import ArgumentError
    from finetune.sft.config import SFTConfig

    types = (PreviewArguments, ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig)
    options, script_args, args, model_args, mixture = parse_arguments(
        types, argv, prog="finetune preview", description=__doc__
    )
    for name in ("rows", "counted_rows"):
        if (number := getattr(options, name)) < 1:
            raise ArgumentError(f"`{name}` is {number}; it must be at least 1.")
    if not model_args.model_name_or_path:
        raise ArgumentError("No model given. Give a folder or a Hub id: `--model_name_or_path`.")
    from datasets import Dataset

    from finetune.data.preparation.pipeline import prepare_split
    from finetune.data.preparation.settings import DataSettings
    from finetune.data.preview import audit_table, preview
    from finetune.sft.build import load_tokenizer_for_sft

    dataset, _ = load_datasets(script_args, mixture, evaluate=False)
    args = with_model_options(args, model_args)
    tokenizer = load_tokenizer_for_sft(args, model_args.model_name_or_path).processing_class
    some = Dataset.from_list(list(islice(dataset, max(options.rows, options.counted_rows))))
    settings = DataSettings.from_args(args, packing=False)
    split = prepare_split(some, tokenizer, settings, say=lambda line: None)
    print(preview(some, tokenizer, settings, num_rows=options.rows).to_terminal(color=sys.stdout.isatty()) + "\n")
    print(audit_table({"train": split.audit}))
