"""Builders of the optimizers that project gradients: GaLore, and APOLLO."""

import logging
from typing import Any

from torch import Tensor, nn

from finetune.errors import ArgumentError
from finetune.optim.builders import import_or_explain
from finetune.optim.fused_backward import hide_from_ddp, require_update_in_backward, world_size
from finetune.optim.galore_basis import PROJECTION_TYPES
from finetune.optim.groups import partition, target_weight_names
from finetune.optim.registry import ClassAndArguments, OptimizerRequest, register_optimizer

logger = logging.getLogger(__name__)

_RULES = ("galore_adamw", "galore_adamw_8bit", "galore_adafactor")


@register_optimizer(*_RULES, *(f"{name}_layerwise" for name in _RULES), refuses=["deepspeed", "fsdp"])
def galore(request: OptimizerRequest) -> ClassAndArguments:
    """Returns this package's GaLore, or galore_torch's with `optim_args="implementation=galore_torch"`.

    `optim_args`: `rank`, `update_proj_gap`, `scale`, `proj_type`, `svd=exact|randomized`, `rotate_moments`, `stagger`,
    `implementation`; for Adafactor also `clip_threshold`, `decay_rate`, `beta1`.
    """
    from finetune.optim.galore import GaLoreSettings

    model, options = request.require_model(), request.options
    targets = target_parameters(request, model)
    implementation = options.choice("implementation", ("finetune", "galore_torch"), "finetune")
    shared: dict[str, Any] = {
        "rank": positive(options.take("rank", int, 128), "rank"),
        "update_proj_gap": positive(options.take("update_proj_gap", int, 200), "update_proj_gap"),
        "scale": options.take("scale", float, 0.25),
        "proj_type": options.choice("proj_type", PROJECTION_TYPES, "std"),
    }
    if implementation == "galore_torch":
        return _galore_torch(request, targets, shared)
    svd = options.choice("svd", ("randomized", "exact"), "randomized")
    settings = GaLoreSettings(
        **shared,
        svd=svd,
        rotate_moments=options.take("rotate_moments", bool, False),
        # An exact basis is asked for to follow galore_torch, which renews all bases in the same step.
        stagger=options.take("stagger", bool, svd == "randomized"),
    )
    return _own_galore(request, model, targets, settings)


def _own_galore(request: OptimizerRequest, model: nn.Module, targets: list[Tensor], settings: Any) -> ClassAndArguments:
    from finetune.optim import galore_rules

    in_backward = request.name.endswith("_layerwise")
    if in_backward:
        _require_projection_in_backward(request, model)
    rule = request.name.removesuffix("_layerwise")
    kwargs: dict[str, Any] = {
        "targets": targets,
        "settings": settings,
        "in_backward": in_backward,
        "seed": int(request.args.seed),
        # DDP would send, and allocate, the gradients this optimizer frees; the optimizer averages projections itself.
        "on_release": hide_from_ddp(model, targets) if in_backward and world_size() > 1 else None,
    }
    if rule == "galore_adafactor":
        options = request.options
        kwargs["lr"] = request.args.learning_rate
        kwargs["clip_threshold"] = options.take("clip_threshold", float, 1.0)
        kwargs["decay_rate"] = options.take("decay_rate", float, -0.8)
        beta1 = options.take("beta1", float, 0.0)
        kwargs["beta1"] = beta1 or None
        return galore_rules.GaLoreAdafactor, kwargs
    kwargs.update(request.adam)
    if rule == "galore_adamw":
        return galore_rules.GaLoreAdamW, kwargs
    import_or_explain("bitsandbytes.functional", "pip install bitsandbytes", request)
    kwargs["wide"] = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    return galore_rules.GaLoreAdamW8bit, kwargs


def _galore_torch(request: OptimizerRequest, targets: list[Tensor], shared: dict[str, Any]) -> ClassAndArguments:
    """Returns the reference implementation; its checkpoints cannot be resumed."""
    if request.name.endswith("_layerwise"):
        raise ArgumentError(
            f"`optim={request.name}` has no `implementation=galore_torch`: its layerwise form ignores the schedule, "
            f"clipping and checkpoints. Remove `implementation`, or use "
            f"`optim={request.name.removesuffix('_layerwise')}`."
        )
    module = import_or_explain("galore_torch", "pip install galore-torch", request)
    logger.warning(
        "galore_torch keeps Python objects in its state: such a checkpoint cannot be resumed. Leave out "
        "`implementation=galore_torch` to be able to."
    )
    if request.name == "galore_adafactor":
        rule, kwargs = module.GaLoreAdafactor, {"lr": request.args.learning_rate}
        kwargs.update(scale_parameter=False, relative_step=False)
    else:
        rule = module.GaLoreAdamW if request.name == "galore_adamw" else module.GaLoreAdamW8bit
        kwargs = dict(request.adam)

    class Reference(rule):
        """galore_torch's class over the groups of this package, so that weight decay reaches it."""

        def __init__(self, params: Any, **keywords: Any):
            super().__init__(partition(list(params), [(targets, shared)]), **keywords)

    Reference.__name__ = Reference.__qualname__ = rule.__name__
    return Reference, kwargs


def _require_projection_in_backward(request: OptimizerRequest, model: nn.Module) -> None:
    if request.args.fp16:
        raise ArgumentError(
            f"`optim={request.name}` does not work with `fp16=True`: the loss scaler never sees the projections. "
            f"Use `bf16=True`, or `optim={request.name.removesuffix('_layerwise')}`."
        )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ArgumentError(
            f"`optim={request.name}` must be created before the model is wrapped in DistributedDataParallel, which "
            f"would reserve room for every full gradient."
        )


@register_optimizer("apollo_adamw", "apollo_adamw_layerwise", refuses=["deepspeed", "fsdp"])
def apollo(request: OptimizerRequest) -> ClassAndArguments:
    """Returns this package's APOLLO. `optim_args`: `rank`, `update_proj_gap`, `scale`, `proj_type`, `scale_type`."""
    from finetune.optim.apollo import ApolloAdamW, ApolloSettings

    model, options = request.require_model(), request.options
    in_backward = request.name.endswith("_layerwise")
    if in_backward:
        require_update_in_backward(
            request.args,
            request.name,
            instead_of_clipping="APOLLO limits the growth of its updates by itself",
            advice="`optim=apollo_adamw` has no such limits.",
            clips=bool(request.args.max_grad_norm),
        )
    options.choice("proj", ("random",), "random")
    settings = ApolloSettings(
        rank=positive(options.take("rank", int, 128), "rank"),
        update_proj_gap=positive(options.take("update_proj_gap", int, 200), "update_proj_gap"),
        scale=options.take("scale", float, 1.0),
        proj_type=options.choice("proj_type", ("std", "reverse_std", "left", "right"), "std"),
        scale_type=options.choice("scale_type", ("channel", "tensor"), "channel"),
    )
    targets = target_parameters(request, model)
    shared = {"targets": targets, "settings": settings, "in_backward": in_backward, "seed": int(request.args.seed)}
    return ApolloAdamW, {**request.adam, **shared}


def target_parameters(request: OptimizerRequest, model: nn.Module) -> list[Tensor]:
    """Returns the weights `optim_target_modules` selects. Raises `ArgumentError`, also for a LoRA model."""
    if any("lora_" in name for name, _ in model.named_parameters()):
        raise ArgumentError(
            f"`optim={request.name}` projects the gradients of full weight matrices; this model trains LoRA matrices, "
            f"which are low-rank already. Remove `use_peft`/`peft_config`, or use `optim=adamw_torch`."
        )
    names = set(target_weight_names(model, request.args.optim_target_modules, request.name))
    # A tied weight has several names, and any of them may have been selected.
    chosen = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in names}
    return [p for p in model.parameters() if id(p) in chosen]


def positive(value: int, key: str) -> int:
    """Returns `value`; raises `ArgumentError` unless it is at least 1."""
    if value < 1:
        raise ArgumentError(f"`optim_args`: `{key}={value}` must be at least 1.")
    return value
