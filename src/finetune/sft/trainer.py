"""`SFTTrainer`: supervised fine-tuning of causal language models, with TRL's constructor and behaviour."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from finetune.compat import coerce_training_arguments
from finetune.data.audit import SupervisionAudit, audit_table
from finetune.data.collate import DataCollatorForLanguageModeling
from finetune.data.packing import pack_dataset, packing_report
from finetune.data.pipeline import first_row, is_stream, prepare_split
from finetune.data.settings import DataSettings
from finetune.data.templates import clone_chat_template, load_chat_template
from finetune.engine import setup
from finetune.engine.meter import MetricBag
from finetune.errors import ArgumentError
from finetune.hub.card import create_sft_model_card
from finetune.kernels.attention import packed_unsupported_reason, use_packed_attention
from finetune.kernels.fused_head import FusedHead, fuse_head, unsupported_reason
from finetune.kernels.isolation import probe_isolation, require_isolation
from finetune.models.adapters import add_adapters, prepare_quantized
from finetune.models.load import load_model, load_tokenizer
from finetune.models.tokens import choose_eos_token, choose_pad_token
from finetune.sft.config import SFTConfig
from finetune.sft.losses import token_sums
from finetune.sft.plan import DataPlan
from finetune.trainer import Trainer


class TokenCounter:
    """Tokens trained on so far: counted on the device, saved with the checkpoint (TRL starts from 0 on resume)."""

    def __init__(self) -> None:
        self.total = 0
        self._pending: Tensor | int = 0

    def add(self, tokens: Tensor | int) -> None:
        self._pending = self._pending + tokens

    def read(self, accelerator: Any) -> int:
        """Returns the tokens of all processes since the start of the run. Reads the device."""
        pending, self._pending = self._pending, 0
        if accelerator.num_processes > 1:
            pending = accelerator.reduce(torch.as_tensor(pending, device=accelerator.device), reduction="sum")
        self.total += int(pending)
        return self.total

    def state_dict(self) -> dict[str, int]:
        return {"total": self.total}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.total, self._pending = state_dict["total"], 0


class SFTTrainer(Trainer):
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
        processing_class = setup.accept_old_names(old_names, processing_class, type(self))
        args = self._default_arguments(model) if args is None else coerce_training_arguments(args, SFTConfig)
        if train_dataset is None:
            raise ArgumentError("`train_dataset` is required.")
        self._plan = DataPlan.resolve(args, first_row(train_dataset), formatting_func)
        self._formatting_func = formatting_func
        setup.seed_everything(args)
        model, processing_class = self._load(args, model, processing_class, quantization_config, peft_config)
        wants_logits = compute_metrics or preprocess_logits_for_metrics or compute_loss_func
        ours = data_collator is None and not wants_logits and not self._plan.packing
        self._plan = self._plan.settle(padding_free=ours and can_be_padding_free(model))
        self.audits: dict[str, SupervisionAudit] = {}
        self._collator_is_ours = data_collator is None
        if data_collator is None:
            data_collator = DataCollatorForLanguageModeling(
                pad_token_id=choose_pad_token(processing_class, model, args.pad_token),
                padding_free=bool(self._plan.padding_free),
                pad_to_multiple_of=args.pad_to_multiple_of,
            )
        elif self._plan.padding_free:
            raise ArgumentError("`padding_free` and `packing` need their own collator: drop `data_collator`.")
        train_dataset = self._prepare_dataset(
            train_dataset, processing_class, args, self._plan.packing, formatting_func, "train"
        )
        eval_dataset = self._prepare_eval(eval_dataset, processing_class, args)
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
        self._plain_loss_reason = self._why_not_fused()
        self._metrics = {"train": MetricBag(), "eval": MetricBag()}
        self._tokens = TokenCounter()
        if self.audits and self.is_world_process_zero():
            print(audit_table(self.audits), flush=True)

    # ---- Construction ----

    @staticmethod
    def _default_arguments(model: Any) -> SFTConfig:
        """Returns the configuration for a trainer that was given none: the folder `<model name>-SFT`."""
        name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
        return SFTConfig(f"{(name or type(model).__name__).rstrip('/').split('/')[-1]}-SFT")

    @staticmethod
    def _load(
        args: SFTConfig, model: Any, processing_class: Any, quantization_config: Any, peft_config: Any
    ) -> tuple[nn.Module, Any]:
        """Returns model (with adapters) and tokenizer, loaded where they were given by name."""
        assert not isinstance(args.model_init_kwargs, str)  # parsed when the arguments were made
        init: dict[str, Any] = {**(args.model_init_kwargs or {})}
        given = model
        if isinstance(model, str):
            model = load_model(
                model,
                model_init_kwargs=init,
                quantization_config=quantization_config,
                trust_remote_code=args.trust_remote_code,
            )
        elif init or quantization_config is not None:
            raise ArgumentError(
                "`model_init_kwargs` and `quantization_config` act when the model is loaded here, but a loaded `model` "
                "was passed. Pass its name, or drop them."
            )
        if processing_class is None:
            processing_class = load_tokenizer(
                given if isinstance(given, str) else model,
                revision=init.get("revision"),
                trust_remote_code=args.trust_remote_code,
            )
        if args.eos_token is not None:
            choose_eos_token(processing_class, args.eos_token, model)
        added: list[int] = []
        if args.chat_template_path is not None:
            if args.chat_template_path.endswith((".jinja", ".j2")):
                processing_class.chat_template = load_chat_template(args.chat_template_path)
            else:
                model, processing_class, added = clone_chat_template(model, processing_class, args.chat_template_path)
        if peft_config is not None:
            checkpointing = bool(args.gradient_checkpointing)
            model = prepare_quantized(model, activation_checkpointing=checkpointing)
            model = add_adapters(model, peft_config, added_token_ids=added, activation_checkpointing=checkpointing)
        return model, processing_class

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: SFTConfig,
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
        return rows

    def _prepare_eval(self, eval_dataset: Any, processing_class: Any, args: SFTConfig) -> Any:
        """Returns one prepared evaluation data set, or a dict of them."""
        if eval_dataset is None:
            return None
        if isinstance(eval_dataset, Mapping):
            return {
                name: self._prepare_dataset(
                    part, processing_class, args, self._plan.eval_packing, self._formatting_func, str(name)
                )
                for name, part in eval_dataset.items()
            }
        return self._prepare_dataset(
            eval_dataset, processing_class, args, self._plan.eval_packing, self._formatting_func, "eval"
        )

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = [
                *("input_ids", "labels", "seq_lengths", "completion_mask", "assistant_masks", "attention_mask"),
                *([self.args.length_column_name] if self._collator_is_ours else []),
            ]

    # ---- Loss ----

    def _why_not_fused(self) -> str | None:
        """Returns why the loss needs the full logits; None where the fused head computes it."""
        if self.compute_loss_func is not None:
            return "`compute_loss_func` takes the model's outputs"
        if self.args.use_liger_kernel:
            return "Liger's kernels own the head"
        return unsupported_reason(self.model)

    @contextmanager
    def _model_features(self) -> Iterator[None]:
        """Within, the model computes its loss without logits and attends within samples; then it is what it was."""
        if self._features_are_on:
            yield
            return
        smoother, self._features_are_on = self.label_smoother, True
        with ExitStack() as stack:
            stack.callback(setattr, self, "_features_are_on", False)
            if self._plan.padding_free and not brings_packed_attention(self.model):
                stack.enter_context(use_packed_attention(self.model))
                if not self._isolation_is_proven:
                    require_isolation(self.model)
                    self._isolation_is_proven = True
            if self._plain_loss_reason is None:
                options = {"label_smoothing": self.args.label_smoothing_factor, "dft": self.args.loss_type == "dft"}
                self._head = stack.enter_context(fuse_head(self.model, entropy=True, **options))
                self.label_smoother = None
                stack.callback(setattr, self, "label_smoother", smoother)
                stack.callback(setattr, self, "_head", None)
            yield

    _features_are_on = False
    _isolation_is_proven = False
    _head: FusedHead | None = None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.evaluation_loop`, through the fused head. Called by `evaluate` and `predict`."""
        with self._model_features():
            return super().evaluation_loop(*args, **kwargs)

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
        if mode == "train":
            self._tokens.add(_num_tokens(inputs))
        wants_logits = return_outputs and not self._loss_only
        with self._head.suspended() if self._head is not None and wants_logits else nullcontext():
            if self._head is None or wants_logits:
                loss, outputs = self._loss_from_logits(model, inputs, num_items_in_batch)
                sums = token_sums(outputs["logits"].detach(), inputs["labels"]) if "labels" in inputs else None
            else:
                loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
                sums = self._head.last
        if sums is not None:
            self._metrics[mode].add("mean_token_accuracy", sums.correct, sums.count)
            self._metrics[mode].add("entropy", sums.entropy, sums.count)
        return (loss, outputs) if return_outputs else loss

    def _loss_from_logits(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any
    ) -> tuple[Tensor, Any]:
        """Returns the loss and the model's outputs on the plain path."""
        if self.args.loss_type != "dft" or self.compute_loss_func is not None:
            return super().compute_loss(model, inputs, True, num_items_in_batch)
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        sums = token_sums(
            outputs["logits"], inputs["labels"], dft=True, label_smoothing=self.args.label_smoothing_factor
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

    _loss_only = False

    # ---- Logging and saving ----

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


def brings_packed_attention(model: nn.Module) -> bool:
    """Returns whether the model was loaded with a FlashAttention, which keeps the samples of a row apart itself."""
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None) or ""
    return "flash" in implementation


def can_be_padding_free(model: nn.Module) -> bool:
    """Returns whether batches without padding train the same: the model takes them, and a probe moved no neighbour."""
    if brings_packed_attention(model) or packed_unsupported_reason(model) is not None:
        return False
    if any(parameter.numel() == 0 or parameter.is_meta for parameter in model.parameters()):
        return False  # sharded while loading: a probe would need all processes
    with use_packed_attention(model):
        try:
            return probe_isolation(model).isolated
        except (ArgumentError, TypeError, ValueError):
            return False


def _num_tokens(inputs: Mapping[str, Any]) -> Tensor | int:
    """Returns the tokens of a batch without padding."""
    if "attention_mask" in inputs:
        return inputs["attention_mask"].sum()
    return inputs["input_ids"].numel()
