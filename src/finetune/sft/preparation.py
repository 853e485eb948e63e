"""How `SFTTrainer` turns rows into tokens: the training rows, the evaluation rows, and rows given later."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from finetune.data.loading.collate import DataCollatorForLanguageModeling
from finetune.data.preparation import cache
from finetune.data.preparation.audit import SupervisionAudit, count_rows
from finetune.data.preparation.labels import count_supervised_in
from finetune.data.preparation.packing import pack_dataset
from finetune.data.preparation.packing_report import packing_report
from finetune.data.preparation.pipeline import prepare_split, say_on_main_process
from finetune.data.preparation.settings import DataSettings
from finetune.data.preview import Preview, preview
from finetune.data.rows import LENGTH, WEIGHTS
from finetune.data.sources import as_dataset, first_row, is_iterable_dataset
from finetune.errors import DataFormatError
from finetune.facade.raw_rows import RawRowMethods, prepare_each
from finetune.sft.config import SFTConfig
from finetune.sft.plan import DataPlan

_PACKED_COLUMNS = ("input_ids", "labels", LENGTH, WEIGHTS)


class SFTRowMethods(RawRowMethods):
    """Mixin of `SFTTrainer` that prepares rows. Use `SFTTrainer`."""

    _plan: DataPlan
    _formatting_func: Callable[..., Any] | None
    audits: dict[str, SupervisionAudit]
    _preview: Preview | None = None
    _keeps_untrained = False

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Callable[..., Any] | None,
        dataset_name: str,
    ) -> Any:
        """Returns the rows as token ids and labels, packed if asked. Called for the training and each eval dataset."""
        if self._plan.skip_prepare:
            return dataset
        dataset = as_dataset(dataset)
        is_train = dataset_name == "train"
        shuffles = args.shuffle_dataset and is_train
        if shuffles:
            dataset = cache.shuffled(dataset, args.seed)
        settings = DataSettings.from_args(
            args, packing=packing, formatting_func=formatting_func, keep_untrained=self._keeps_untrained
        )
        split = prepare_split(dataset, processing_class, settings, name=dataset_name)
        rows, audit = split.dataset, split.audit
        # The first rows of a stream, and what is only evaluated, are no reason to refuse a run.
        warns = args.data_audit == "warn" or not is_train or audit.sampled
        if not self._keeps_untrained or audit.num_dropped == audit.num_rows:
            audit.check(max_length=args.max_length, warn=say_on_main_process if warns else None)
        if packing and "seq_lengths" not in (rows.column_names or ()):
            rows, audit = _packed(rows, args, audit)
            if shuffles:
                rows = _shuffled_blocks(rows, args.seed)
        self.audits[dataset_name] = audit
        if is_train:
            self._preview = preview(dataset, processing_class, settings)
        return rows

    def _prepare_eval(self, eval_dataset: Any, processing_class: Any, args: SFTConfig) -> Any:
        """Returns one prepared evaluation dataset, or a dict of them."""
        packing = self._plan.eval_packing
        return prepare_each(
            eval_dataset,
            lambda part, name: self._prepare_dataset(
                part, processing_class, args, packing, self._formatting_func, name
            ),
        )

    def _prepare_given(self, dataset: Any, name: str) -> Any:
        """Returns rows given to `evaluate` or `predict` as token ids and labels, as those given to the constructor.

        Rows for predictions are never packed, none is left out for having no label after `max_length`, and those that
        come with labels stay as they are: each has its prediction.
        """
        if not isinstance(dataset, list) and not hasattr(dataset, "column_names"):
            return dataset
        predicts = name == "test"
        has_labels = {"input_ids", "labels"} <= set(first_row(dataset, name))
        if has_labels and (predicts or any(dataset is own for own in self._prepared_rows())):
            return dataset
        packing = self._plan.eval_packing and not predicts
        self._keeps_untrained = predicts
        try:
            rows = self._prepare_dataset(
                dataset, self.processing_class, self.args, packing, self._formatting_func, name
            )
        finally:
            self._keeps_untrained = False
        if predicts and (audit := self.audits.get(name)) is not None and audit.num_dropped:
            say_on_main_process("\n".join(f"test: {line}" for line in audit.warnings()))
        return rows

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """As `Trainer.get_eval_dataloader`; raw rows are prepared, and packed ones collated as such."""
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        given = self.eval_dataset[given] if isinstance(given, str) else given
        pads = self._plan.pads_eval and not _holds_packed_rows(given)
        with self._collating(padding_free=False if pads else self._plan.eval_padding_free or None):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """As `Trainer.get_test_dataloader`; raw rows are prepared, and each has its own row of predictions."""
        with self._collating(padding_free=None if _holds_packed_rows(test_dataset) else False):
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _collating(self, *, padding_free: bool | None) -> Iterator[None]:
        """Context manager: makes the collator padding-free or not; None and a user's collator change nothing."""
        collator = self.data_collator
        if padding_free is not None and isinstance(collator, DataCollatorForLanguageModeling):
            self.data_collator = replace(collator, padding_free=padding_free)
        try:
            yield
        finally:
            self.data_collator = collator


def _holds_packed_rows(dataset: Any) -> bool:
    return "seq_lengths" in (getattr(dataset, "column_names", None) or ())


def _packed(rows: Any, args: Any, audit: SupervisionAudit) -> tuple[Any, SupervisionAudit]:
    """Returns prepared rows packed, and their audit with what packing did.

    Strategies that split a row can leave a packed row with nothing but a part of a prompt. It would take a step's time
    and train nothing, so it is left out; of a stream that is not counted.

    Raises:
        DataFormatError: no packed row would train anything.
    """
    length = args.max_length or 0
    # Rows that came prepared may have other columns, which cannot be joined token by token.
    if other := [column for column in rows.column_names or () if column not in _PACKED_COLUMNS]:
        rows = rows.remove_columns(other)
    if is_iterable_dataset(rows):
        return pack_dataset(rows, length, args.packing_strategy, keep=_trains), audit
    packed = pack_dataset(rows, length, args.packing_strategy, {"desc": f"Packing {audit.name} rows"})
    trained = np.flatnonzero(count_rows(packed)[1])
    if not len(trained):
        raise DataFormatError(
            f"The {audit.name} dataset cannot be trained on. Packed into rows of `max_length={length}` tokens, none "
            "of its tokens is predicted from one before it. Raise `max_length`."
        )
    num_packed, num_dropped = len(packed), len(packed) - len(trained)
    if num_dropped:
        packed = packed.select(trained)
    efficiency = packing_report(rows, packed, length).efficiency
    return packed, audit.with_packing(efficiency, num_packed, num_dropped)


def _trains(packed: Any) -> np.ndarray:
    """Returns which rows of an Arrow table have a label in the loss, (rows,) bool."""
    return count_supervised_in(packed) > 0


def _shuffled_blocks(packed: Any, seed: int) -> Any:
    """Returns packed rows in random order: of every block of rows that was packed, the fullest come first."""
    if not is_iterable_dataset(packed):
        return packed.shuffle(seed=seed)
    # One shard at a time, or each shard would be packed for itself.
    return packed.shuffle(seed=seed, max_buffer_input_shards=1)
