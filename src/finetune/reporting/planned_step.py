"""The training step of `SFTTrainer` without weights or rows: what a memory plan traces."""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from finetune.kernels.fused_head import fuse_head
from finetune.kernels.head_pass import repeats_skipped
from finetune.kernels.head_support import unsupported_reason
from finetune.models.activation import activation_checkpointing
from finetune.models.adapters import add_adapters
from finetune.models.architecture import language_model_class
from finetune.optim.registry import build_optimizer
from finetune.reporting.memory_estimate import ModelSizes
from finetune.reporting.memory_trace import MemoryTrace, trace_updates


def mixed_dtype(args: Any) -> torch.dtype | None:
    """Returns the type that mixed precision computes in, or None without it."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.mixed_precision)


class PlannedStep:
    """One training step of `SFTTrainer` as three functions for `trace_updates`, and what was found on the way.

    `config` is a model configuration of transformers, `args` an `SFTConfig`, `dtype` the type of the weights in memory.
    `sizes`, `gradient_bytes` (of what DDP exchanges), `head` and `described` are known after a trace.
    """

    def __init__(
        self,
        config: Any,
        args: Any,
        dtype: torch.dtype = torch.float32,
        *,
        autocast: torch.dtype | None = None,
        peft_config: Any = None,
        attn_implementation: str | None = None,
    ) -> None:
        self.config, self.args, self.peft_config = config, args, peft_config
        self.dtype = dtype
        self.autocast = None if autocast == dtype else autocast
        self._options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        self.settings = {
            "accumulation": args.gradient_accumulation_steps,
            "max_grad_norm": float(args.max_grad_norm or 0.0),
        }
        self.sizes = ModelSizes(0, 0, 0, 0)
        self.gradient_bytes = 0
        self.model_class = self.head = self.described = ""
        self._stack = ExitStack()

    def trace(self) -> MemoryTrace:
        """Returns the memory of two updates."""
        with repeats_skipped():
            return trace_updates(self.make_model, self.make_optimizer, self.loss, **self.settings)

    def __enter__(self) -> "PlannedStep":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def recomputes(self) -> bool:
        """Whether activations are recomputed. Unset they are: where memory is short enough to plan, a run does so."""
        return self.args.gradient_checkpointing is not False

    def make_model(self) -> Any:
        """Returns the model as `SFTTrainer` trains it: adapters, checkpointing and the fused head are on."""
        import transformers

        args, loader = self.args, getattr(transformers, language_model_class(self.config))
        with unset_fake_temporarily(), torch.device("meta"):
            model: Any = loader.from_config(self.config, dtype=self.dtype, **self._options)
            model.tie_weights()
            self.model_class = type(model).__name__
            if self.peft_config is not None:
                model = add_adapters(model, self.peft_config, activation_checkpointing=self.recomputes)
        _move_from_meta(model)
        model.train()
        self._stack.enter_context(activation_checkpointing(model, self.recomputes, args.gradient_checkpointing_kwargs))
        reason = unsupported_reason(model)
        self.head = "fused loss" if reason is None else f"full logits ({reason})"
        if reason is None:
            self._stack.enter_context(fuse_head(model, entropy=True, label_smoothing=args.label_smoothing_factor))
        self.sizes = ModelSizes.of(model)
        return model

    def make_optimizer(self, model: Any) -> Any:
        """Returns the optimizer of the run."""
        optimizer = build_optimizer(self.args, model)
        if callable(describe := getattr(optimizer, "describe", None)):
            self.described = str(describe())
        # Layerwise GaLore exchanges projections itself, and DDP leaves these weights alone.
        layerwise: Any = optimizer
        alone = set(layerwise.targets()) if getattr(optimizer, "backward", None) is not None else set()
        trained = [p for p in model.parameters() if p.requires_grad and p not in alone]
        self.gradient_bytes = sum(p.numel() * p.element_size() for p in trained)
        return optimizer

    def loss(self, model: Any) -> Any:
        """Returns the loss of one micro-batch of full rows."""
        shape = (self.args.per_device_train_batch_size, self.args.max_length)
        ids = torch.zeros(shape, dtype=torch.long)
        with torch.autocast("cpu", dtype=self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            return model(input_ids=ids, labels=ids, use_cache=False).loss


def _move_from_meta(model: nn.Module) -> None:
    """Gives `model` fake weights on the CPU, tied where they were; `Module.to` cannot exchange fake tensors."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
                held[name] = made[id(tensor)]  # pyright: ignore[reportArgumentType]
