"""Arguments: one flat class for users, groups for the modules that read them, and a parser for programs."""

from finetune.arguments.base import ArgumentGroup, arg
from finetune.arguments.data import DataLoaderArguments
from finetune.arguments.distributed import AcceleratorConfig, DistributedArguments
from finetune.arguments.evaluation import BestModelArguments, EvaluationArguments
from finetune.arguments.optimization import (
    REGISTERED_OPTIMIZERS,
    BatchingArguments,
    OptimizerArguments,
    ScheduleArguments,
)
from finetune.arguments.parse import parse_arguments
from finetune.arguments.performance import (
    KernelArguments,
    MemoryArguments,
    PrecisionArguments,
    ReproducibilityArguments,
)
from finetune.arguments.reporting import LoggingArguments, TrackingArguments
from finetune.arguments.resolved import (
    note_arguments,
    replace_arguments,
    resolved_config,
    sources_of,
    write_resolved_config,
)
from finetune.arguments.saving import HubArguments, OutputArguments, ProgramArguments, SavingArguments
from finetune.arguments.training import TrainingArguments
from finetune.arguments.trl_parser import TrlParser

__all__ = [
    "REGISTERED_OPTIMIZERS",
    "AcceleratorConfig",
    "ArgumentGroup",
    "BatchingArguments",
    "BestModelArguments",
    "DataLoaderArguments",
    "DistributedArguments",
    "EvaluationArguments",
    "HubArguments",
    "KernelArguments",
    "LoggingArguments",
    "MemoryArguments",
    "OptimizerArguments",
    "OutputArguments",
    "PrecisionArguments",
    "ProgramArguments",
    "ReproducibilityArguments",
    "SavingArguments",
    "ScheduleArguments",
    "TrackingArguments",
    "TrainingArguments",
    "TrlParser",
    "arg",
    "note_arguments",
    "parse_arguments",
    "replace_arguments",
    "resolved_config",
    "sources_of",
    "write_resolved_config",
]
