"""`SFTTrainer`: supervised fine-tuning of causal language models, with TRL's constructor and behaviour."""

import logging
import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from finetune.arguments import TrainingArguments
from finetune.arguments.coerce import coerce_training_arguments
from finetune.compat import EvalLoopOutput, TrainOutput
from finetune.data import preview
from finetune.data.loading.collate import DataCollatorForLanguageModeling
from finetune.data.preparation.audit import SupervisionAudit
from finetune.data.rows import WEIGHTS
from finetune.data.sources import first_row
from finetune.distributed.accelerator import fsdp_version
from finetune.engine import setup
from finetune.engine.before_rows import check_before_rows, check_given
from finetune.engine.meter import MetricBag, TokenCounter
from finetune.features.offload import offload_activations
from finetune.hub.card import create_sft_model_card
from finetune.kernels.attention import use_packed_attention
from finetune.kernels.fused_head import fuse_head
from finetune.sft import recompute
from finetune.sft.batching import make_collator, settle_padding
from finetune.sft.build import (
    brings_packed_attention,
    can_be_padding_free,
    check_model_options,
    check_rows,
    load_model_for_sft,
    load_tokenizer_for_sft,
    prove_isolation,
)
from finetune.sft.config import SFTConfig
from finetune.sft.experts import own_weight_is_zero, router_coefficient
from finetune.sft.loss_methods import SFTLossMethods, refuse_loss_function
from finetune.sft.plan import DataPlan
from finetune.sft.preparation import SFTRowMethods

if TYPE_CHECKING:
    import transformers
    from peft import PeftConfig
    from typing_extensions import Unpack


class SFTTrainer(SFTRowMethods, SFTLossMethods):
    """Fine-tunes a causal language model on text, prompt-completion or chat rows.

    `SFTTrainer(model="path-or-id", train_dataset=rows).train()` is enough: the model and its tokenizer are loaded, the
    rows recognised, tokenised and masked, the end-of-sequence token supervised, and labels masked by position.

    The loss is computed without building the logits (`kernels/fused_head.py`) wherever the model's head allows it.
    Logged beside the loss: `mean_token_accuracy`, `entropy` (nats) and `num_tokens`, as TRL does.

    Args:
        model: a folder, a Hub id, or a loaded model. A name is loaded in float32 unless `model_init_kwargs` sets
            `dtype`.
        args: the configuration. TRL's `SFTConfig`, transformers' `TrainingArguments` and a dict of fields are read
            too; unset means the defaults and the folder `<model name>-SFT`.
        data_collator: makes a batch from a list of rows; unset means the one that fits the rows.
        train_dataset: a `Dataset`, an `IterableDataset` or a list of rows with `text`, `prompt` and `completion`,
            `messages`, or `input_ids`. Required.
        eval_dataset: rows as for training, or a dict of several datasets.
        processing_class: the tokenizer or processor; unset means the one stored with the model.
        compute_loss_func: called as `(outputs, labels, num_items_in_batch)`, returns the loss.
        compute_metrics: called with an `EvalPrediction`, returns a dict of metrics.
        callbacks: a list of callbacks, classes or instances, in addition to those of `report_to`.
        optimizers: an optimizer and a schedule to use instead of those that `args` describe; either may be None.
        optimizer_cls_and_kwargs: a class and its keyword arguments, instead of `args.optim`.
        preprocess_logits_for_metrics: called as `(logits, labels)` before the logits are kept for `compute_metrics`.
        quantization_config: transformers' configuration for a model that is given by name.
        peft_config: adapters to train, such as `peft.LoraConfig`; unset trains all weights.
        formatting_func: called with one row, returns its text, messages or another row.
        old_names: `tokenizer`, which is called `processing_class` now.

    Raises:
        ArgumentError: arguments that contradict each other or the rows; every broken rule in one message.
        DataFormatError: rows that cannot be trained on.
        ModelLoadError: the model or the tokenizer cannot be read.

    Attributes of TRL's trainer that can be read here too: `padding_free`, `completion_only_loss`,
    `router_aux_loss_coef` and `aux_loss_enabled`.
    """

    create_model_card = create_sft_model_card
    _recomputation: recompute.Recomputation | None = None
    _isolation_is_proven = False

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module,
        args: "SFTConfig | TrainingArguments | transformers.TrainingArguments | dict[str, Any] | None" = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_loss_func: Callable[..., Tensor] | None = None,
        compute_metrics: Callable[..., dict[str, Any]] | None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
        quantization_config: Any = None,
        peft_config: "PeftConfig | None" = None,
        formatting_func: Callable[[dict[str, Any]], Any] | None = None,
        **old_names: "Unpack[setup.OldNames]",
    ) -> None:
        processing_class = setup.accept_old_names(old_names, processing_class, type(self), SFTConfig)
        model = setup.name_or_model(model)
        args = SFTConfig(setup.folder_for(model, "SFT")) if args is None else coerce_training_arguments(args, SFTConfig)
        check_given(processing_class=processing_class, callbacks=callbacks, formatting_func=formatting_func)
        check_before_rows(
            self,
            args,
            model=model,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            peft_config=peft_config,
            brings_optimizer=optimizers[0] is not None or optimizer_cls_and_kwargs is not None,
        )
        predicts = bool(compute_metrics or preprocess_logits_for_metrics)
        self._plan = DataPlan.resolve(args, first_row(train_dataset), formatting_func, reads_predictions=predicts)
        self._formatting_func = formatting_func
        check_model_options(args, model, quantization_config)
        refuse_loss_function(args, compute_loss_func)
        tokenizer = load_tokenizer_for_sft(args, model, processing_class)
        processing_class = tokenizer.processing_class
        self.audits: dict[str, SupervisionAudit] = {}
        train_dataset = self._prepare_dataset(
            train_dataset, processing_class, args, self._plan.packing, formatting_func, "train"
        )
        eval_dataset = self._prepare_eval(eval_dataset, processing_class, args)
        setup.seed_everything(args)
        model = load_model_for_sft(args, model, tokenizer, quantization_config, peft_config)
        check_rows(model, processing_class, train_dataset, eval_dataset)
        self._router_coefficient = router_coefficient(model, args.router_aux_loss_coef)
        wants_logits = predicts or compute_loss_func is not None
        self._plan = settle_padding(
            self._plan,
            args,
            model,
            has_collator=data_collator is not None,
            reads_training=self._overrides("training_step"),
            reads_eval=wants_logits or self._overrides("compute_loss", "prediction_step"),
        )
        self._collator_is_ours = data_collator is None
        if data_collator is None:
            data_collator = make_collator(self._plan, args, model, processing_class)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self._settle_padding()
        self._metrics = {"train": MetricBag(), "eval": MetricBag()}
        self._tokens = TokenCounter()
        if self.is_world_process_zero() and args.get_process_log_level() <= logging.WARNING:
            preview.show(self._preview, self.audits)

    def _settle_padding(self) -> None:
        """Decides whether batches are padding-free, if that depends on the model: here, where it is on its device."""
        if self._plan.padding_free is None:
            self._plan = self._plan.settle(padding_free=can_be_padding_free(self.model))
            assert isinstance(self.data_collator, DataCollatorForLanguageModeling)
            self.data_collator.padding_free = self.padding_free

    @property
    def padding_free(self) -> bool:
        """Whether a batch is one row of concatenated samples."""
        return bool(self._plan.padding_free)

    @property
    def completion_only_loss(self) -> bool:
        """Whether the tokens of prompts are not trained."""
        return self._plan.completion_only_loss

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = [
                *(
                    "input_ids",
                    "labels",
                    "seq_lengths",
                    "completion_mask",
                    "assistant_masks",
                    "attention_mask",
                    WEIGHTS,
                ),
                *([self.args.length_column_name] if self._collator_is_ours else []),
            ]

    # ---- Training ----

    def describe_activations(self) -> str:
        """Returns on one line whether this run keeps its activations, and why; empty before training starts."""
        return str(self._recomputation or "")

    def _recomputes_activations(self) -> bool:
        plugin: Any = self.accelerator.state.fsdp_plugin if fsdp_version(self.accelerator) is not None else None
        self._recomputation = recompute.decide(
            self.model,
            self.args,
            num_rows=self._train_batch_size,
            longest_row=recompute.longest_row(self.train_dataset, self.args.max_length),
            autocast=self.compute_loss_context_manager(),
            fsdp_recomputes=plugin is not None and bool(plugin.activation_checkpointing),
        )
        return self._recomputation.recomputes

    def _change_model(self, stack: ExitStack) -> None:
        """Lets the model attend within samples and compute its loss without logits."""
        if self._plan.padding_free:
            self._keep_samples_apart(stack)
        elif self._plan.eval_padding_free:
            with ExitStack() as proof:  # now, because the weights may be sharded when an evaluation comes
                self._keep_samples_apart(proof)
        if self._router_coefficient is not None:
            stack.enter_context(own_weight_is_zero(self.model))
        if self.args.activation_offloading:
            stack.enter_context(offload_activations(self.model))
        if self._why_not_fused() is None:
            options = {"label_smoothing": self.args.label_smoothing_factor, "dft": self.args.loss_type == "dft"}
            self._head = stack.enter_context(fuse_head(self.model, entropy=True, **options))
            # Whoever else calls the model meanwhile (an overridden `compute_loss`, a callback) gets its logits.
            stack.enter_context(self._head.suspended())
            stack.callback(setattr, self, "_head", None)

    def _keep_samples_apart(self, stack: ExitStack) -> None:
        """Lets the model attend within the samples of a row, and proves once that it does."""
        if brings_packed_attention(self.model):
            return
        stack.enter_context(use_packed_attention(self.model))
        if not self._isolation_is_proven:
            prove_isolation(self.model)
            self._isolation_is_proven = True

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As `Trainer.evaluation_loop`; packed rows attend within samples, also where training rows are padded."""
        with self.model_features(), ExitStack() as stack:
            if self._plan.eval_padding_free and not self._plan.padding_free:
                self._keep_samples_apart(stack)
            return super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As `Trainer.train`; the audit and the preview of the data go to the run folder first."""
        if self.args.should_save:
            preview.write(self.output_dir, self._preview, self.audits)
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
