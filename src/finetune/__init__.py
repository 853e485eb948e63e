"""finetune: a TRL-compatible fine-tuning suite for Transformers models.

Names are imported when first used, so `import finetune` costs milliseconds.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS: dict[str, str] = {
    "ArgumentError": "errors",
    "CheckpointError": "errors",
    "DataFormatError": "errors",
    "FinetuneError": "errors",
    "ModelLoadError": "errors",
    "NonFiniteLossError": "errors",
    "TrainingArguments": "arguments",
    "TrainerCallback": "control.callbacks",
    "CallbackHandler": "control.callbacks",
    "TrainerState": "control.state",
    "TrainerControl": "control.state",
    "ExportableState": "control.state",
    "DefaultFlowCallback": "control.builtin",
    "EarlyStoppingCallback": "control.builtin",
    "PrinterCallback": "control.builtin",
    "ProgressCallback": "control.builtin",
    "EvalPrediction": "compat",
    "ClassificationMetrics": "engine.sum_metrics",
    "SumMetrics": "engine.sum_metrics",
    "TokenMetrics": "engine.sum_metrics",
    "Trainer": "trainer",
    "ModelConfig": "cli.script_arguments",
    "ScriptArguments": "cli.script_arguments",
    "get_peft_config": "cli.script_arguments",
    "get_quantization_config": "cli.script_arguments",
    "with_model_options": "cli.script_arguments",
    "load_datasets": "cli.datasets",
    "get_dataset": "cli.datasets",
    "DatasetConfig": "cli.script_arguments",
    "DatasetMixtureConfig": "cli.script_arguments",
    "check_before_start": "cli.programs",
    "finish_program": "cli.programs",
    "parse_program": "cli.programs",
    "run_program": "cli.programs",
    "ignore_bias_buffers": "cli.programs",
    "parse_arguments": "arguments",
    "TrlParser": "arguments",
    "register_optimizer": "optim.registry",
    "SequenceClassificationConfig": "sequence_classification.config",
    "SequenceClassificationTrainer": "sequence_classification.trainer",
    "DataCollatorForLanguageModeling": "data.loading.collate",
    "pack_dataset": "data.preparation.packing",
    "truncate_dataset": "data.preparation.packing",
    "is_conversational": "data.chat.messages",
    "is_conversational_from_value": "data.chat.messages",
    "maybe_convert_to_chatml": "data.chat.messages",
    "apply_chat_template": "data.chat.messages",
    "maybe_apply_chat_template": "data.chat.messages",
    "extract_prompt": "data.chat.messages",
    "maybe_extract_prompt": "data.chat.messages",
    "clone_chat_template": "data.chat.templates",
    "get_training_chat_template": "data.chat.templates",
    "is_chat_template_stop_token_trained": "data.chat.templates",
    "mix_datasets": "data.mixtures",
    "SFTConfig": "sft.config",
    "SFTTrainer": "sft.trainer",
}

__all__ = ["__version__", *sorted(_EXPORTS)]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'finetune' has no attribute '{name}'.{_hint(name)}")
    value = getattr(importlib.import_module(f"finetune.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def _hint(name: str) -> str:
    """Returns where a name is that is not here: in TRL, whose list of names is read without importing it, or nearby."""
    import importlib.util
    from pathlib import Path

    from finetune.errors import nearest

    if name.startswith("_"):
        return ""
    spec = importlib.util.find_spec("trl")
    if spec is not None and spec.origin and f'"{name}"' in Path(spec.origin).read_text(encoding="utf-8"):
        return f" It is not part of finetune: `from trl import {name}`."
    return nearest(name, _EXPORTS)


def __dir__() -> list[str]:
    return __all__
