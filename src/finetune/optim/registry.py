"""Optimizers by name. A third party adds one in three lines:

    @register_optimizer("adan")
    def adan(request):
        return Adan, {"lr": request.args.learning_rate, **request.options.for_signature(Adan)}

and `TrainingArguments(optim="adan", optim_args="...")` then builds it over the usual parameter groups.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer

from finetune import environment
from finetune.arguments.optimization import REGISTERED_OPTIMIZERS
from finetune.errors import ArgumentError, nearest
from finetune.optim.groups import parameter_groups
from finetune.optim.options import OptimOptions


class OptimizerArguments(Protocol):
    """The arguments an optimizer depends on; `TrainingArguments` has them."""

    optim: Any
    optim_args: Any
    optim_target_modules: Any
    learning_rate: float
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    seed: int


@dataclass(frozen=True)
class OptimizerRequest:
    """What a builder may look at. It returns `(class, keyword arguments)`."""

    name: str
    args: Any
    model: nn.Module | None
    options: OptimOptions

    @property
    def adam(self) -> dict[str, Any]:
        """Returns `lr`, `betas` and `eps` as the Adam family names them."""
        return {
            "lr": self.args.learning_rate,
            "betas": (self.args.adam_beta1, self.args.adam_beta2),
            "eps": self.args.adam_epsilon,
        }

    def require_model(self) -> nn.Module:
        """Returns the model; raises `ArgumentError` when the caller gave none."""
        if self.model is None:
            raise ArgumentError(f"`optim={self.name}` needs the model: pass `model` to build this optimizer.")
        return self.model


ClassAndArguments = tuple[Any, dict[str, Any]]
Builder = Callable[[OptimizerRequest], ClassAndArguments]

_BUILDERS: dict[str, Builder] = {}


def register_optimizer(*names: str) -> Callable[[Builder], Builder]:
    """Returns a decorator that makes a builder available as `optim=name`; a later registration replaces it."""

    def register(builder: Builder) -> Builder:
        _BUILDERS.update(dict.fromkeys(names, builder))
        REGISTERED_OPTIMIZERS.update(names)
        return builder

    return register


def _load_builders() -> dict[str, Builder]:
    # Imported late because builders.py itself registers through this module.
    from finetune.optim import low_rank_builders as _low_rank_builders  # noqa: F401

    return _BUILDERS


def is_built_here(args: OptimizerArguments) -> bool:
    """Returns whether the builder of `args.optim` is one of this package, not one that a third party registered."""
    builder = _load_builders().get(str(getattr(args.optim, "value", args.optim)))
    return builder is not None and builder.__module__.split(".")[0] == __name__.split(".")[0]


def optimizer_cls_and_kwargs(args: OptimizerArguments, model: nn.Module | None = None) -> ClassAndArguments:
    """Returns the optimizer class for `args.optim` and its keyword arguments, without parameters.

    The meaning is that of `transformers.Trainer.get_optimizer_cls_and_kwargs`. Raises `ArgumentError` for an unknown
    name, a package that is not installed, and keys of `optim_args` that would have no effect.
    """
    builders = _load_builders()
    name = str(getattr(args.optim, "value", args.optim))
    if name not in builders:
        raise ArgumentError(
            f"`optim={name}` is not an optimizer.{nearest(name, builders)} Allowed: {', '.join(sorted(builders))}."
        )
    options = OptimOptions(args.optim_args, name)
    result = builders[name](OptimizerRequest(name=name, args=args, model=model, options=options))
    options.finish()
    return result


def build_optimizer(
    args: OptimizerArguments,
    model: nn.Module,
    *,
    decay_names: Sequence[str] | None = None,
    cls_and_kwargs: ClassAndArguments | None = None,
) -> Optimizer:
    """Returns the optimizer over the trainable parameters of `model`.

    `decay_names` and `cls_and_kwargs` default to this package's own choice; the trainer passes what its overridable
    methods returned. As in transformers, `cls_and_kwargs` may carry `params`, `model` or `optimizer_dict` in place of
    the usual groups, and may name a factory that is called as `factory()(model, **kwargs)`. The given dictionary is not
    changed.
    """
    cls, given = optimizer_cls_and_kwargs(args, model) if cls_and_kwargs is None else cls_and_kwargs
    kwargs = dict(given)
    if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        return cls()(model, **kwargs)
    over = _replaced_groups(kwargs)
    if over is None:
        rates: Mapping[str, float] = OptimOptions(args.optim_args).learning_rates
        over = parameter_groups(model, args.weight_decay, decay_names=decay_names, learning_rates=rates)
    optimizer = cls(over, **kwargs)
    _keep_embeddings_wide(cls, kwargs, model)
    return optimizer


def refuse_sharding(request: OptimizerRequest, *launchers: str) -> None:
    """Raises `ArgumentError` when "deepspeed" or "fsdp", whichever is in `launchers`, shards weights or gradients."""
    for argument in launchers:
        if getattr(request.args, argument, None) or environment.launched_sharding(argument):
            raise ArgumentError(
                f"`optim={request.name}` needs whole weight matrices and gradients, which `{argument}` splits over the "
                f"ranks. Use data parallelism, with `optim=galore_adamw_layerwise` if memory is short, or keep "
                f"`{argument}` with `optim=adamw_8bit`."
            )


def _replaced_groups(kwargs: dict[str, Any]) -> Any:
    """Removes transformers' substitutes for the parameter groups from `kwargs`; returns the one that wins."""
    over = None
    for key in ("params", "model", "optimizer_dict"):
        over = kwargs.pop(key, over)
    return over


def _keep_embeddings_wide(cls: type, kwargs: Mapping[str, Any], model: nn.Module) -> None:
    """Keeps the moments of embeddings in 32 bits under an 8-bit bitsandbytes optimizer: 8 bits destabilise them."""
    if cls.__module__.startswith("bitsandbytes") and kwargs.get("optim_bits") == 8:
        from finetune.optim.builders import override_embedding_bits

        override_embedding_bits(model)
