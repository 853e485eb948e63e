"""Data loading."""

# ruff: noqa: RUF009

from dataclasses import dataclass

from finetune.arguments.base import ArgumentGroup, arg, require, require_choice, require_positive

SAMPLING_STRATEGIES = ["random", "sequential", "group_by_length", "batch_rebalance"]
START_METHODS = ["fork", "spawn", "forkserver"]


@dataclass(kw_only=True, repr=False)
class DataLoaderArguments(ArgumentGroup):
    """Data loaders and sampling order."""

    dataloader_drop_last: bool = arg(False, "Leave out the last batch if it is not full.")
    dataloader_num_workers: int = arg(0, "Processes that load data; 0 loads in the main process.")
    dataloader_pin_memory: bool = arg(True, "Page-locked memory for faster copies to the device.")
    dataloader_persistent_workers: bool = arg(False, "Keep the loading processes alive between epochs.")
    dataloader_prefetch_factor: int | None = arg(None, "Batches that each loading process prepares in advance.")
    dataloader_multiprocessing_context: str | None = arg(
        None, "Start method of the loading processes.", choices=START_METHODS
    )
    dataloader_in_order: bool = arg(True, "Yield batches in order; False yields whichever is ready first.")
    remove_unused_columns: bool = arg(True, "Drop the columns that the model's forward does not take.")
    label_names: list[str] | None = arg(None, "Input names that are labels; unset means those the model declares.")
    train_sampling_strategy: str = arg("random", "Order of the training samples.", choices=SAMPLING_STRATEGIES)
    length_column_name: str = arg("length", "Column that holds the samples' lengths, for the strategies that use them.")

    def _validate(self) -> None:
        require_positive("dataloader_num_workers", self.dataloader_num_workers, zero=True)
        require_choice("train_sampling_strategy", self.train_sampling_strategy, SAMPLING_STRATEGIES)
        if self.dataloader_multiprocessing_context is not None:
            require_choice("dataloader_multiprocessing_context", self.dataloader_multiprocessing_context, START_METHODS)
        require(
            self.dataloader_num_workers > 0 or self.dataloader_prefetch_factor is None,
            "`dataloader_prefetch_factor` needs loading processes: set `dataloader_num_workers` above 0.",
        )
