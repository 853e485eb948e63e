"""Where the run executes: device, processes, sharding."""

# ruff: noqa: RUF009

import base64
import copy
import importlib.util
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from finetune import environment
from finetune.arguments.base import ArgumentGroup, arg, require, require_choice, require_positive
from finetune.compat import FSDPOption
from finetune.environment import parse_bool
from finetune.errors import ArgumentError, nearest

DDP_BACKENDS = ["nccl", "gloo", "mpi", "xccl", "hccl", "cncl", "mccl"]


@dataclass
class AcceleratorConfig:
    """Settings handed to accelerate's `Accelerator`; same fields and defaults as transformers' class of this name.

    `even_batches=False` asks that no row be repeated to fill up a last round of batches. The loaders of this package
    fill it up all the same, so that no process waits forever, and neither train on nor score the repeated rows.
    """

    split_batches: bool = False
    dispatch_batches: bool | None = None
    even_batches: bool = True
    use_seedable_sampler: bool = True
    non_blocking: bool = False
    gradient_accumulation_kwargs: dict[str, Any] | None = None
    use_configured_state: bool = False

    @classmethod
    def read(cls, value: Any) -> "AcceleratorConfig":
        """Returns the configuration from None, a dict, the path of a JSON file, or another configuration object."""
        if isinstance(value, cls):
            return value
        if isinstance(value, type):
            raise ArgumentError(f"`accelerator_config` is the class {value.__name__}; pass an instance or a dict.")
        if isinstance(value, (str, os.PathLike)):
            value = read_json("accelerator_config", value)
        elif value is not None and not isinstance(value, dict):
            value = dict(vars(value))
        names = [field.name for field in fields(cls)]
        for key in value or {}:
            require(key in names, f"`accelerator_config` has no key `{key}`.{nearest(key, names)} Keys: {names}.")
        return cls(**(value or {}))

    @classmethod
    def from_json_file(cls, json_file: str) -> "AcceleratorConfig":
        """Returns the configuration stored in a JSON file."""
        return cls.read(json_file)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as an independent dict."""
        return asdict(self)


@dataclass(kw_only=True, repr=False)
class DistributedArguments(ArgumentGroup):
    """Device, process group, DDP, FSDP and DeepSpeed."""

    use_cpu: bool = arg(False, "Run on the CPU even if there is an accelerator.", old=["no_cuda"])
    accelerator_config: dict[str, Any] | str | None = arg(
        None, "Settings of accelerate's Accelerator, as a dict, JSON, or the path of a JSON file."
    )
    parallelism_config: dict[str, Any] | str | None = arg(
        None, "accelerate's ParallelismConfig, or its fields as a dict or JSON."
    )
    ddp_find_unused_parameters: bool | None = arg(None, "DDP's `find_unused_parameters`.")
    ddp_bucket_cap_mb: int | None = arg(None, "DDP's `bucket_cap_mb`, in megabytes.")
    ddp_broadcast_buffers: bool | None = arg(None, "DDP's `broadcast_buffers`.")
    ddp_static_graph: bool | None = arg(None, "DDP's `static_graph`.")
    ddp_backend: str | None = arg(
        None, "Communication backend of the process group.", choices=DDP_BACKENDS, old=["xpu_backend"]
    )
    ddp_timeout: int = arg(1800, "Timeout of collective operations, in seconds.")
    fsdp: str | None = arg(None, "Shard the model with FSDP.", nargs="?", const=True)
    fsdp_config: dict[str, Any] | str | None = arg(
        None, "Settings of FSDP (`version`, `cpu_offload`, ...), as a dict, JSON, or the path of a JSON file."
    )
    deepspeed: dict[str, Any] | str | None = arg(None, "DeepSpeed configuration, as a dict, JSON, or path.")
    local_rank: int = arg(-1, "Set by old launchers; read `local_process_index` instead.")

    def _validate(self) -> None:
        if self.ddp_backend is not None:
            require_choice("ddp_backend", self.ddp_backend, DDP_BACKENDS)
        require_positive("ddp_timeout", self.ddp_timeout)
        require_one_sharding(self.fsdp, self.deepspeed)
        if isinstance(self.deepspeed, (str, os.PathLike)):
            _check_deepspeed_file(self.deepspeed)


def _check_deepspeed_file(path: str | os.PathLike[str]) -> None:
    """Raises `ArgumentError` unless `path` is a JSON file, or such a file in base64, which accelerate takes too."""
    try:
        is_text = isinstance(json.loads(base64.urlsafe_b64decode(os.fspath(path))), dict)
    except ValueError:
        is_text = False
    if not is_text:
        read_json("deepspeed", path)


def require_one_sharding(fsdp: Any, deepspeed: Any) -> None:
    """Raises `ArgumentError` if both are asked for."""
    require(
        not (fsdp and deepspeed),
        "`fsdp` and `deepspeed` both shard the model and exclude each other; set one.",
    )


def read_json(name: str, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the object stored in the JSON file that the argument `name` points to."""
    try:
        value = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArgumentError(f"`{name}={os.fspath(path)!r}`: there is no such file.") from None
    except json.JSONDecodeError as error:
        raise ArgumentError(f"`{name}={os.fspath(path)!r}` is not valid JSON: {error}") from None
    require(isinstance(value, dict), f"`{name}={os.fspath(path)!r}` must hold a JSON object.")
    return value


# Of the fields that hold a dict, those that may not name a file instead. Not all classes have all of them.
DICTS_ONLY = (
    "activation_checkpointing_kwargs gradient_checkpointing_kwargs lr_scheduler_kwargs liger_kernel_config "
    "model_init_kwargs dataset_kwargs"
).split()


def parse_json(name: str, text: str) -> dict[str, Any]:
    """Returns the object that a command line gave as JSON; texts such as "true" and "3" inside become values."""
    try:
        return _typed(json.loads(text))
    except json.JSONDecodeError as error:
        raise ArgumentError(f"`{name}={text!r}` is not valid JSON: {error}") from None


def _typed(value: Any) -> Any:
    """Returns nested data with texts that spell a truth value or a number replaced by it."""
    if isinstance(value, dict):
        return {key: _typed(item) for key, item in value.items()}
    if isinstance(value, str):
        if value.lower() in ("true", "false"):
            return value.lower() == "true"
        if value.isdigit():
            return int(value)
        if value.replace(".", "", 1).isdigit():
            return float(value)
    return value


def normalise_fsdp(fsdp: Any, fsdp_config: Any) -> tuple[Any, Any]:
    """Returns `(fsdp, fsdp_config)` in their one modern form: a bool and a dict without `fsdp_` prefixes.

    `fsdp` may also be the old string or list, such as `"full_shard offload"`; its words become entries of the dict.
    Without FSDP both come back as given.
    """
    if isinstance(fsdp, str) and fsdp.lower() in ("true", "false"):
        fsdp = fsdp.lower() == "true"
    if not fsdp:
        return fsdp, fsdp_config
    config = read_json("fsdp_config", fsdp_config) if isinstance(fsdp_config, str) else copy.deepcopy(fsdp_config or {})
    config = {key.removeprefix("fsdp_"): value for key, value in config.items()}
    if isinstance(fsdp, (str, list, tuple)):
        words = fsdp.split() if isinstance(fsdp, str) else [str(getattr(word, "value", word)) for word in fsdp]
        for word in words:
            _apply_fsdp_word(word, config)
    if isinstance(config.get("transformer_layer_cls_to_wrap"), str):
        config["transformer_layer_cls_to_wrap"] = [config["transformer_layer_cls_to_wrap"]]
    for key, value in {"min_num_params": 0, "xla": False, "xla_fsdp_v2": False, "xla_fsdp_grad_ckpt": False}.items():
        config.setdefault(key, value)
    require(not config["xla"], "`fsdp_config['xla']` is not supported: TPUs are not. Remove the key.")
    return True, config


def _apply_fsdp_word(word: str, config: dict[str, Any]) -> None:
    """Writes one word of the old `fsdp` string into `config`, unless the key is set already."""
    option = FSDPOption.read("fsdp", word)
    if option == FSDPOption.OFFLOAD:
        config.setdefault("cpu_offload", True)
    elif option != FSDPOption.AUTO_WRAP:
        if int(config.get("version", 2)) == 1:
            config.setdefault("reshard_after_forward", option.value)
            return
        require(
            option in (FSDPOption.FULL_SHARD, FSDPOption.SHARD_GRAD_OP),
            f"`fsdp={word!r}` exists only in FSDP1: set `fsdp_config={{'version': 1}}`, or use 'full_shard'.",
        )
        config.setdefault("reshard_after_forward", option == FSDPOption.FULL_SHARD)


def fsdp_plugin_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the keyword arguments of accelerate's `FullyShardedDataParallelPlugin` for a normalised `fsdp_config`."""
    from accelerate.utils.constants import FSDP_AUTO_WRAP_POLICY

    transformer_wrap, size_wrap = FSDP_AUTO_WRAP_POLICY[0], FSDP_AUTO_WRAP_POLICY[1]
    version = int(config.get("version", 2))
    policy = config.get("auto_wrap_policy", transformer_wrap)
    require_choice("fsdp_config['auto_wrap_policy']", policy, FSDP_AUTO_WRAP_POLICY)
    arguments: dict[str, Any] = {
        "fsdp_version": version,
        "auto_wrap_policy": policy,
        "cpu_ram_efficient_loading": _truth(config, "cpu_ram_efficient_loading", False),
        "state_dict_type": config.get("state_dict_type", "FULL_STATE_DICT"),
    }
    if _truth(config, "cpu_offload", False):
        arguments["cpu_offload"] = True
    if policy == size_wrap and config["min_num_params"] > 0:
        arguments["min_num_params"] = config["min_num_params"]
    elif policy == transformer_wrap and config.get("transformer_layer_cls_to_wrap") is not None:
        arguments["transformer_cls_names_to_wrap"] = ",".join(config["transformer_layer_cls_to_wrap"])
    if "activation_checkpointing" in config:
        arguments["activation_checkpointing"] = _truth(config, "activation_checkpointing", False)
    if version == 2:
        arguments["reshard_after_forward"] = _truth(config, "reshard_after_forward", True)
        return arguments
    arguments["reshard_after_forward"] = str(config.get("reshard_after_forward", "full_shard")).lower()
    arguments["backward_prefetch"] = str(config.get("backward_prefetch", "NO_PREFETCH")).upper()
    for key, default in {"forward_prefetch": False, "use_orig_params": True, "sync_module_states": True}.items():
        arguments[key] = _truth(config, key, default)
    if "limit_all_gathers" in config:
        arguments["limit_all_gathers"] = _truth(config, "limit_all_gathers", True)
    return arguments


def _truth(config: dict[str, Any], key: str, default: bool) -> bool:
    """Returns a truth value that a configuration file may spell as a bool, a number or a word."""
    return parse_bool(f"fsdp_config[{key!r}]", config.get(key, default))


def open_deepspeed(args: DistributedArguments, precision: str) -> tuple[Any, Any]:
    """Returns accelerate's DeepSpeed plugin and transformers' configuration object, or None for what is not used.

    The configuration registers itself, so that models loaded from now on are built for ZeRO, for as long as it lives.
    """
    if not (args.deepspeed or environment.launched_sharding("deepspeed")):
        return None, None
    require(
        importlib.util.find_spec("deepspeed") is not None,
        "`deepspeed` needs the package of that name, which is not installed. Run `pip install deepspeed`, or shard "
        "with `fsdp=True`.",
    )
    from accelerate.utils import DeepSpeedPlugin

    if args.deepspeed:
        from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

        config = HfTrainerDeepSpeedConfig(copy.deepcopy(args.deepspeed))
        config.trainer_config_process(args)
        return DeepSpeedPlugin(hf_ds_config=config), config
    plugin = DeepSpeedPlugin()
    plugin.set_mixed_precision(precision)
    plugin.set_deepspeed_weakref()
    return plugin, None
