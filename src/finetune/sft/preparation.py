"""How `SFTTrainer` turns rows into tokens: the training rows, the evaluation rows, and rows given later."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch.utils.data import DataLoader

from finetune.data.audit import SupervisionAudit
from finetune.data.collate import DataCollatorForLanguageModeling
from finetune.data.inspect import Preview, preview
from finetune.data.packing import pack_dataset, packing_report
from finetune.data.pipeline import first_row, is_stream, prepare_split, say_on_main_process
from finetune.data.settings import DataSettings
from finetune.facade.raw_rows import RawRowMethods, prepare_each
from finetune.sft.config import SFTConfig
from finetune.sft.plan import DataPlan


class SFTRowMethods(RawRowMethods):
    """The half of `SFTTrainer` that prepares rows. Use `SFTTrainer`."""

    _plan: DataPlan
    _formatting_func: Callable[..., Any] | None
    audits: dict[str, SupervisionAudit]
    _preview: Preview | None = None

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Callable[..., Any] | None,
        dataset_name: str,
    ) -> Any:
        """Returns the rows as token ids and labels, packed if asked. Called for the training and each eval data set."""
        if self._plan.skip_prepare:
            return dataset
        if isinstance(dataset, list):
            from datasets import Dataset

            dataset = Dataset.from_list(dataset)
        if args.shuffle_dataset and dataset_name == "train":
            dataset = dataset.shuffle(seed=args.seed)
        settings = DataSettings.from_args(args, packing=packing, formatting_func=formatting_func)
        split = prepare_split(dataset, processing_class, settings, name=dataset_name)
        split.audit.check(max_length=args.max_length)
        rows, audit = split.dataset, split.audit
        if packing and "seq_lengths" not in (rows.column_names or ()):
            options = {} if is_stream(rows) else {"desc": f"Packing {dataset_name} rows"}
            packed = pack_dataset(rows, args.max_length or 0, args.packing_strategy, options)
            if not is_stream(rows):
                audit = audit.with_packing(packing_report(rows, packed, args.max_length or 0).efficiency)
            rows = packed
        self.audits[dataset_name] = audit
        if dataset_name == "train":
            self._preview = preview(dataset, processing_class, settings)
        return rows

    def _prepare_eval(self, eval_dataset: Any, processing_class: Any, args: SFTConfig) -> Any:
        """Returns one prepared evaluation data set, or a dict of them."""
        packing = self._plan.eval_packing
        return prepare_each(
            eval_dataset,
            lambda part, name: self._prepare_dataset(
                part, processing_class, args, packing, self._formatting_func, name
            ),
        )

    def _prepare_given(self, dataset: Any, name: str) -> Any:
        """Returns rows given to `evaluate` or `predict` as token ids and labels. Predictions are never packed."""
        if not isinstance(dataset, list) and not hasattr(dataset, "column_names"):
            return dataset
        if {"input_ids", "labels"} <= set(first_row(dataset, name)):
            return dataset
        packing = self._plan.eval_packing and name != "test"
        rows = self._prepare_dataset(dataset, self.processing_class, self.args, packing, self._formatting_func, name)
        if name == "test" and (audit := self.audits.get(name)) is not None and audit.num_dropped:
            say_on_main_process("\n".join(f"test: {line}" for line in audit.warnings()))
        return rows

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """As `Trainer.get_test_dataloader`; raw rows are prepared, and each has its own row of predictions."""
        collator = self.data_collator
        is_packed = "seq_lengths" in (getattr(test_dataset, "column_names", None) or ())
        if not is_packed and isinstance(collator, DataCollatorForLanguageModeling) and collator.padding_free:
            self.data_collator = replace(collator, padding_free=False)
        try:
            return super().get_test_dataloader(test_dataset)
        finally:
            self.data_collator = collator
