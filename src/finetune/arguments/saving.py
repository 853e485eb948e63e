"""The output folder, checkpoints, resuming, and the Hub."""

# ruff: noqa: RUF009

from dataclasses import dataclass
from typing import Any

from finetune.arguments.base import ArgumentGroup, arg, require, require_choice, require_positive
from finetune.arguments.evaluation import require_whole
from finetune.compat import HubStrategy, SaveStrategy


@dataclass(repr=False)
class OutputArguments(ArgumentGroup):
    """The output folder and the flags that only programs read."""

    output_dir: str | None = arg(None, "Folder for checkpoints and results; unset means `trainer_output`.")

    def _validate(self) -> None:
        require(bool(self.output_dir), "`output_dir` is empty; name a folder.")


@dataclass(kw_only=True, repr=False)
class ProgramArguments(ArgumentGroup):
    """Flags for programs; the trainer itself does not read them."""

    do_train: bool = arg(False, "Train; for programs.")
    do_eval: bool = arg(False, "Evaluate; for programs. True as soon as `eval_strategy` is not `no`.")
    do_predict: bool = arg(False, "Predict on the test set; for programs.")
    resume_from_checkpoint: str | None = arg(None, "Checkpoint folder to resume from; for programs.")


@dataclass(kw_only=True, repr=False)
class SavingArguments(ArgumentGroup):
    """Checkpoints and resuming. Fields marked "finetune only" do not exist in transformers."""

    save_strategy: SaveStrategy | str = arg("steps", "When to save: `no`, `steps`, `epoch` or `best`.")
    save_steps: float = arg(500, "Steps between checkpoints; below 1 a share of all steps.")
    save_total_limit: int | None = arg(
        None, "Checkpoints to keep; older ones are deleted, the best and the last never are."
    )
    save_only_model: bool = arg(False, "Save weights only; such a checkpoint cannot be resumed.")
    save_on_each_node: bool = arg(False, "Save on every node instead of on the first only.")
    enable_jit_checkpoint: bool = arg(
        False,
        "On SIGTERM, SIGINT or SIGUSR1, save a checkpoint behind the present step and stop. An evaluation is cut "
        "short, and the run that is resumed begins with it.",
    )
    ignore_data_skip: bool = arg(False, "When resuming, start the data from its beginning.")
    restore_callback_states_from_checkpoint: bool = arg(
        False, "When resuming, restore the state of callbacks that export one."
    )
    keep_last: int | None = arg(
        None, "Number of most recent checkpoints to keep, in addition to `keep_best` (finetune only)."
    )
    keep_best: int | None = arg(None, "Number of best checkpoints to keep, by `metric_for_best_model` (finetune only).")
    async_save: bool | None = arg(
        None,
        "Write checkpoints in the background, from a copy of the state (finetune only). Unset means: when one process "
        "trains, the copy fits into half of the free memory, and nothing (`on_save`, the Hub) reads it at once.",
    )
    on_save_failure: str = arg(
        "stop", "When a checkpoint cannot be written, `stop` the training or `continue` without it (finetune only)."
    )
    save_on_exception: bool = arg(
        False,
        "Save a checkpoint when training stops with an error or Ctrl-C, with one process: of several, the others might "
        "never join the save (finetune only).",
    )
    overwrite_output_dir: bool = arg(
        False, "Programs may write into a folder that holds a finished run (finetune only; from older transformers)."
    )

    def _validate(self) -> None:
        if self.save_strategy == SaveStrategy.STEPS:
            require_positive("save_steps", self.save_steps)
            require_whole("save_steps", self.save_steps)
        require_choice("on_save_failure", self.on_save_failure, ["stop", "continue"])
        for name in ("keep_last", "keep_best"):
            require_positive(name, getattr(self, name))
        require(
            self.save_total_limit is None or not (self.keep_last or self.keep_best),
            "`save_total_limit` cannot be combined with `keep_last` or `keep_best`; use one of the two policies.",
        )
        if self.keep_best and self.save_strategy not in (SaveStrategy.NO, SaveStrategy.BEST):
            self._validate_keep_best()

    def _validate_keep_best(self) -> None:
        """Raises ArgumentError for checkpoints without a metric, which would be deleted as if they were worse."""
        others: Any = self
        require(
            others.eval_strategy == self.save_strategy,
            f"`keep_best={self.keep_best}` needs every checkpoint to be evaluated, but `save_strategy="
            f"'{self.save_strategy}'` and `eval_strategy='{others.eval_strategy}'`. Set both to 'steps' or both to "
            "'epoch', or evaluate and set `save_strategy='best'`.",
        )
        if self.save_strategy == SaveStrategy.STEPS and (others.eval_steps or 0) > 0:
            others._validate_multiple(needed_by="keep_best")


@dataclass(kw_only=True, repr=False)
class HubArguments(ArgumentGroup):
    """Pushing to the Hub."""

    push_to_hub: bool = arg(False, "Push to the Hub whenever the model is saved.")
    hub_model_id: str | None = arg(None, "Repository, as `name` or `owner/name`; unset means the output folder's name.")
    hub_strategy: HubStrategy | str = arg(
        "every_save", "What is pushed: `end`, `every_save`, `checkpoint` or `all_checkpoints`."
    )
    hub_token: str | None = arg(
        None, "Access token; unset means the one of `hf auth login`.", repr=False, old=["push_to_hub_token"]
    )
    hub_private_repo: bool | None = arg(None, "Create the repository as private; unset means the owner's default.")
    hub_always_push: bool = arg(False, "Push even while the previous push is running.")
    hub_revision: str | None = arg(None, "Branch or tag to push to.")
