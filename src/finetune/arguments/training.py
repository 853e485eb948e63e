"""`TrainingArguments`: all groups in one flat class, with the names and defaults of transformers 5.23."""

import copy
import logging
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from finetune import environment
from finetune.arguments.base import ArgumentGroup, ArgumentsMeta, Translation, require
from finetune.arguments.data import DataLoaderArguments
from finetune.arguments.distributed import (
    DICTS_ONLY,
    AcceleratorConfig,
    DistributedArguments,
    fsdp_plugin_arguments,
    normalise_fsdp,
    open_deepspeed,
    parse_json,
)
from finetune.arguments.evaluation import BestModelArguments, EvaluationArguments
from finetune.arguments.old_names import OLD_TRAINING_NAMES
from finetune.arguments.optimization import BatchingArguments, OptimizerArguments, ScheduleArguments
from finetune.arguments.performance import (
    KernelArguments,
    MemoryArguments,
    PrecisionArguments,
    ReproducibilityArguments,
    accelerator_present,
    bf16_supported,
    set_tf32,
)
from finetune.arguments.processes import ProcessView
from finetune.arguments.reporting import LoggingArguments, TrackingArguments
from finetune.arguments.saving import HubArguments, OutputArguments, ProgramArguments, SavingArguments
from finetune.arguments.serialize import Serialization
from finetune.arguments.setters import Setters
from finetune.compat import (
    DebugOption,
    HubStrategy,
    IntervalStrategy,
    OptimizerNames,
    SaveStrategy,
    SchedulerType,
    available_trackers,
    library_verbosity,
)
from finetune.errors import ArgumentError

logger = logging.getLogger(__name__)


@dataclass(repr=False)
class TrainingArguments(
    Setters,
    Serialization,
    ProcessView,
    # Dataclass fields come in reverse order of the bases: `output_dir` first, the flags for programs last.
    ProgramArguments,
    DistributedArguments,
    DataLoaderArguments,
    ReproducibilityArguments,
    HubArguments,
    BestModelArguments,
    SavingArguments,
    EvaluationArguments,
    TrackingArguments,
    LoggingArguments,
    KernelArguments,
    MemoryArguments,
    PrecisionArguments,
    OptimizerArguments,
    ScheduleArguments,
    BatchingArguments,
    OutputArguments,
    metaclass=ArgumentsMeta,
):
    """Everything that decides a training run.

    Field names and defaults are those of `transformers.TrainingArguments` 5.23, so scripts and saved configurations
    carry over; the groups this class is made of document each field. Only `output_dir` may be given by position.
    Names of older releases are accepted with one warning each; an unknown name is an error that names the nearest.

    Values are resolved once, when the object is made: strings become enumerations, paths are expanded, unset fields
    that follow from others are filled in, the process group and the device are set up. Afterwards the package never
    changes it; you may, and `set_*` helps. Dicts and lists that you pass are copied.

    Raises:
        ArgumentError: an unknown name, or values that cannot be honoured. It is a ValueError.
    """

    _OLD_NAMES: ClassVar[dict[str, Translation]] = OLD_TRAINING_NAMES

    # Fields that hold a dict and that a command line gives as JSON. Subclasses extend this list.
    _VALID_DICT_FIELDS = [
        "accelerator_config",
        "parallelism_config",
        "fsdp_config",
        "deepspeed",
        "activation_checkpointing_kwargs",
        "gradient_checkpointing_kwargs",
        "lr_scheduler_kwargs",
        "liger_kernel_config",
    ]

    def __post_init__(self) -> None:
        self._copy_containers()
        self._resolve_names()
        self._resolve_checkpointing()
        self._resolve_evaluation()
        self._resolve_reporting()
        self._resolve_compilation()
        self._resolve_distributed()
        for group in type(self).__mro__:
            if issubclass(group, ArgumentGroup) and "_validate" in vars(group):
                vars(group)["_validate"](self)
        self._validate_combinations()
        self._validate_device()
        _ = self.device
        self.deepspeed_plugin, hf_config = open_deepspeed(self, self.mixed_precision)
        if hf_config is not None:
            self.hf_deepspeed_config = hf_config

    def _copy_containers(self) -> None:
        """Parses JSON given as a string, and detaches dicts and lists from the caller's."""
        for name in self._VALID_DICT_FIELDS:
            value = getattr(self, name)
            if isinstance(value, str) and value.lstrip().startswith("{"):
                setattr(self, name, parse_json(name, value))
            elif name in DICTS_ONLY and not isinstance(value, (Mapping, type(None))):
                raise ArgumentError(f"`{name}={value!r}` must be a dict, or one as JSON: `{name}='{{\"key\": 1}}'`.")
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (dict, list)):
                setattr(self, field.name, copy.deepcopy(value))

    def _resolve_names(self) -> None:
        """Turns strings into enumerations and expands the output folder."""
        if self.output_dir is None:
            self.output_dir = "trainer_output"
        self.output_dir = os.path.expanduser(os.fspath(self.output_dir))
        self.eval_strategy = IntervalStrategy.read("eval_strategy", self.eval_strategy)
        self.logging_strategy = IntervalStrategy.read("logging_strategy", self.logging_strategy)
        self.save_strategy = SaveStrategy.read("save_strategy", self.save_strategy)
        self.hub_strategy = HubStrategy.read("hub_strategy", self.hub_strategy)
        self.lr_scheduler_type = SchedulerType.read("lr_scheduler_type", self.lr_scheduler_type)
        optimizer = str(getattr(self.optim, "value", self.optim))
        if optimizer == "adamw_hf":
            warnings.warn("`optim='adamw_hf'` is gone; 'adamw_torch' is used.", FutureWarning, stacklevel=2)
            optimizer = "adamw_torch"
        known = {member.value for member in OptimizerNames}
        self.optim = OptimizerNames(optimizer) if optimizer in known else optimizer
        if self.hub_token == "<HUB_TOKEN>":
            # What `to_dict` writes in place of a token, come back through a rebuild.
            self.hub_token = None
        words = self.debug.split() if isinstance(self.debug, str) else self.debug or []
        self.debug = [DebugOption.read("debug", word) for word in words]

    def _resolve_checkpointing(self) -> None:
        """Gives `activation_checkpointing` and `gradient_checkpointing` one value."""
        chosen = self.__dict__.get("_sources", {})
        for old, new in (
            ("gradient_checkpointing", "activation_checkpointing"),
            ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
        ):
            old_value, new_value = getattr(self, old), getattr(self, new)
            value = old_value if new_value is None else new_value
            if old in chosen and new in chosen and old_value != new_value:
                warnings.warn(f"`{old}={old_value}` is ignored: `{new}={new_value}` decides.", stacklevel=2)
            setattr(self, old, value)
            setattr(self, new, value)
        if self.activation_checkpointing is None:
            self.activation_checkpointing = self.gradient_checkpointing = False

    def _resolve_evaluation(self) -> None:
        """Fills in `do_eval`, `eval_steps` and the metric that compares checkpoints; makes step counts whole."""
        if self.eval_strategy != IntervalStrategy.NO:
            self.do_eval = True
        if self.eval_strategy == IntervalStrategy.STEPS and not self.eval_steps:
            self.eval_steps = self.logging_steps
        for name in ("logging_steps", "eval_steps", "save_steps"):
            value = getattr(self, name)
            if value is not None and 1 < value < math.inf and value == int(value):
                setattr(self, name, int(value))
        compares = self.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
        best = self.load_best_model_at_end or self.save_strategy == SaveStrategy.BEST or bool(self.keep_best)
        if self.metric_for_best_model is None and (compares or best):
            self.metric_for_best_model = "loss"
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = not self.metric_for_best_model.endswith("loss")

    def _resolve_reporting(self) -> None:
        """Resolves trackers, token counting, and whether progress bars are shown."""
        if self.report_to in ("all", ["all"]):
            self.report_to = available_trackers()
        elif self.report_to in ("none", ["none"], None, [None]):
            self.report_to = []
        elif isinstance(self.report_to, str):
            self.report_to = [self.report_to]
        kubeflow = os.getenv("DISABLE_KUBEFLOW_INTEGRATION", "").upper() != "TRUE"
        if kubeflow and "KUBEFLOW_TRAINER_SERVER_URL" in os.environ and "kubeflow" not in self.report_to:
            self.report_to = [*self.report_to, "kubeflow"]
        if self.disable_tqdm is None:
            self.disable_tqdm = library_verbosity() > logging.WARNING
        seen = self.include_num_input_tokens_seen
        if isinstance(seen, bool) or str(seen).lower() in ("true", "false"):
            self.include_num_input_tokens_seen = "all" if str(seen).lower() == "true" else "no"
        if isinstance(self.trackio_static_space_id, str) and self.trackio_static_space_id.lower() == "false":
            self.trackio_static_space_id = False

    def _resolve_compilation(self) -> None:
        """Turns compilation on if a backend or a mode is named, and fills in the backend."""
        if self.torch_compile_mode is not None or self.torch_compile_backend is not None:
            self.torch_compile = True
        if self.torch_compile and self.torch_compile_backend is None:
            self.torch_compile_backend = "inductor"

    def _resolve_distributed(self) -> None:
        """Reads the configurations of accelerate and FSDP."""
        config: Any = AcceleratorConfig.read(self.accelerator_config)
        self.accelerator_config = config
        if isinstance(self.parallelism_config, dict):
            from accelerate.parallelism_config import ParallelismConfig

            self.parallelism_config = ParallelismConfig(**self.parallelism_config)  # type: ignore[assignment]
        self.fsdp, self.fsdp_config = normalise_fsdp(self.fsdp, self.fsdp_config)
        self.fsdp_plugin_args: dict[str, Any] | None = None
        self.xla_fsdp_config: dict[str, Any] | None = None
        if self.fsdp and isinstance(self.fsdp_config, dict):
            self.fsdp_plugin_args = fsdp_plugin_arguments(self.fsdp_config)
            # from_pretrained reads this variable to load weights in the first process only.
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = str(
                self.fsdp_plugin_args["cpu_ram_efficient_loading"]
            ).lower()
        if self.use_cpu:
            self.dataloader_pin_memory = False

    def _validate_combinations(self) -> None:
        """Raises ArgumentError for combinations across groups that cannot be honoured."""
        evaluates = self.eval_strategy != IntervalStrategy.NO
        for schedule in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY):
            require(
                evaluates or self.lr_scheduler_type != schedule,
                f"`lr_scheduler_type='{schedule}'` follows a metric: set `eval_strategy` to 'steps' or 'epoch'.",
            )
        require(
            evaluates or self.save_strategy != SaveStrategy.BEST,
            "`save_strategy='best'` needs evaluation: set `eval_strategy` to 'steps' or 'epoch'.",
        )
        if self.load_best_model_at_end and self.save_strategy != SaveStrategy.BEST:
            require(
                self.eval_strategy == self.save_strategy and evaluates,
                f"`load_best_model_at_end=True` needs every checkpoint to be evaluated, but `save_strategy="
                f"'{self.save_strategy}'` and `eval_strategy='{self.eval_strategy}'`. Set both to 'steps' or both to "
                "'epoch', or evaluate and set `save_strategy='best'`.",
            )
            if self.eval_strategy == IntervalStrategy.STEPS:
                self._validate_multiple()
        launched = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto")
        if launched not in ("auto", "1", str(self.gradient_accumulation_steps)):
            raise ArgumentError(
                f"`gradient_accumulation_steps={self.gradient_accumulation_steps}` disagrees with"
                f" ACCELERATE_GRADIENT_ACCUMULATION_STEPS={launched} from `accelerate launch`. Set both to the same."
            )

    def _validate_multiple(self, needed_by: str = "load_best_model_at_end") -> None:
        """Raises ArgumentError unless `save_steps` is a multiple of `eval_steps`."""
        save, evaluate = self.save_steps, self.eval_steps or 0
        remedy = f"Make `save_steps` a multiple of `eval_steps`, or drop `{needed_by}`."
        require(
            (save < 1) == (evaluate < 1),
            f"`save_steps={save}` and `eval_steps={evaluate}`: one is a share of the run, one a count. {remedy}",
        )
        # Shares are compared as millionths, so that 0.3 is a multiple of 0.1.
        scale = 1 if save >= 1 else 1_000_000
        require(
            round(save * scale) % round(evaluate * scale) == 0,
            f"`save_steps={save}` is not a multiple of `eval_steps={evaluate}`, so the best may not be saved. {remedy}",
        )

    def _validate_device(self) -> None:
        """Checks number formats against the device; torch is imported only if one of them was asked for."""
        cpu = self.use_cpu or environment.launched_on_cpu()
        if (self.bf16 or self.bf16_full_eval) and not cpu and accelerator_present():
            require(
                bf16_supported(), "`bf16=True`: this device does not compute in bfloat16. Use `fp16=True`, or neither."
            )
        if self.fp16:
            require(
                not cpu and accelerator_present(),
                "`fp16=True` needs an accelerator and there is none. Use `bf16=True`, which CPUs support, or neither.",
            )
        if self.tf32 is not None:
            set_tf32(self.tf32)
