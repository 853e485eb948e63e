"""How `SFTTrainer` computes its loss and counts tokens: fused with the head where possible, else from the logits."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from finetune.compat import EvalLoopOutput
from finetune.data.rows import WEIGHTS
from finetune.engine.divisor import at_least_one
from finetune.engine.meter import MetricBag, TokenCounter
from finetune.errors import ArgumentError
from finetune.kernels.fused_head import FusedHead
from finetune.kernels.head_support import LIGER_OWNS_HEAD, unsupported_reason
from finetune.sft.config import SFTConfig
from finetune.sft.experts import auxiliary_loss, without_router_outputs
from finetune.sft.losses import TokenSums, output_sums, token_sums
from finetune.trainer import Trainer


class SFTLossMethods(Trainer):
    """Mixin of `SFTTrainer` that computes losses. Use `SFTTrainer`."""

    _token_metric_names = ("aux_loss", "entropy", "mean_token_accuracy", "num_tokens")
    _metrics: dict[str, MetricBag]
    _tokens: TokenCounter
    _router_coefficient: float | None
    _head: FusedHead | None = None
    _loss_only = False
    _to_log: Mapping[str, float] = {}

    if TYPE_CHECKING:

        @property
        def args(self) -> SFTConfig: ...
        @args.setter
        def args(self, value: Any) -> None: ...

    @property
    def router_aux_loss_coef(self) -> float:
        """The factor of the load-balancing loss of a model with experts; 0 for other models."""
        return self._router_coefficient or 0.0

    @property
    def aux_loss_enabled(self) -> bool:
        """Whether a load-balancing loss is added."""
        return bool(self._router_coefficient)

    def _overrides(self, *methods: str) -> bool:
        """Returns whether a subclass, or this object, has one of these methods of its own."""
        return any(
            getattr(getattr(self, name), "__func__", None) is not getattr(SFTLossMethods, name) for name in methods
        )

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
            loss, outputs, sums = self._loss_from_logits(model, inputs, num_items_in_batch)
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
    ) -> tuple[Tensor, Any, TokenSums | None]:
        """Returns the loss, the model's outputs and the sums over tokens on the plain path.

        An evaluation that wants logits, of a model whose head could be fused, takes the loss from the sums: the model
        would compute it from all tokens, in another two copies of the logits.
        """
        weights, dft = inputs.get(WEIGHTS), self.args.loss_type == "dft"
        if weights is not None and self.compute_loss_func is not None:
            raise ArgumentError(
                f"The rows give tokens weights (`weight` in messages, or `{WEIGHTS}`), and `compute_loss_func` "
                "computes the loss without them. Drop `compute_loss_func`, or take the weights out of the rows."
            )
        from_sums = weights is not None or dft or (self._head is not None and not self.model.training)
        if not from_sums or self.compute_loss_func is not None or "labels" not in inputs:
            if self.args.use_liger_kernel and self._why_not_fused() == LIGER_OWNS_HEAD:
                inputs = {**inputs, "return_token_accuracy": True}
            labels = inputs.get("labels")  # a label smoother takes them out
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            return loss, outputs, None if labels is None else output_sums(outputs, labels)
        outputs = model(**{name: value for name, value in inputs.items() if name not in ("labels", WEIGHTS)})
        smoothing = self.args.label_smoothing_factor
        sums = token_sums(
            outputs["logits"], inputs["labels"], dft=dft, label_smoothing=smoothing, token_weights=weights
        )
        loss = sums.loss / (at_least_one(sums.count) if num_items_in_batch is None else num_items_in_batch)
        outputs["loss"] = loss = self._undo_process_average(loss, num_items_in_batch)
        return loss, outputs, dataclasses.replace(sums, loss=sums.loss.detach())

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

    def _collect_for_log(self) -> None:
        super()._collect_for_log()
        self._to_log = self._measured("train") if self.model.training else {}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the token metrics of training since the last log. Called as `Trainer.log`."""
        logs.update(self._to_log)
        self._to_log = {}
        super().log(logs, start_time)

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As `Trainer.evaluation_loop`; the token metrics of this pass are among its metrics, under its prefix."""
        self._metrics["eval"] = MetricBag()  # without what an interrupted pass left
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        for name, value in self._measured("eval").items():
            output.metrics.setdefault(f"{metric_key_prefix}_{name}", value)
        return output

    def _measured(self, mode: str) -> dict[str, float]:
        """Returns the token metrics since they were last asked for, over all processes, and the tokens so far."""
        measured = self._metrics[mode].drain(self.accelerator)
        return {**measured, "num_tokens": self._tokens.read(self.accelerator)} if measured else {}

    def _stateful(self) -> dict[str, Any]:
        self._tokens.read(self.accelerator)
        return {**super()._stateful(), "tokens": self._tokens, "token_metrics": self._metrics["train"]}


def refuse_loss_function(args: Any, compute_loss_func: Any) -> None:
    """Raises `ArgumentError` for a `compute_loss_func` beside the `loss_type` that it would replace."""
    if compute_loss_func is not None and args.loss_type == "dft":
        raise ArgumentError(
            "`compute_loss_func` computes the whole loss, so `loss_type='dft'` has no effect. Drop one of them."
        )


def _num_tokens(inputs: Mapping[str, Any]) -> Tensor | int:
    """Returns the tokens of a batch without padding."""
    if "attention_mask" in inputs:
        return inputs["attention_mask"].sum()
    return inputs["input_ids"].numel()
