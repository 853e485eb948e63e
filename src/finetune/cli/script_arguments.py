"""Arguments of the programs besides those of the trainer: which data, which model, which adapter. Flags as in TRL."""

# ruff: noqa: RUF009

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from finetune.arguments import arg, replace_arguments
from finetune.errors import ArgumentError, ModelLoadError, nearest

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

_DTYPES = ["auto", "bfloat16", "float16", "float32"]
# What makes a name of layers a regular expression; a dot does not, paths have dots.
_PATTERN_SIGNS = frozenset(r"\^$*+?()[]{}|")

Arguments = TypeVar("Arguments", bound=Any)


@dataclass
class DatasetConfig:
    """One dataset of a mixture; fields and meaning as in TRL.

    `fraction` is the dataset's share of the mixture, on any scale, given for all datasets or for none. As many of the
    first rows of each are taken as the shares allow without repeating a dataset: with 100 and 1000 rows and shares 1
    and 3 the mixture has 100 + 300 rows. One epoch sees each row once.
    """

    path: str
    name: str | None = None
    data_dir: str | None = None
    data_files: str | list[str] | dict[str, str] | None = None
    split: str = "train"
    columns: list[str] | None = None
    fraction: float | None = None


@dataclass
class DatasetMixtureConfig:
    """A mixture of datasets, best written in a YAML file."""

    datasets: list[dict[str, Any]] = arg(
        help="Datasets to train on together: `path`, `split`, `columns`, `fraction`, ... of each.",
        factory=list,
    )
    streaming: bool = arg(False, "Read the mixture while training instead of before.")
    test_split_size: float | None = arg(
        None, "Part of the mixture that is held out for evaluation: a share below 1, or rows."
    )

    def __post_init__(self) -> None:
        self.datasets = [_dataset_config(each) for each in self.datasets]  # pyright: ignore[reportAttributeAccessIssue]


def _dataset_config(given: Any) -> DatasetConfig:
    if isinstance(given, DatasetConfig):
        return given
    known = [field.name for field in dataclasses.fields(DatasetConfig)]
    for name in given:
        if name not in known:
            raise ArgumentError(f"`datasets`: {name!r} is not known; allowed are {known}.{nearest(str(name), known)}")
    if "path" not in given:
        raise ArgumentError(f"`datasets`: an entry without `path`: {given}. Name a Hub id, a file or a folder.")
    return DatasetConfig(**given)


@dataclass
class ScriptArguments:
    """Which dataset to train on."""

    dataset_name: str | None = arg(
        None, "Hub id, a file (JSON, JSONL, CSV, Parquet, Arrow), a folder of such files, or one of `save_to_disk`."
    )
    dataset_config: str | None = arg(None, "Configuration (subset) of a dataset that has several.")
    dataset_train_split: str = arg("train", "Split to train on; a part of one is written `train[:90%]`.")
    dataset_test_split: str = arg("test", "Split to evaluate on, used unless `eval_strategy` is `no`.")
    dataset_streaming: bool = arg(False, "Read the dataset while training instead of before.")
    ignore_bias_buffers: bool = arg(False, "Leave boolean buffers out of DDP's broadcast (old GPT-2 like models).")


@dataclass
class ModelConfig:
    """Which model to load, how, and whether to train all of it or an adapter."""

    model_name_or_path: str | None = arg(None, "Folder written by `save_pretrained`, or Hub id.")
    model_revision: str = arg("main", "Branch, tag or commit of a model from the Hub.")
    dtype: str | None = arg(
        "float32", "Type of the weights in memory; `auto` takes the file's.", choices=_DTYPES, old=["torch_dtype"]
    )
    attn_implementation: str | None = arg(None, "Attention: `sdpa`, `eager`, `flash_attention_2`, ...")
    use_peft: bool = arg(False, "Train a LoRA adapter instead of all weights.")
    lora_r: int = arg(16, "Rank of the adapter.")
    lora_alpha: int = arg(32, "Scale of the adapter, divided by its rank.")
    lora_dropout: float = arg(0.05, "Dropout in front of the adapter.")
    lora_target_modules: list[str] | None = arg(
        None, "Names of the layers to adapt, a regular expression for their paths, or `all-linear`."
    )
    lora_target_parameters: list[str] | None = arg(None, "Names of the parameters to adapt (experts, for one).")
    lora_modules_to_save: list[str] | None = arg(None, "Layers that are trained and saved in full.")
    lora_task_type: str = arg("CAUSAL_LM", "PEFT's task type.")
    use_rslora: bool = arg(False, "Scale by `lora_alpha / sqrt(lora_r)`.")
    use_dora: bool = arg(False, "Learn size and direction of the weights apart.")
    load_in_8bit: bool = arg(False, "Hold the frozen weights in 8 bits (bitsandbytes).")
    load_in_4bit: bool = arg(False, "Hold the frozen weights in 4 bits (bitsandbytes).")
    bnb_4bit_quant_type: str = arg("nf4", "Kind of 4-bit number.", choices=["fp4", "nf4"])
    use_bnb_nested_quant: bool = arg(False, "Quantize the scales of the 4-bit weights as well.")
    bnb_4bit_quant_storage: str | None = arg(None, "Type in which 4-bit weights are stored; FSDP needs `dtype`.")

    def __post_init__(self) -> None:
        if self.load_in_8bit and self.load_in_4bit:
            raise ArgumentError("`load_in_8bit` and `load_in_4bit` exclude each other. Keep one.")
        if self.lora_r < 1:
            raise ArgumentError(f"`lora_r` is {self.lora_r}; it must be at least 1.")
        self.lora_target_modules = _target_modules(self.lora_target_modules)


def _target_modules(names: Any) -> Any:
    """Returns what PEFT understands as what was meant: names as a list, a pattern or `all-linear` as a text.

    PEFT matches a text with the whole path of a layer, so "q_proj" alone would match none; of a list it compares the
    ends. The flag makes a list of either.
    """
    if not isinstance(names, list) or len(names) != 1:
        return names
    is_pattern = names[0].lower() == "all-linear" or any(sign in names[0] for sign in _PATTERN_SIGNS)
    return names[0] if is_pattern else names


def get_peft_config(model_args: ModelConfig) -> LoraConfig | None:
    """Returns the LoRA configuration that the flags describe, or None without `use_peft`."""
    if not model_args.use_peft:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ModelLoadError("`use_peft` needs the package peft. Install it: `pip install peft`.") from error
    return LoraConfig(
        task_type=model_args.lora_task_type,
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules=model_args.lora_target_modules,
        target_parameters=model_args.lora_target_parameters,
        modules_to_save=model_args.lora_modules_to_save,
        use_rslora=model_args.use_rslora,
        use_dora=model_args.use_dora,
        bias="none",
    )


def get_quantization_config(model_args: ModelConfig) -> BitsAndBytesConfig | None:
    """Returns the bitsandbytes configuration that the flags describe, or None without `load_in_8bit`/`load_in_4bit`."""
    if not (model_args.load_in_8bit or model_args.load_in_4bit):
        return None
    from transformers import BitsAndBytesConfig

    if model_args.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=None if model_args.dtype == "auto" else model_args.dtype,
        bnb_4bit_quant_type=model_args.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=model_args.use_bnb_nested_quant,
        bnb_4bit_quant_storage=model_args.bnb_4bit_quant_storage,
    )


def with_model_options(args: Arguments, model_args: ModelConfig) -> Arguments:
    """Returns a copy of the training arguments whose `model_init_kwargs` hold the flags of `model_args` as well.

    What `model_init_kwargs` says itself wins.
    """
    options = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    given = {name: value for name, value in options.items() if value is not None}
    return replace_arguments(args, model_init_kwargs={**given, **(args.model_init_kwargs or {})})
