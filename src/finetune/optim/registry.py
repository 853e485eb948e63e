"""Optimizers by name. A third party adds one in three lines:

    @register_optimizer("adan")
    def adan(request):
        return Adan, {"lr": request.args.learning_rate, **request.options.for_signature(Adan)}

and `TrainingArguments(optim="adan", optim_args="...")` then builds it over the usual parameter groups.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

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
Backend = Literal["deepspeed", "fsdp"]


@dataclass(frozen=True)
class _Registered:
    """A builder, and the backends under which its optimizers do not work because they divide weights or gradients."""

    builder: Builder
    refuses: tuple[Backend, ...]


_REGISTERED: dict[str, _Registered] = {}


def register_optimizer(*names: str, refuses: Sequence[Backend] = ()) -> Callable[[Builder], Builder]:
    """Returns a decorator that makes a builder available as `optim=name`; a later registration replaces it.

    `refuses` names the backends that divide what the optimizer needs whole: under these a run ends with an error, and
    `finetune plan` shows it as refused.
    """

    def register(builder: Builder) -> Builder:
        _REGISTERED.update(dict.fromkeys(names, _Registered(builder, tuple(refuses))))
        REGISTERED_OPTIMIZERS.update(names)
        return builder

    return register


def _registered() -> dict[str, _Registered]:
    # Imported late because the builders themselves register through this module.
    from finetune.optim import lomo as _lomo  # noqa: F401
    from finetune.optim import low_rank_builders as _low_rank_builders  # noqa: F401

    return _REGISTERED


def is_built_here(args: OptimizerArguments) -> bool:
    """Returns whether the builder of `args.optim` is one of this package, not one that a third party registered."""
    known = _registered().get(optimizer_name(args.optim))
    return known is not None and known.builder.__module__.split(".")[0] == __name__.split(".")[0]


def optimizer_cls_and_kwargs(args: OptimizerArguments, model: nn.Module | None = None) -> ClassAndArguments:
    """Returns the optimizer class for `args.optim` and its keyword arguments, without parameters.

    The meaning is that of `transformers.Trainer.get_optimizer_cls_and_kwargs`. Raises `ArgumentError` for an unknown
    name, a package that is not installed, keys of `optim_args` that would have no effect, and an optimizer that does
    not work under the `deepspeed` or `fsdp` of the run.
    """
    known = _registered()
    name = optimizer_name(args.optim)
    if name not in known:
        raise ArgumentError(
            f"`optim={name}` is not an optimizer.{nearest(name, known)} Allowed: {', '.join(sorted(known))}."
        )
    for backend in known[name].refuses:
        if getattr(args, backend, None) or environment.launched_sharding(backend):
            raise ArgumentError(why_not_sharded(name, backend))
    options = OptimOptions(args.optim_args, name)
    result = known[name].builder(OptimizerRequest(name=name, args=args, model=model, options=options))
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

    Raises:
        ArgumentError: `optim_args` gives parameters their own learning rates (`lr@`) where the groups are replaced.
    """
    cls, given = optimizer_cls_and_kwargs(args, model) if cls_and_kwargs is None else cls_and_kwargs
    kwargs = dict(given)
    rates: Mapping[str, float] = OptimOptions(args.optim_args).learning_rates
    factory = None if isinstance(cls, type) and issubclass(cls, Optimizer) else cls
    over = None if factory is not None else _replaced_groups(kwargs)
    if rates and (factory is not None or over is not None):
        raise ArgumentError(
            f"`optim_args` has `lr@{next(iter(rates))}`, and this `optim={optimizer_name(args.optim)}` makes its own "
            "parameter groups, with one learning rate. Remove the `lr@` keys, or set the rates in those groups."
        )
    if factory is not None:
        return factory()(model, **kwargs)
    if over is None:
        over = parameter_groups(model, args.weight_decay, decay_names=decay_names, learning_rates=rates)
    optimizer = cls(over, **kwargs)
    _keep_embeddings_wide(cls, kwargs, model)
    return optimizer


def optimizer_name(optim: Any) -> str:
    """Returns the name in `args.optim`, which is a text or a member of transformers' enumeration."""
    return str(getattr(optim, "value", optim))


def why_not_sharded(optim: Any, backend: Backend) -> str:
    """Returns why the optimizer does not work under `backend`, or "" if it does, or is unknown."""
    name = optimizer_name(optim)
    found = _registered().get(name)
    if found is None or backend not in found.refuses:
        return ""
    return (
        f"`optim={name}` needs whole weight matrices and gradients, which `{backend}` splits over the ranks. Use data "
        f"parallelism, with `optim=galore_adamw_layerwise` if memory is short, or keep `{backend}` with "
        f"`optim=adamw_8bit`."
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
