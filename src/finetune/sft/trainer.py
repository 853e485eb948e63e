"""`SFTTrainer`: supervised fine-tuning of causal language models, with TRL's constructor and behaviour."""

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from finetune.compat import TrainOutput, coerce_training_arguments
from finetune.data import inspect
from finetune.data.audit import SupervisionAudit
from finetune.data.collate import DataCollatorForLanguageModeling
from finetune.data.pipeline import first_row
from finetune.data.rows import WEIGHTS
from finetune.engine import setup
from finetune.engine.meter import MetricBag, TokenCounter
from finetune.errors import ArgumentError
from finetune.features.compiled import length_bucket
from finetune.features.offload import offload_activations
from finetune.hub.card import create_sft_model_card
from finetune.kernels.attention import use_packed_attention
from finetune.kernels.fused_head import LIGER_OWNS_HEAD, FusedHead, fuse_head, unsupported_reason
from finetune.kernels.isolation import require_isolation
from finetune.models.tokens import choose_pad_token
from finetune.models.traits import max_positions
from finetune.sft import recompute
from finetune.sft.build import (
    brings_packed_attention,
    can_be_padding_free,
    check_model_options,
    check_rows,
    load_model_for_sft,
    load_tokenizer_for_sft,
    uses_virtual_tokens,
)
from finetune.sft.config import SFTConfig
from finetune.sft.experts import auxiliary_loss, own_weight_is_zero, router_coefficient, without_router_outputs
from finetune.sft.losses import output_sums, token_sums
from finetune.sft.plan import DataPlan
from finetune.sft.preparation import SFTRowMethods
from finetune.trainer import Trainer


class SFTTrainer(SFTRowMethods, Trainer):
    """Fine-tunes a causal language model on text, prompt-completion or chat rows.

    `SFTTrainer(model="path-or-id", train_dataset=rows).train()` is enough: the model and its tokenizer are loaded, the
    rows recognised, tokenised and masked, the end-of-sequence token supervised, and labels masked by position.

    The loss is computed without building the logits (`kernels/fused_head.py`) wherever the model's head allows it.
    Logged beside the loss: `mean_token_accuracy`, `entropy` (nats) and `num_tokens`, as TRL does.

    Raises:
        ArgumentError: arguments that contradict each other or the rows; every broken rule in one message.
        DataFormatError: rows that cannot be trained on.
        ModelLoadError: the model or the tokenizer cannot be read.
    """

    create_model_card = create_sft_model_card

    def __init__(
        self,
        model: Any,
        args: Any = None,
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
        peft_config: Any = None,
        formatting_func: Callable[[dict[str, Any]], Any] | None = None,
        **old_names: Any,
    ) -> None:
        processing_class = setup.accept_old_names(old_names, processing_class, type(self), SFTConfig)
        if isinstance(model, os.PathLike):
            model = os.fspath(model)
        args = SFTConfig(setup.folder_for(model, "SFT")) if args is None else coerce_training_arguments(args, SFTConfig)
        if train_dataset is None:
            raise ArgumentError("`train_dataset` is required.")
        self._plan = DataPlan.resolve(args, first_row(train_dataset), formatting_func)
        self._formatting_func = formatting_func
        check_model_options(args, model, quantization_config)
        tokenizer = load_tokenizer_for_sft(args, model, processing_class)
        processing_class = tokenizer.processing_class
        self.audits: dict[str, SupervisionAudit] = {}
        train_dataset = self._prepare_dataset(
            train_dataset, processing_class, args, self._plan.packing, formatting_func, "train"
        )
        eval_dataset = self._prepare_eval(eval_dataset, processing_class, args)
        setup.seed_everything(args)
        model = load_model_for_sft(args, model, tokenizer, quantization_config, peft_config)
        check_rows(model, processing_class, train_dataset, eval_dataset, packing=self._plan.packing)
        self._router_coefficient = router_coefficient(model, args.router_aux_loss_coef)
        wants_logits = compute_metrics or preprocess_logits_for_metrics or compute_loss_func
        # Code of the user's expects a row per sample with its `attention_mask`, as every other trainer hands it over.
        reads_batches = wants_logits or self._overrides("compute_loss", "prediction_step", "training_step")
        ours = data_collator is None and not reads_batches and not self._plan.packing
        compiles = args.torch_compile_backend is not None
        # Compiled layers want few different shapes, which rows without padding do not have.
        self._plan = self._plan.settle(padding_free=ours and not compiles and can_be_padding_free(model))
        if self._plan.padding_free and uses_virtual_tokens(model):
            raise ArgumentError(
                "PEFT puts its virtual tokens before each row of a batch, and `padding_free` (and packing by `bfd`) "
                "make one row of many samples. Set `padding_free=False`, and `packing=False` or "
                "`packing_strategy='wrapped'`."
            )
        self._collator_is_ours = data_collator is None
        if data_collator is None:
            data_collator = DataCollatorForLanguageModeling(
                pad_token_id=choose_pad_token(processing_class, model, args.pad_token),
                padding_free=bool(self._plan.padding_free),
                pad_to_multiple_of=args.pad_to_multiple_of
                or (length_bucket(args.max_length, max_positions(model)) if compiles else None),
            )
        elif self._plan.padding_free:
            raise ArgumentError("`padding_free` and `packing` need their own collator: drop `data_collator`.")
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
        self._metrics = {"train": MetricBag(), "eval": MetricBag()}
        self._tokens = TokenCounter()
        if self.is_world_process_zero() and args.get_process_log_level() <= logging.WARNING:
            inspect.show(self._preview, self.audits)

    # ---- Construction ----

    def _overrides(self, *methods: str) -> bool:
        """Returns whether a subclass, or this object, has one of these methods of its own."""
        return any(getattr(getattr(self, name), "__func__", None) is not getattr(SFTTrainer, name) for name in methods)

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

    # ---- Loss ----

    def _why_not_fused(self) -> str | None:
        """Returns why the loss needs the full logits (Liger may own the head), or None."""
        if self.compute_loss_func is not None:
            return "`compute_loss_func` takes the model's outputs"
        return unsupported_reason(self.model)

    def describe_loss(self) -> str:
        """Returns on one line who computes the loss from the hidden states: this package, Liger, or the model."""
        if self._head is not None:
            return "fused with the head, without logits"
        reason = self._why_not_fused() or ""
        return "Liger's fused head" if reason == LIGER_OWNS_HEAD else f"from all logits: {reason}"

    def describe_activations(self) -> str:
        """Returns on one line whether this run keeps its activations, and why; empty before training starts."""
        return str(self._recomputation or "")

    def _recomputes_activations(self) -> bool:
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        self._recomputation = recompute.decide(
            self.model,
            self.args,
            num_rows=self._train_batch_size,
            longest_row=recompute.longest_row(self.train_dataset, self.args.max_length),
            autocast=self.compute_loss_context_manager(),
            fsdp_recomputes=bool(getattr(plugin, "activation_checkpointing", False)),
        )
        return self._recomputation.recomputes

    def _change_model(self, stack: ExitStack) -> None:
        """Lets the model attend within samples and compute its loss without logits."""
        if self._plan.padding_free and not brings_packed_attention(self.model):
            stack.enter_context(use_packed_attention(self.model))
            if not self._isolation_is_proven:
                require_isolation(self.model)
                self._isolation_is_proven = True
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

    _recomputation: recompute.Recomputation | None = None
    _isolation_is_proven = False
    _loss_only = False
    _head: FusedHead | None = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Returns the loss, or (loss, outputs with logits), and counts tokens, accuracy and entropy on the device."""
        mode = "train" if self.model.training else "eval"
        inputs = {**inputs, "use_cache": False}
        if self._router_coefficient is not None:
            inputs["output_router_logits"] = self._router_coefficient != 0
        if mode == "train":
            self._tokens.add(_num_tokens(inputs))
        wants_logits = return_outputs and not (self._loss_only and not self._overrides("compute_loss"))
        if self._head is None or wants_logits:
            loss, outputs = self._loss_from_logits(model, inputs, num_items_in_batch)
            sums = output_sums(outputs, inputs["labels"]) if "labels" in inputs else None
        else:
            smoother, self.label_smoother = self.label_smoother, None  # the head smooths
            try:
                with self._head.resumed():
                    loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            finally:
                self.label_smoother = smoother
            sums = self._head.last
        if sums is not None:
            self._metrics[mode].add("mean_token_accuracy", sums.correct, sums.count)
            if sums.entropy is not None:
                self._metrics[mode].add("entropy", sums.entropy, sums.count)
        if self._router_coefficient and self._features_are_on and self.compute_loss_func is None:
            loss = loss + self._weighted_auxiliary(outputs, mode, num_items_in_batch)
        if self._router_coefficient is not None:
            outputs = without_router_outputs(outputs)
        return (loss, outputs) if return_outputs else loss

    def _weighted_auxiliary(self, outputs: Any, mode: str, num_items_in_batch: Any) -> Tensor | float:
        """Returns the load-balancing loss as it enters this micro-batch's loss, and logs it unweighted."""
        found = auxiliary_loss(outputs)
        if found is None:
            return 0.0
        self._metrics[mode].add("aux_loss", found, 1)
        assert self._router_coefficient is not None
        divide = mode == "train" and num_items_in_batch is not None  # then nobody else divides by the micro-batches
        return self._router_coefficient * found / (self.current_gradient_accumulation_steps if divide else 1)

    def _loss_from_logits(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any
    ) -> tuple[Tensor, Any]:
        """Returns the loss and the model's outputs on the plain path."""
        weights, dft = inputs.get(WEIGHTS), self.args.loss_type == "dft"
        if weights is not None and self.compute_loss_func is not None:
            raise ArgumentError(
                f"The rows give tokens weights (`weight` in messages, or `{WEIGHTS}`), and `compute_loss_func` "
                "computes the loss without them. Drop `compute_loss_func`, or take the weights out of the rows."
            )
        if (weights is None and not dft) or self.compute_loss_func is not None or "labels" not in inputs:
            if self.args.use_liger_kernel and self._why_not_fused() == LIGER_OWNS_HEAD:
                inputs = {**inputs, "return_token_accuracy": True}
            return super().compute_loss(model, inputs, True, num_items_in_batch)
        outputs = model(**{name: value for name, value in inputs.items() if name not in ("labels", WEIGHTS)})
        smoothing = self.args.label_smoothing_factor
        sums = token_sums(
            outputs["logits"], inputs["labels"], dft=dft, label_smoothing=smoothing, token_weights=weights
        )
        loss = sums.loss / (sums.count if num_items_in_batch is None else num_items_in_batch)
        return self._undo_process_average(loss, num_items_in_batch), outputs

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """As `Trainer.prediction_step`; logits are built only when somebody wants them."""
        self._loss_only = prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._loss_only = False

    # ---- Logging and saving ----

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As `Trainer.train`; the audit and the preview of the data go to the run folder first."""
        if self.args.should_save:
            inspect.write(self.output_dir, self._preview, self.audits)
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the token metrics since the last log. Called as `Trainer.log`."""
        mode = "train" if self.model.training else "eval"
        measured = self._metrics[mode].drain(self.accelerator)
        if measured:
            measured["num_tokens"] = self._tokens.read(self.accelerator)
        prefix = "eval_" if mode == "eval" else ""
        logs.update({f"{prefix}{name}": value for name, value in measured.items()})
        super().log(logs, start_time)

    def _stateful(self) -> dict[str, Any]:
        self._tokens.read(self.accelerator)
        return {**super()._stateful(), "tokens": self._tokens, "token_metrics": self._metrics["train"]}


def _num_tokens(inputs: Mapping[str, Any]) -> Tensor | int:
    """Returns the tokens of a batch without padding."""
    if "attention_mask" in inputs:
        return inputs["attention_mask"].sum()
    return inputs["input_ids"].numel()
