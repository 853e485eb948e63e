r"""Estimate the memory per device of a training run, on one device and under DDP, FSDP2 and ZeRO.

Takes the arguments of `finetune sft`. Only the model's configuration is read; no GPU is needed, because the training
step runs on fake tensors, which have a size but no values.

    finetune plan --model Qwen/Qwen2.5-0.5B --max_length 2048 \
        --per_device_train_batch_size 4 --num_processes 8
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.arguments import arg
from finetune.errors import ArgumentError, FinetuneError, ModelLoadError

_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5}
# Public configurations, so that these names need no network. From the models' config.json on the Hub.
KNOWN_CONFIGS: dict[str, dict[str, Any]] = {
    "google/gemma-2b": {
        "model_type": "gemma", "vocab_size": 256000, "hidden_size": 2048, "intermediate_size": 16384,
        "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256,
        "max_position_embeddings": 8192, "tie_word_embeddings": True,
    },
    "meta-llama/Llama-3.2-1B": {
        **_LLAMA, "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen2.5-0.5B": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768, "tie_word_embeddings": True,
    },
    "HuggingFaceTB/SmolLM2-135M": {
        **_LLAMA, "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
}  # fmt: skip


@dataclass
class PlanArguments:
    """What to plan for."""

    model: str | None = arg(None, "The same as `model_name_or_path`; also a config.json.")
    num_processes: int = arg(8, "Devices over which DDP, FSDP2 and ZeRO divide the training.")


def run_plan(argv: Sequence[str] | None = None) -> None:
    """Prints the memory estimate of `finetune sft` with the same arguments: one device, DDP, FSDP2, ZeRO-1, 2 and 3."""
    from finetune.arguments.parse import parse_arguments
    from finetune.cli.script_arguments import ModelConfig
    from finetune.sft.config import SFTConfig

    types = (PlanArguments, SFTConfig, ModelConfig)
    options, args, model_args = parse_arguments(types, argv, prog="finetune plan", description=__doc__)
    print(plan_text(options, args, model_args))


def plan_text(options: PlanArguments, args: Any, model_args: Any) -> str:
    """Returns the estimate as text.

    Raises:
        ArgumentError: arguments that cannot be planned for, or that the training itself would refuse.
        ModelLoadError: the configuration cannot be read.
    """
    import torch

    from finetune.cli.script_arguments import get_peft_config
    from finetune.models.load import parse_dtype
    from finetune.optim.registry import optimizer_name, why_not_sharded
    from finetune.reporting.memory_estimate import BACKENDS, STRATEGIES, estimate_table, sharded, single
    from finetune.reporting.planned_step import PlannedStep, mixed_dtype

    name = options.model or model_args.model_name_or_path
    _check(name, options, args, model_args)
    assert name is not None
    config, source = read_config(name, trust_remote_code=args.trust_remote_code)
    parsed = parse_dtype(model_args.dtype)
    stored = parsed if isinstance(parsed, torch.dtype) else getattr(config, "dtype", None) or torch.float32
    options_of_model = {
        "peft_config": get_peft_config(model_args), "attn_implementation": model_args.attn_implementation,
    }  # fmt: skip
    print(f"Tracing a training step of {name} on fake tensors ...", file=sys.stderr, flush=True)
    try:
        with PlannedStep(config, args, stored, autocast=mixed_dtype(args), **options_of_model) as step:
            trace = narrow = step.trace()
        if step.autocast is not None:
            with PlannedStep(config, args, step.autocast, **options_of_model) as low:
                narrow = low.trace()
    except (NotImplementedError, RuntimeError, TypeError) as error:
        if isinstance(error, FinetuneError):
            raise
        raise FinetuneError(
            f"This training cannot be run on fake tensors: {type(error).__name__} {error}. Either the model or "
            f"`optim={optimizer_name(args.optim)}` asks for values or updates inside backward; plan with "
            "another `optim`, such as `adamw_torch`."
        ) from error
    sizes = step.sizes
    rows = [single(trace)]
    for way in STRATEGIES:
        row = sharded(way, options.num_processes, trace, narrow, sizes, trained_bytes=step.gradient_bytes)
        backend = BACKENDS[way]
        rows.append(dataclasses.replace(row, refused=why_not_sharded(args.optim, backend) if backend else ""))
    lines = [
        *_heading(name, source, step, args),
        "",
        estimate_table(rows),
        "",
        "Each group is shown at its largest; they peak at different moments, so the peak is less than their sum.",
        "One device is traced on fake tensors, the others are computed from it. Not included: the device's context,",
        "the allocator's rounding, and the kernels' own scratch memory.",
        *_not_counted(args),
    ]
    return "\n".join(lines)


def _heading(name: str, source: str, step: Any, args: Any) -> list[str]:
    """Returns what is planned: the model, its number formats, and one step of its training."""
    from finetune.optim.registry import optimizer_name

    sizes = step.sizes
    optimizer = optimizer_name(args.optim) + (f" ({args.optim_args})" if args.optim_args else "")
    precision = f"{step.dtype}, computed in {step.autocast}" if step.autocast is not None else str(step.dtype)
    return [
        f"{name} ({source}): {step.model_class}, {sizes.parameters / 1e6:,.1f}M parameters, "
        f"{sizes.trained / 1e6:,.1f}M trained; {precision.replace('torch.', '')}",
        f"{args.per_device_train_batch_size} rows x {args.max_length:,} tokens per device, all of them trained on; "
        f"optim={optimizer}; {'' if step.recomputes else 'no '}activation checkpointing; {step.head}",
        *([step.described] if step.described else []),
    ]


def read_config(name: str, *, trust_remote_code: bool = False) -> tuple[Any, str]:
    """Returns a configuration, and where it is from: a folder, a config.json, the built-in table, or the Hub.

    Raises `ModelLoadError` when it cannot be read.
    """
    from transformers import AutoConfig

    from finetune.models.load import load_config

    path = Path(name).expanduser()
    if path.is_file():
        try:
            return AutoConfig.from_pretrained(str(path)), "this file"
        except Exception as error:
            raise ModelLoadError(f"`model` is the file {name!r}, not a model configuration: {error}") from error
    known = {each.lower(): each for each in KNOWN_CONFIGS}
    if not path.exists() and name.lower() in known:
        values = dict(KNOWN_CONFIGS[known[name.lower()]])
        return AutoConfig.for_model(values.pop("model_type"), **values), "built-in table of configurations"
    try:
        config = load_config(name, trust_remote_code=trust_remote_code)
    except FinetuneError as error:
        raise ModelLoadError(
            f"{error} `finetune plan` reads the configuration only: a config.json will do (`--model config.json`), and "
            f"without a network it knows {', '.join(KNOWN_CONFIGS)}."
        ) from error
    return config, "folder" if path.is_dir() else "Hub or its cache"


def _check(name: str | None, options: PlanArguments, args: Any, model_args: Any) -> None:
    if not name:
        raise ArgumentError("No model given. Give a folder, a config.json or a Hub id: `--model`.")
    if options.num_processes < 1:
        raise ArgumentError(f"`num_processes` is {options.num_processes}; it must be at least 1.")
    if args.max_length is None:
        raise ArgumentError("`max_length` is None, so the length of the rows is unknown. Give one.")
    if model_args.load_in_4bit or model_args.load_in_8bit:
        raise ArgumentError("`finetune plan` does not know quantized weights. Drop `load_in_4bit` and `load_in_8bit`.")


def _not_counted(args: Any) -> list[str]:
    named = ("use_liger_kernel", "torch_compile", "activation_offloading")
    found = [f"`{name}`" for name in named if getattr(args, name, False)]
    return [f"Planned without {' and '.join(found)}, which would change activations."] if found else []
