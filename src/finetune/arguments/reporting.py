"""Logs, trackers and diagnostics."""

# ruff: noqa: RUF009

from dataclasses import dataclass
from typing import Literal

from finetune.arguments.base import ArgumentGroup, arg, require_choice, require_positive
from finetune.arguments.evaluation import require_whole
from finetune.compat import LOG_LEVELS, DebugOption, IntervalStrategy


@dataclass(kw_only=True, repr=False)
class LoggingArguments(ArgumentGroup):
    """What is logged, when and by which process."""

    logging_strategy: IntervalStrategy | str = arg("steps", "When to log: `no`, `steps` or `epoch`.")
    logging_steps: float = arg(500, "Steps between logs; below 1 a share of all steps.")
    logging_first_step: bool = arg(False, "Log the first step as well.")
    log_on_each_node: bool = arg(True, "In a multi-node run, log once per node instead of once.")
    logging_nan_inf_filter: bool = arg(
        True, "Accepted for compatibility. Losses are never replaced; `nonfinite_policy` says what happens."
    )
    include_num_input_tokens_seen: Literal["all", "non_padding", "no", True, False] = arg(
        "no", "Count the tokens seen: `all`, `non_padding` or `no`."
    )
    log_level: str = arg("passive", "Log level of the main process; `passive` keeps it.", choices=list(LOG_LEVELS))
    log_level_replica: str = arg("warning", "Log level of the other processes.", choices=list(LOG_LEVELS))
    disable_tqdm: bool | None = arg(None, "Hide progress bars; unset hides them if the log level is above warning.")
    debug: str | list[DebugOption] = arg("", "Debug aids, separated by spaces: `underflow_overflow`.")
    skip_memory_metrics: bool = arg(True, "Leave memory use out of the metrics.")
    nonfinite_policy: str = arg(
        "raise",
        "On a NaN or infinite loss, stop (`raise`), leave the step out (`skip_step`), or go on (`log`); finetune only.",
        choices=["raise", "skip_step", "log"],
    )

    def _validate(self) -> None:
        if self.logging_strategy == IntervalStrategy.STEPS:
            require_positive("logging_steps", self.logging_steps)
            require_whole("logging_steps", self.logging_steps)
        require_choice("log_level", self.log_level, LOG_LEVELS)
        require_choice("log_level_replica", self.log_level_replica, LOG_LEVELS)
        require_choice("nonfinite_policy", self.nonfinite_policy, ["raise", "skip_step", "log"])
        require_choice(
            "include_num_input_tokens_seen", self.include_num_input_tokens_seen, ["all", "non_padding", "no"]
        )


@dataclass(kw_only=True, repr=False)
class TrackingArguments(ArgumentGroup):
    """Experiment trackers. `logging_dir` is kept from older transformers."""

    # The order of this union decides how HfArgumentParser reads the flag: the second member, here a string.
    report_to: None | str | list[str] = arg(  # noqa: RUF036
        "none", "Trackers to report to: names, `all` installed ones, or `none`."
    )
    run_name: str | None = arg(None, "Name of the run in the trackers.")
    project: str = arg("huggingface", "Name of the project in Trackio.")
    trackio_space_id: str | None = arg(None, "Space for a live Trackio dashboard; unset keeps it local.")
    trackio_bucket_id: str | None = arg(None, "Bucket behind the Trackio Space; unset lets Trackio choose.")
    # HfArgumentParser reads the first member of this union as the flag's type if the second is None.
    trackio_static_space_id: str | None | Literal[False] = arg(  # noqa: RUF036
        None, "Space for a read-only dashboard kept after training; False for none."
    )
    logging_dir: str | None = arg(
        None,
        "Folder of the TensorBoard files; unset means `output_dir`/runs/... (finetune only; from older transformers).",
    )
