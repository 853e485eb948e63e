"""Mixin of `Trainer`: loaders, samplers, and which columns reach the model."""

from collections.abc import Callable
from typing import Any

from torch.utils.data import DataLoader

from finetune.arguments import TrainingArguments
from finetune.data import columns
from finetune.data.loading import loader as loaders
from finetune.data.loading import position
from finetune.distributed.accelerator import processes_in_step
from finetune.engine.plan import StepPlan
from finetune.errors import ArgumentError
from finetune.facade.base import TrainerBase


class DataMethods(TrainerBase):
    """Data loaders. Use `Trainer`."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Returns the training loader. Called once at the start of each `train()`."""
        if self.train_dataset is None:
            raise ArgumentError("Training needs data: pass `train_dataset`.")
        return self._get_dataloader(
            dataset=self.train_dataset,
            description="Training",
            batch_size=self._train_batch_size,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Returns the loader of `eval_dataset`: a dataset, a key of `self.eval_dataset`, or None for the latter."""
        own = eval_dataset is None or eval_dataset is self.eval_dataset
        key = eval_dataset if isinstance(eval_dataset, str) else "eval" if own else None
        if self.args.dataloader_persistent_workers and key in self._eval_loaders:
            return self._eval_loaders[key]
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ArgumentError("Evaluation needs data: pass `eval_dataset`.")
        return self._get_dataloader(
            dataset=dataset,
            description="Evaluation",
            batch_size=self.args.eval_batch_size,
            sampler_fn=self._get_eval_sampler,
            dataloader_key=key,
        )

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """Returns the loader that `predict` uses."""
        return self._get_dataloader(
            dataset=test_dataset,
            description="test",
            batch_size=self.args.eval_batch_size,
            sampler_fn=self._get_eval_sampler,
        )

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Callable[[Any], Any] | None = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> DataLoader[Any]:
        """Returns a prepared loader over the columns the model takes. Called by the three `get_*_dataloader`."""
        # Samplers read the column of lengths, which the model does not take.
        collate, with_lengths = self.data_collator, dataset
        if hasattr(dataset, "remove_columns"):
            dataset = self._remove_unused_columns(dataset, description=description)
        if getattr(dataset, "column_names", None) is None:
            collate = self._get_collator_with_removed_columns(collate, description=description)
        sampler = sampler_fn(with_lengths) if sampler_fn is not None and not position.is_stream(dataset) else None
        if is_training and position.is_stream(dataset):
            loaders.warn_of_stream_order(self.args)
        with processes_in_step(self.accelerator):
            loader = loaders.build_dataloader(
                dataset,
                args=self.args,
                accelerator=self.accelerator,
                collate_fn=collate,
                batch_size=batch_size,
                sampler=sampler,
                is_training=is_training,
            )
        if dataloader_key is not None and self.args.dataloader_persistent_workers:
            self._eval_loaders[dataloader_key] = loader
        return loader

    def set_initial_training_values(
        self, args: TrainingArguments, dataloader: DataLoader[Any]
    ) -> tuple[int, int, int, float, int, int, int]:
        """Returns how long the run is: epochs, updates per epoch, rows of the data, rows seen by the run, rows per
        update, batches per epoch, and updates. Called once per `train()`, with the training loader."""
        sized = position.has_length(dataloader)
        plan = StepPlan.resolve(
            num_batches=len(dataloader) if sized else None,
            num_examples=self.num_examples(dataloader) if sized else None,
            accumulation=args.gradient_accumulation_steps,
            num_train_epochs=args.num_train_epochs,
            max_steps=args.max_steps,
            total_batch_size=self.get_total_train_batch_size(args),
        )
        return plan.values

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Returns the sampler of the training data, None for a stream. Called by `get_train_dataloader`."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return loaders.train_sampler(dataset, self.args, self._input_name)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """Returns the sampler of an evaluation dataset. Called by `get_eval_dataloader` and `get_test_dataloader`."""
        return loaders.eval_sampler(eval_dataset, self.args, self._input_name)

    @property
    def _input_name(self) -> str | None:
        names = getattr(self.processing_class, "model_input_names", None)
        return names[0] if names else None

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = columns.signature_columns(self.model, self.label_names)

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        """Returns the dataset without the columns that `model.forward` does not take."""
        if not self.args.remove_unused_columns:
            return dataset
        self._set_signature_columns_if_needed()
        return columns.remove_unused_columns(
            dataset,
            self._signature_columns or [],
            description=description,
            model_name=type(self.model).__name__,
        )

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        """Returns the collator behind a filter of columns, for datasets whose columns cannot be removed up front."""
        if not self.args.remove_unused_columns:
            return data_collator
        self._set_signature_columns_if_needed()
        return columns.collator_with_columns(
            data_collator, self._signature_columns or [], description=description, model_name=type(self.model).__name__
        )

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        """Returns the rows of a loader's dataset."""
        return loaders.num_examples(dataloader, self.args.per_device_train_batch_size)
