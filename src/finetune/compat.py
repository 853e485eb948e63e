"""What must agree with transformers and TRL: value types, enumerations, log levels.

Only this module and the tests may depend on `transformers.trainer*`, `transformers.training_args` or `trl`, and this
one recognises their objects without importing them: `transformers.trainer_utils` takes several seconds (it pulls peft
and bitsandbytes). So the enumerations and result tuples are defined here with the same names and values: the
enumerations are strings and compare equal to their namesakes, the result types are tuples and unpack alike.
"""

import logging
import os
import sys
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from finetune.errors import ArgumentError, nearest

if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import Self

    Arrays: TypeAlias = np.ndarray | tuple[np.ndarray, ...]

LOG_LEVELS: dict[str, int] = {
    "detail": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
    "passive": -1,
}


class StringEnum(str, Enum):
    """A string enumeration that equals, hashes and prints as its value.

    >>> IntervalStrategy("steps") == "steps", str(IntervalStrategy.STEPS), {"steps": 1}[IntervalStrategy.STEPS]
    (True, 'steps', 1)
    """

    __str__ = str.__str__
    __format__ = str.__format__
    # Enum hashes the member's name. Hashing the value lets transformers look our members up by value.
    __hash__ = str.__hash__

    @classmethod
    def read(cls, argument: str, value: object) -> "Self":
        """Returns the member for the value of an argument; raises `ArgumentError` that names the argument."""
        allowed = [member.value for member in cls]
        plain = value.value if isinstance(value, Enum) else value
        if plain not in allowed:
            raise ArgumentError(f"`{argument}={plain!r}` is not one of {allowed}.{nearest(str(plain), allowed)}")
        return cls(plain)

    @classmethod
    def _missing_(cls, value: object) -> "StringEnum":
        # A member of transformers' enumeration of the same name hashes by its name and is not found by value.
        if isinstance(value, Enum) and isinstance(value.value, str):
            return cls(value.value)
        allowed = [member.value for member in cls]
        raise ArgumentError(
            f"{value!r} is not one of {allowed}, the values of {cls.__name__}.{nearest(str(value), allowed)}"
        )


class IntervalStrategy(StringEnum):
    """When to log or evaluate."""

    NO = "no"
    STEPS = "steps"
    EPOCH = "epoch"


class SaveStrategy(StringEnum):
    """When to write a checkpoint."""

    NO = "no"
    STEPS = "steps"
    EPOCH = "epoch"
    BEST = "best"


class HubStrategy(StringEnum):
    """What is pushed to the Hub, and when."""

    END = "end"
    EVERY_SAVE = "every_save"
    CHECKPOINT = "checkpoint"
    ALL_CHECKPOINTS = "all_checkpoints"


class SchedulerType(StringEnum):
    """Learning-rate schedules."""

    LINEAR = "linear"
    COSINE = "cosine"
    COSINE_WITH_RESTARTS = "cosine_with_restarts"
    POLYNOMIAL = "polynomial"
    CONSTANT = "constant"
    CONSTANT_WITH_WARMUP = "constant_with_warmup"
    INVERSE_SQRT = "inverse_sqrt"
    REDUCE_ON_PLATEAU = "reduce_lr_on_plateau"
    COSINE_WITH_MIN_LR = "cosine_with_min_lr"
    COSINE_WARMUP_WITH_MIN_LR = "cosine_warmup_with_min_lr"
    WARMUP_STABLE_DECAY = "warmup_stable_decay"
    GREEDY = "greedy"


class OptimizerNames(StringEnum):
    """Optimizers that transformers names; `finetune.optim` may register others."""

    ADAMW_TORCH = "adamw_torch"
    ADAMW_TORCH_FUSED = "adamw_torch_fused"
    ADAMW_TORCH_XLA = "adamw_torch_xla"
    ADAMW_TORCH_NPU_FUSED = "adamw_torch_npu_fused"
    ADAFACTOR = "adafactor"
    ADAMW_ANYPRECISION = "adamw_anyprecision"
    ADAMW_TORCH_4BIT = "adamw_torch_4bit"
    ADAMW_TORCH_8BIT = "adamw_torch_8bit"
    ADEMAMIX = "ademamix"
    SGD = "sgd"
    ADAGRAD = "adagrad"
    ADAMW_BNB = "adamw_bnb_8bit"
    ADAMW_8BIT = "adamw_8bit"
    ADEMAMIX_8BIT = "ademamix_8bit"
    LION_8BIT = "lion_8bit"
    LION = "lion_32bit"
    PAGED_ADAMW = "paged_adamw_32bit"
    PAGED_ADAMW_8BIT = "paged_adamw_8bit"
    PAGED_ADEMAMIX = "paged_ademamix_32bit"
    PAGED_ADEMAMIX_8BIT = "paged_ademamix_8bit"
    PAGED_LION = "paged_lion_32bit"
    PAGED_LION_8BIT = "paged_lion_8bit"
    RMSPROP = "rmsprop"
    RMSPROP_BNB = "rmsprop_bnb"
    RMSPROP_8BIT = "rmsprop_bnb_8bit"
    RMSPROP_32BIT = "rmsprop_bnb_32bit"
    GALORE_ADAMW = "galore_adamw"
    GALORE_ADAMW_8BIT = "galore_adamw_8bit"
    GALORE_ADAFACTOR = "galore_adafactor"
    GALORE_ADAMW_LAYERWISE = "galore_adamw_layerwise"
    GALORE_ADAMW_8BIT_LAYERWISE = "galore_adamw_8bit_layerwise"
    GALORE_ADAFACTOR_LAYERWISE = "galore_adafactor_layerwise"
    LOMO = "lomo"
    ADALOMO = "adalomo"
    GROKADAMW = "grokadamw"
    SCHEDULE_FREE_RADAM = "schedule_free_radam"
    SCHEDULE_FREE_ADAMW = "schedule_free_adamw"
    SCHEDULE_FREE_SGD = "schedule_free_sgd"
    APOLLO_ADAMW = "apollo_adamw"
    APOLLO_ADAMW_LAYERWISE = "apollo_adamw_layerwise"
    STABLE_ADAMW = "stable_adamw"


class DebugOption(StringEnum):
    """Debug aids of `debug`."""

    UNDERFLOW_OVERFLOW = "underflow_overflow"
    TPU_METRICS_DEBUG = "tpu_metrics_debug"


class FSDPOption(StringEnum):
    """Words that the old string form of `fsdp` may hold."""

    FULL_SHARD = "full_shard"
    SHARD_GRAD_OP = "shard_grad_op"
    NO_SHARD = "no_shard"
    HYBRID_SHARD = "hybrid_shard"
    HYBRID_SHARD_ZERO2 = "hybrid_shard_zero2"
    OFFLOAD = "offload"
    AUTO_WRAP = "auto_wrap"


class HPSearchBackend(StringEnum):
    """Libraries that `hyperparameter_search` can use."""

    OPTUNA = "optuna"
    RAY = "ray"
    WANDB = "wandb"


class ParallelMode(Enum):
    """How the processes of a run relate. Equal to transformers' member of the same name, whichever side compares."""

    NOT_PARALLEL = "not_parallel"
    NOT_DISTRIBUTED = "not_distributed"
    DISTRIBUTED = "distributed"
    SAGEMAKER_MODEL_PARALLEL = "sagemaker_model_parallel"
    SAGEMAKER_DATA_PARALLEL = "sagemaker_data_parallel"
    TPU = "tpu"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Enum) and type(other).__name__ == "ParallelMode" and self.value == other.value

    def __hash__(self) -> int:
        return hash(self._name_)


class EvalPrediction:
    """What `compute_metrics` receives; unpacks as `(predictions, label_ids[, inputs][, losses])`.

    `predictions` and `label_ids` are arrays, or tuples of arrays, with one row per evaluated sample. `inputs` and
    `losses` are there only if `include_for_metrics` asks for them.
    """

    def __init__(self, predictions: Any, label_ids: Any, inputs: Any = None, losses: Any = None) -> None:
        self.predictions = predictions
        self.label_ids = label_ids
        self.inputs = inputs
        self.losses = losses
        self.elements = (predictions, label_ids, *(item for item in (inputs, losses) if item is not None))

    def __iter__(self) -> Any:
        return iter(self.elements)

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self.elements):
            raise IndexError("tuple index out of range")
        return self.elements[index]


class EvalLoopOutput(NamedTuple):
    """Returned by `evaluation_loop`."""

    predictions: "Arrays | None"
    label_ids: "Arrays | None"
    metrics: dict[str, float]
    num_samples: int


class PredictionOutput(NamedTuple):
    """Returned by `predict`."""

    predictions: "Arrays | None"
    label_ids: "Arrays | None"
    metrics: dict[str, float]


class TrainOutput(NamedTuple):
    """Returned by `train`."""

    global_step: int
    training_loss: float
    metrics: dict[str, float]


class BestRun(NamedTuple):
    """Returned by `hyperparameter_search`."""

    run_id: str
    objective: float | list[float]
    hyperparameters: dict[str, Any]
    run_summary: Any | None = None


def library_verbosity() -> int:
    """Returns the log level of transformers, without importing it when nobody else did."""
    module = sys.modules.get("transformers.utils.logging")
    if module is not None:
        return module.get_verbosity()
    return LOG_LEVELS.get(os.environ.get("TRANSFORMERS_VERBOSITY", "").lower(), logging.WARNING)


def available_trackers() -> list[str]:
    """Returns the trackers that `report_to="all"` selects: those whose package is installed."""
    from transformers.integrations import get_available_reporting_integrations

    return get_available_reporting_integrations()


def tokenizer_of(processing_class: Any) -> Any:
    """Returns the tokenizer of a processor of transformers, or the tokenizer itself."""
    inner = getattr(processing_class, "tokenizer", None)
    return inner if inner is not None and hasattr(inner, "get_vocab") else processing_class
