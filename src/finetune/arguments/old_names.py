"""Arguments that transformers removed or renamed since version 3, and what they mean today.

Plain renamings are declared at the field (`old=`). Here is the rest: names whose value has to be translated, and names
that no longer decide anything. Each entry returns the advice that goes into its one warning.
"""

import math
from typing import Any

from finetune.arguments.base import Translation
from finetune.arguments.optimization import default_optimizer
from finetune.errors import ArgumentError

Given = dict[str, Any]


def _warmup_ratio(value: Any, given: Given) -> str:
    if not value:
        return "drop it, there is no warm-up by default."
    if given.get("warmup_steps"):
        return f"`warmup_steps={given['warmup_steps']}` takes precedence; drop `warmup_ratio`."
    if not 0 <= value <= 1:
        raise ArgumentError(f"`warmup_ratio={value}` must be in [0, 1]; for a number of steps use `warmup_steps`.")
    # 1.0 would mean one step. The largest share below 1 rounds up to all steps.
    given["warmup_steps"] = min(value, math.nextafter(1.0, 0.0))
    return f"use `warmup_steps={value}`, a share of all steps."


def _evaluate_during_training(value: Any, given: Given) -> str:
    if value:
        given.setdefault("eval_strategy", "steps")
    return f"use `eval_strategy='{'steps' if value else 'no'}'`."


def _switch_for(argument: str, meaning: str) -> Translation:
    """Returns a translation for a switch that has become one of the values of `argument`."""

    def translate(value: Any, given: Given) -> str:
        if not value:
            return "drop it."
        given.setdefault(argument, meaning)
        return f"use `{argument}={meaning!r}`."

    return translate


def _include_inputs_for_metrics(value: Any, given: Given) -> str:
    if value:
        wanted = list(given.get("include_for_metrics") or [])
        given["include_for_metrics"] = wanted if "inputs" in wanted else [*wanted, "inputs"]
    return "use `include_for_metrics=['inputs']`." if value else "drop it."


def _hub_name(value: Any, given: Given) -> str:
    if value:
        owner = (given.get("hub_model_id") or "").rpartition("/")[0]
        given["hub_model_id"] = value if "/" in value or not owner else f"{owner}/{value}"
    return f"use `hub_model_id={given.get('hub_model_id')!r}`."


def _hub_organization(value: Any, given: Given) -> str:
    if value:
        name = given.pop("push_to_hub_model_id", None) or given.get("hub_model_id")
        if name is None:
            name = str(given.get("output_dir") or "trainer_output").rstrip("/").rpartition("/")[2]
        given["hub_model_id"] = f"{value}/{name.rpartition('/')[2]}"
    return f"use `hub_model_id={given.get('hub_model_id')!r}`."


def _tpu_metrics_debug(value: Any, given: Given) -> str:
    if value:
        given["debug"] = f"{given.get('debug') or ''} tpu_metrics_debug".strip()
    return "use `debug='tpu_metrics_debug'`."


def _fsdp_key(key: str) -> Translation:
    def translate(value: Any, given: Given) -> str:
        if value:
            config = given.get("fsdp_config") or {}
            if not isinstance(config, dict):
                raise ArgumentError(
                    f"Write `{key}` into the file named by `fsdp_config`; it cannot be given beside it."
                )
            given["fsdp_config"] = {key: value, **config}
        return f"use `fsdp_config={{'{key}': {value!r}}}`."

    return translate


def _accelerator_key(key: str) -> Translation:
    def translate(value: Any, given: Given) -> str:
        if value is not None:
            config = given.get("accelerator_config") or {}
            if not isinstance(config, dict):
                raise ArgumentError(f"Write `{key}` into `accelerator_config`; it cannot be given beside it.")
            given["accelerator_config"] = {key: value, **config}
        return f"use `accelerator_config={{'{key}': {value!r}}}`."

    return translate


def _native_amp(name: str) -> Translation:
    def translate(value: Any, given: Given) -> str:
        if value not in (None, "auto", "amp", "cuda_amp", "cpu_amp", "apex"):
            raise ArgumentError(
                f"`{name}={value!r}` is not a mixed-precision backend. Use `bf16=True` or `fp16=True` without it."
            )
        return "drop it, mixed precision always is torch's own."

    return translate


def without_effect(reason: str) -> Translation:
    """Returns a translation for a name that decides nothing any more, with the reason."""

    def translate(value: Any, given: Given) -> str:
        return f"{reason} The value {value!r} has no effect; drop it."

    return translate


def _refused_unless(name: str, off: tuple[Any, ...], remedy: str) -> Translation:
    """Returns a translation for features that are gone: their off values pass, any other is an error."""

    def translate(value: Any, given: Given) -> str:
        if value not in off:
            raise ArgumentError(f"`{name}={value!r}` cannot be honoured: {remedy}")
        return "drop it."

    return translate


OLD_TRAINING_NAMES: dict[str, Translation] = {
    "warmup_ratio": _warmup_ratio,
    "evaluate_during_training": _evaluate_during_training,
    "group_by_length": _switch_for("train_sampling_strategy", "group_by_length"),
    "adafactor": _switch_for("optim", "adafactor"),
    "include_inputs_for_metrics": _include_inputs_for_metrics,
    "include_tokens_per_second": _switch_for("include_num_input_tokens_seen", "all"),
    "push_to_hub_model_id": _hub_name,
    "push_to_hub_organization": _hub_organization,
    "tpu_metrics_debug": _tpu_metrics_debug,
    "fsdp_min_num_params": _fsdp_key("min_num_params"),
    "fsdp_transformer_layer_cls_to_wrap": _fsdp_key("transformer_layer_cls_to_wrap"),
    "dispatch_batches": _accelerator_key("dispatch_batches"),
    "split_batches": _accelerator_key("split_batches"),
    "half_precision_backend": _native_amp("half_precision_backend"),
    "fp16_backend": _native_amp("fp16_backend"),
    "fp16_opt_level": without_effect("NVIDIA Apex is not used."),
    "save_safetensors": without_effect("Weights are always written as safetensors."),
    "use_mps_device": without_effect("An Apple GPU is used whenever there is one; `use_cpu=True` prevents it."),
    "use_ipex": without_effect("Intel's extension is part of torch now."),
    "jit_mode_eval": without_effect("TorchScript is gone; `torch_compile=True` takes its place."),
    "use_legacy_prediction_loop": without_effect("There is one evaluation loop."),
    "tpu_num_cores": without_effect("TPUs are not supported."),
    "ray_scope": without_effect("Pass `scope=` to `hyperparameter_search` instead."),
    "_n_gpu": without_effect("It is derived from the device."),
    "sharded_ddp": _refused_unless("sharded_ddp", ("", False, None, []), "FairScale is gone; use `fsdp=True`."),
    "past_index": _refused_unless(
        "past_index", (-1, None), "feeding past states to the next step is gone; leave it at -1."
    ),
    "mp_parameters": _refused_unless("mp_parameters", ("", None), "SageMaker model parallelism is not supported."),
}

# Old names that scripts read back from the arguments, and how the value follows from today's fields.
READABLE_OLD_NAMES: dict[str, Any] = {
    "evaluation_strategy": lambda args: args.eval_strategy,
    "no_cuda": lambda args: args.use_cpu,
    "group_by_length": lambda args: args.train_sampling_strategy == "group_by_length",
    "warmup_ratio": lambda args: args.warmup_steps if args.warmup_steps < 1 else 0.0,
    "per_gpu_train_batch_size": lambda args: args.per_device_train_batch_size,
    "per_gpu_eval_batch_size": lambda args: args.per_device_eval_batch_size,
    "save_safetensors": lambda args: True,
    "include_inputs_for_metrics": lambda args: "inputs" in args.include_for_metrics,
    "include_tokens_per_second": lambda args: args.include_num_input_tokens_seen != "no",
    "adafactor": lambda args: args.optim == "adafactor",
    "half_precision_backend": lambda args: "auto",
    "fp16_backend": lambda args: "auto",
    "past_index": lambda args: -1,
    "push_to_hub_model_id": lambda args: args.hub_model_id,
    "push_to_hub_token": lambda args: args.hub_token,
    "use_mps_device": lambda args: args.device.type == "mps",
    "torchdynamo": lambda args: args.torch_compile_backend,
}

# Switches that have become one of the values of a field: the field, and its value without them.
_SWITCHED_OFF = {
    "group_by_length": ("train_sampling_strategy", "random"),
    "adafactor": ("optim", default_optimizer()),
    "include_tokens_per_second": ("include_num_input_tokens_seen", "no"),
    "warmup_ratio": ("warmup_steps", 0),
}


def assign_old_name(args: Any, name: str, value: Any, translation: Translation) -> tuple[Given, str]:
    """Returns the fields to set, and the advice, when `value` is assigned to an old name of finished arguments.

    Unlike in a constructor call, a switch that is turned off may have been on.
    """
    if name == "include_inputs_for_metrics":
        others = [item for item in args.include_for_metrics if item != "inputs"]
        wanted = [*others, "inputs"] if value else others
        return {"include_for_metrics": wanted}, f"use `include_for_metrics={wanted}`."
    if name in _SWITCHED_OFF and not value and READABLE_OLD_NAMES[name](args):
        field, off = _SWITCHED_OFF[name]
        return {field: off}, f"use `{field}={off!r}`."
    given: Given = {}
    return given, translation(value, given)
