"""`SequenceClassificationTrainer`: classes, several classes per row, or numbers from text, on the common trainer."""

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from finetune.arguments import TrainingArguments
from finetune.arguments.coerce import coerce_training_arguments
from finetune.data.loading.collate import default_collator
from finetune.data.preparation.pipeline import say_on_main_process
from finetune.data.rows import IGNORE_INDEX
from finetune.data.sources import as_dataset, first_row
from finetune.engine import setup
from finetune.engine.before_rows import check_before_rows, check_given
from finetune.facade.raw_rows import RawRowMethods, prepare_each
from finetune.kernels.unpadded import use_unpadded_trunk
from finetune.models.adapters import unwrap
from finetune.models.load import load_tokenizer
from finetune.models.traits import takes_argument
from finetune.sequence_classification.build import (
    check_smoothing,
    config_of,
    init_kwargs,
    labels_of,
    load_classifier,
    with_adapters,
)
from finetune.sequence_classification.config import SequenceClassificationConfig
from finetune.sequence_classification.data import find_columns, prepare_rows
from finetune.sequence_classification.labels import MULTI, SINGLE, Task, balanced_weights, read_task
from finetune.sequence_classification.metrics import first_output, metrics_for
from finetune.sequence_classification.padding import (
    longest_row,
    padding_multiple,
    settle_padding,
    settle_padding_free,
)
from finetune.trainer import Trainer
from finetune.wrappers import is_peft_model

if TYPE_CHECKING:
    import transformers
    from peft import PeftConfig
    from typing_extensions import Unpack

# Not `config.json`: transformers takes a folder with one for a whole model, and looks for its weights there.
ADAPTED_CONFIG = "classifier_config.json"


class SequenceClassificationTrainer(RawRowMethods, Trainer):
    """Fine-tunes a model to classify texts or pairs of texts, or to predict numbers from them.

    `SequenceClassificationTrainer(model="path-or-id", train_dataset=rows).train()` is enough: text and labels are
    found (`text`, `sentence1` and `sentence2`, ...; `label`), and so is what the labels mean: one class (names,
    integers), several classes (lists) or numbers (floats). The head gets the right size, the names of the classes are
    saved in `id2label`, rows are padded per batch and grouped by length. Where a probe at the start shows the same
    logits, the layers below the head leave the padding out (`padding_free`).

    The loss is a sum over rows divided by the rows of the whole step, so it does not depend on accumulation or the
    number of processes. `class_weights` change how much a row counts, see `labels.balanced_weights`.

    With `peft_config`, the head is trained in full and saved with the adapter, beside the `classifier_config.json` that
    names the classes: `AutoModelForSequenceClassification.from_pretrained(folder, config=AutoConfig.from_pretrained(
    f"{folder}/classifier_config.json"))` is the trained model. Data given later to `evaluate` and `predict` may be raw
    rows.

    Args:
        model: a folder, a Hub id, or a loaded model with the right number of outputs.
        args: the configuration. transformers' `TrainingArguments` and a dict of fields are read too; unset means the
            defaults and the folder `<model name>-classification`.
        data_collator: makes a batch from a list of rows; unset means one that pads.
        train_dataset: a `Dataset`, an `IterableDataset` or a list of rows with text and labels. Required.
        eval_dataset: rows as for training, or a dict of several datasets.
        processing_class: the tokenizer; unset means the one stored with the model.
        compute_loss_func: called as `(outputs, labels, num_items_in_batch)`, returns the loss.
        compute_metrics: called with an `EvalPrediction`, returns a dict of metrics; unset means those of the task.
        callbacks: a list of callbacks, classes or instances, in addition to those of `report_to`.
        optimizers: an optimizer and a schedule to use instead of those that `args` describe; either may be None.
        optimizer_cls_and_kwargs: a class and its keyword arguments, instead of `args.optim`.
        preprocess_logits_for_metrics: called as `(logits, labels)` before the logits are kept for `compute_metrics`.
        quantization_config: transformers' configuration for a model that is given by name.
        peft_config: adapters to train beside the head, such as `peft.LoraConfig`; unset trains all weights.
        old_names: `tokenizer`, which is called `processing_class` now.

    Attributes:
        task: what the labels mean: `problem_type`, `names`, `counts`.

    Raises:
        ArgumentError: arguments that contradict each other or the data.
        DataFormatError: rows without text or labels.
        ModelLoadError: the model or the tokenizer cannot be read.
    """

    _tag_names = ["sequence-classification"]

    if TYPE_CHECKING:

        @property
        def args(self) -> SequenceClassificationConfig: ...
        @args.setter
        def args(self, value: Any) -> None: ...

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module,
        args: "TrainingArguments | transformers.TrainingArguments | dict[str, Any] | None" = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_loss_func: Callable[..., Tensor] | None = None,
        compute_metrics: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
        quantization_config: Any = None,
        peft_config: "PeftConfig | None" = None,
        **old_names: "Unpack[setup.OldNames]",
    ) -> None:
        processing_class = setup.accept_old_names(old_names, processing_class, type(self), SequenceClassificationConfig)
        model = setup.name_or_model(model)
        if args is None:
            args = SequenceClassificationConfig(setup.folder_for(model, "classification"))
        args = coerce_training_arguments(args, SequenceClassificationConfig)
        check_given(processing_class=processing_class, callbacks=callbacks)
        check_before_rows(
            self,
            args,
            model=model,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            peft_config=peft_config,
            brings_optimizer=optimizers[0] is not None or optimizer_cls_and_kwargs is not None,
        )
        setup.seed_everything(args)
        config = config_of(model, args)
        train_dataset = as_dataset(train_dataset)
        self._has_lengths = "length" in first_row(train_dataset, "train")
        self._columns = find_columns(train_dataset, args.text_columns, args.label_column, "train")
        self.task = read_task(
            train_dataset,
            self._columns.label,
            problem_type=args.problem_type,
            class_names=args.class_names,
            model_labels=labels_of(model, config),
        )
        check_smoothing(args, self.task)
        weights = None if args.class_weights is None else balanced_weights(self.task, args.class_weights)
        self._class_weights = None if weights is None else torch.tensor(weights)
        if processing_class is None:
            revision = init_kwargs(args).get("revision")
            processing_class = load_tokenizer(model, revision=revision, trust_remote_code=args.trust_remote_code)
        model = load_classifier(model, config, args, self.task, quantization_config)
        self._max_length = longest_row(args.max_length, processing_class, model)
        train_dataset = self._prepare_dataset(train_dataset, processing_class, args, "train")
        eval_dataset = self._prepare_eval(eval_dataset, processing_class, args)
        settle_padding(processing_class, model, args.pad_token, train_dataset)
        if peft_config is not None:
            model = with_adapters(model, peft_config, bool(args.gradient_checkpointing))
        multiple = padding_multiple(args, self._max_length, model)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or default_collator(processing_class, multiple),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics or metrics_for(self.task),
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics or first_output,
        )
        # `compute_loss` divides by the count itself, whatever the model's `forward` takes.
        self.model_accepts_loss_kwargs = True
        self._takes_use_cache = takes_argument(self.model, "use_cache")
        self._padding_free = settle_padding_free(args, self.model, processing_class)
        columns = " and ".join(f"`{column}`" for column in self._columns.texts or ("input_ids",))
        say_on_main_process(f"train: text in {columns}; {self.task.describe()}")

    # ---- Data ----

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """Returns the rows as token ids and labels. Called for the training and each evaluation dataset."""
        dataset = as_dataset(dataset)
        columns = self._columns
        if dataset_name != "train":
            row = first_row(dataset, dataset_name)
            is_tokenized = "input_ids" in row and not set(columns.texts) <= set(row)
            named = None if is_tokenized else columns.texts or None
            columns = find_columns(dataset, named, columns.label, dataset_name)
        return prepare_rows(
            dataset, processing_class, columns, self.task, self._max_length, dataset_name, args.dataset_num_proc
        )

    def _prepare_eval(self, eval_dataset: Any, processing_class: Any, args: Any) -> Any:
        return prepare_each(eval_dataset, lambda part, name: self._prepare_dataset(part, processing_class, args, name))

    def _prepare_given(self, dataset: Any, name: str) -> Any:
        dataset = as_dataset(dataset)
        if not hasattr(dataset, "column_names") or self._is_prepared(dataset, first_row(dataset, name)):
            return dataset
        return self._prepare_dataset(dataset, self.processing_class, self.args, name)

    def _is_prepared(self, dataset: Any, row: Mapping[str, Any]) -> bool:
        """Returns whether the rows have tokens, and no labels that still stand for the ids of classes."""
        if "input_ids" not in row:
            return False
        # A part of a prepared dataset has lengths, too.
        is_part = "length" in row and not self._has_lengths
        return is_part or self._columns.label not in row or any(dataset is own for own in self._prepared_rows())

    # ---- Padding ----

    def _change_model(self, stack: ExitStack) -> None:
        """Lets the layers of the model leave padding out, where that was settled."""
        if self._padding_free:
            side = getattr(self.processing_class, "padding_side", "right")
            stack.enter_context(use_unpadded_trunk(self.model, side))

    # ---- Loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Returns the loss, or (loss, outputs): the weighted sum over rows (or labels) / `num_items_in_batch`."""
        if self._takes_use_cache:
            inputs = {**inputs, "use_cache": False}
        if self.compute_loss_func is not None or "labels" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        if self._class_weights is not None and self._class_weights.device != logits.device:
            self._class_weights = self._class_weights.to(logits.device)
        total = loss_sum(logits, labels, self.task, self._class_weights, self.args.label_smoothing_factor)
        loss = total / (labels.numel() if num_items_in_batch is None else num_items_in_batch)
        loss = self._undo_process_average(loss, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    @property
    def _sums_losses(self) -> bool:
        return self.compute_loss_func is None or super()._sums_losses

    # ---- Saving ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """As `Trainer._save`; an adapter's folder also gets `ADAPTED_CONFIG`, with the names of the classes."""
        super()._save(output_dir, state_dict)
        # Under FSDP every process comes here, and one writes.
        if self.args.should_save and is_peft_model(unwrap(self.model, keep_adapters=True)):
            inner: Any = unwrap(self.model)
            inner.config.to_json_file(Path(output_dir or self.output_dir, ADAPTED_CONFIG))


def loss_sum(logits: Tensor, labels: Tensor, task: Task, weights: Tensor | None, label_smoothing: float) -> Tensor:
    """Returns the summed loss of logits (B, C): cross-entropy, binary cross-entropy of each label, or squared error.

    `weights` (C,) are those of `labels.balanced_weights`: of a row's class, or of a label's positives. Labels of -100
    (rows that only keep processes in step) count nothing.
    """
    logits = logits.float()
    if task.problem_type == SINGLE:
        return functional.cross_entropy(logits, labels, weights, reduction="sum", label_smoothing=label_smoothing)
    kept, labels = labels.ne(IGNORE_INDEX), labels.float()
    if task.problem_type == MULTI:
        losses = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none", pos_weight=weights)
    else:
        losses = functional.mse_loss(logits.view_as(labels), labels, reduction="none")
    return losses.masked_fill(~kept, 0.0).sum()
