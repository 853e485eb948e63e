"""`evaluate` and `predict` for trainers that prepare rows themselves: raw rows go the way of the training rows."""

from collections.abc import Callable, Mapping
from typing import Any

from torch.utils.data import DataLoader

from finetune.data.loading.samplers import SequentialSampler
from finetune.facade.evaluation import EvaluationMethods


class RawRowMethods(EvaluationMethods):
    """Loaders of datasets given to `evaluate` and `predict`. A trainer puts it before `Trainer` among its bases."""

    _keeps_order = False

    def _prepare_given(self, dataset: Any, name: str) -> Any:
        """Returns the dataset ready for the loader: as it is, if it is prepared already. Each trainer has its own."""
        raise NotImplementedError

    def _prepared_rows(self) -> list[Any]:
        """Returns the trainer's own datasets, which are prepared."""
        evaluated = self.eval_dataset
        return [self.train_dataset, *(evaluated.values() if isinstance(evaluated, Mapping) else [evaluated])]

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """As `Trainer.get_eval_dataloader`; raw rows are prepared."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._prepare_given(eval_dataset, "eval")
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """As `Trainer.get_test_dataloader`, in the order of the rows; raw rows are prepared."""
        self._keeps_order = True
        try:
            return super().get_test_dataloader(self._prepare_given(test_dataset, "test"))
        finally:
            self._keeps_order = False

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        # Predictions are read by position, so they are never grouped by length.
        if self._keeps_order and hasattr(eval_dataset, "__len__"):
            return SequentialSampler(eval_dataset)
        return super()._get_eval_sampler(eval_dataset)


def prepare_each(eval_dataset: Any, prepare: Callable[[Any, str], Any]) -> Any:
    """Returns `prepare(dataset, name)` of one dataset (named "eval") or of each in a dictionary; None stays None.

    One under the key "train" is named "eval[train]": by the name "train", trainers know the rows to train on.
    """
    if isinstance(eval_dataset, Mapping):
        names = {key: "eval[train]" if key == "train" else str(key) for key in eval_dataset}
        return {key: prepare(part, names[key]) for key, part in eval_dataset.items()}
    return None if eval_dataset is None else prepare(eval_dataset, "eval")
