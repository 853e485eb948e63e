"""The model of a classification: what it was made for, loading it with the right head, adapters beside the head."""

import copy
from typing import Any

from torch import nn

from finetune.errors import ArgumentError
from finetune.models.adapters import add_adapters, cast_given_adapters, prepare_quantized, unwrap
from finetune.models.load import load_config, load_model
from finetune.models.load_options import options_of_config, warn_of_unused_options, without_device_map
from finetune.sequence_classification.config import SequenceClassificationConfig
from finetune.sequence_classification.labels import SINGLE, Task


def config_of(model: Any, args: SequenceClassificationConfig) -> Any:
    """Returns the configuration of a model, read once where it was given by name; None if a loaded one has none.

    Raises `ModelLoadError` as `load_config`.
    """
    if isinstance(model, str):
        options = options_of_config(init_kwargs(args))
        return load_config(model, trust_remote_code=args.trust_remote_code, **options)
    return getattr(unwrap(model), "config", None)


def labels_of(model: Any, config: Any) -> dict[int, str] | None:
    """Returns the classes a model was made for, None where `id2label` is what transformers fills in for a new one."""
    labels = {int(index): str(name) for index, name in (getattr(config, "id2label", None) or {}).items()}
    default = labels == {index: f"LABEL_{index}" for index in range(len(labels))}
    return None if not labels or (default and isinstance(model, str)) else labels


def check_smoothing(args: SequenceClassificationConfig, task: Task) -> None:
    """Raises `ArgumentError` for `label_smoothing_factor` where a row has no single class to take a share from."""
    if args.label_smoothing_factor and task.problem_type != SINGLE:
        raise ArgumentError(
            f"`label_smoothing_factor` is {args.label_smoothing_factor}, which is for one class per row; here "
            f"`problem_type` is {task.problem_type}. Set `label_smoothing_factor=0`."
        )


def load_classifier(
    model: Any, config: Any, args: SequenceClassificationConfig, task: Task, quantization_config: Any
) -> nn.Module:
    """Returns the model with a head for `task`, loaded where it was given by name. `config` is that of `config_of`."""
    init = init_kwargs(args)
    labels = dict(enumerate(task.names))
    described = {"id2label": labels, "label2id": {name: index for index, name in labels.items()}}
    described["problem_type"] = task.problem_type  # pyright: ignore[reportArgumentType]
    if isinstance(model, str):
        options: dict[str, Any] = {"num_labels": len(labels), **described, **without_device_map(init, args)}
        if config.num_labels != len(labels):
            options.setdefault("ignore_mismatched_sizes", True)  # a head for other classes is replaced by a new one
        model = load_model(
            model,
            auto_class="AutoModelForSequenceClassification",
            model_init_kwargs=options,
            quantization_config=quantization_config,
            trust_remote_code=args.trust_remote_code,
        )
        return prepare_quantized(model, activation_checkpointing=bool(args.gradient_checkpointing))
    warn_of_unused_options(model, init, quantization_config)
    cast_given_adapters(model)
    if config is None:
        return model
    if config.num_labels != len(labels):
        raise ArgumentError(
            f"`model` has {config.num_labels} outputs and the data needs {len(labels)} ({task.describe()}). Pass "
            f"`model` by its name, or load it with `num_labels={len(labels)}`."
        )
    for name, value in described.items():
        setattr(config, name, value)
    return model


def init_kwargs(args: SequenceClassificationConfig) -> dict[str, Any]:
    """Returns a copy of `model_init_kwargs`, empty where none are given."""
    assert not isinstance(args.model_init_kwargs, str)  # parsed when the arguments were made
    return {**(args.model_init_kwargs or {})}


def with_adapters(model: Any, peft_config: Any, activation_checkpointing: bool) -> nn.Module:
    """Returns the model with adapters, and its head trained in full and saved with them."""
    config = copy.deepcopy(peft_config)
    if getattr(config, "task_type", "SEQ_CLS") in (None, "CAUSAL_LM"):
        config.task_type = "SEQ_CLS"
    if hasattr(config, "modules_to_save"):
        prefix = getattr(model, "base_model_prefix", "")
        heads = [
            name for name, child in model.named_children() if name != prefix and any(True for _ in child.parameters())
        ]
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *heads]))
    return add_adapters(model, config, activation_checkpointing=activation_checkpointing)
