"""One builder per optimizer family; every package is imported inside the builder that needs it.

Keyword arguments agree with `transformers.Trainer.get_optimizer_cls_and_kwargs`, so that a run moved here takes the
same steps. Whatever else the class accepts by name can be given in `optim_args`.
"""

import functools
import importlib
import logging
from typing import Any

import torch
from torch import nn

from finetune.errors import ArgumentError
from finetune.optim.registry import ClassAndArguments, OptimizerRequest, register_optimizer


def import_or_explain(module: str, install: str, request: OptimizerRequest) -> Any:
    """Returns the module; raises `ArgumentError` with the installation command when it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as problem:
        raise ArgumentError(
            f"`optim={request.name}` needs the package `{module.split('.')[0]}` ({problem}). Install it with "
            f"`{install}`, or choose another `optim`, for example `adamw_torch`."
        ) from problem


def with_options(
    cls: type, kwargs: dict[str, Any], request: OptimizerRequest, *, except_for: tuple[str, ...] = ()
) -> ClassAndArguments:
    """Returns `cls` and `kwargs`, overlaid with the keys of `optim_args` that `cls` takes, but for `except_for`."""
    extra = request.options.for_signature(
        cls, except_for=dict.fromkeys(("betas", "optim_bits", "is_paged", *except_for))
    )
    return cls, {**kwargs, **extra}


@register_optimizer("adamw_torch")
def adamw_torch(request: OptimizerRequest) -> ClassAndArguments:
    """Returns `torch.optim.AdamW`."""
    return with_options(torch.optim.AdamW, request.adam, request)


@register_optimizer("adamw_torch_fused")
def adamw_torch_fused(request: OptimizerRequest) -> ClassAndArguments:
    """Returns `torch.optim.AdamW` with its fused kernel, the default of transformers."""
    return with_options(torch.optim.AdamW, {**request.adam, "fused": True}, request)


@register_optimizer("adamw_torch_xla")
def adamw_torch_xla(request: OptimizerRequest) -> ClassAndArguments:
    """Returns the sync-free AdamW of torch_xla."""
    return import_or_explain("torch_xla.amp.syncfree", "pip install torch_xla", request).AdamW, request.adam


@register_optimizer("adamw_torch_npu_fused")
def adamw_torch_npu_fused(request: OptimizerRequest) -> ClassAndArguments:
    """Returns the fused AdamW of torch_npu."""
    return import_or_explain("torch_npu.optim", "pip install torch_npu", request).NpuFusedAdamW, request.adam


@register_optimizer("adamw_anyprecision")
def adamw_anyprecision(request: OptimizerRequest) -> ClassAndArguments:
    """Returns AnyPrecisionAdamW; `optim_args` takes `use_kahan_summation` and three dtypes."""
    module = import_or_explain(
        "torchdistx.optimizers", "pip install git+https://github.com/pytorch/torchdistx", request
    )
    dtypes = {"momentum_dtype": "float32", "variance_dtype": "float32", "compensation_buffer_dtype": "bfloat16"}
    chosen = {
        key: getattr(torch, request.options.choice(key, ("float32", "bfloat16", "float16", "float64"), default))
        for key, default in dtypes.items()
    }
    kahan = request.options.take("use_kahan_summation", bool, False)
    return module.AnyPrecisionAdamW, {**request.adam, "use_kahan_summation": kahan, **chosen}


@register_optimizer("adafactor")
def adafactor(request: OptimizerRequest) -> ClassAndArguments:
    """Returns transformers' Adafactor with an external learning rate."""
    from transformers.optimization import Adafactor

    fixed = {"lr": request.args.learning_rate, "scale_parameter": False, "relative_step": False}
    return with_options(Adafactor, fixed, request)


_PLAIN_TORCH = {
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
    "asgd": torch.optim.ASGD,
    "adadelta": torch.optim.Adadelta,
    "rprop": torch.optim.Rprop,
}
_ADAM_LIKE_TORCH = {
    "adam": torch.optim.Adam,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "adamax": torch.optim.Adamax,
}


@register_optimizer(*_PLAIN_TORCH)
def plain_torch(request: OptimizerRequest) -> ClassAndArguments:
    """Returns one of torch's optimizers without Adam's betas."""
    return with_options(_PLAIN_TORCH[request.name], {"lr": request.args.learning_rate}, request)


@register_optimizer(*_ADAM_LIKE_TORCH)
def adam_like_torch(request: OptimizerRequest) -> ClassAndArguments:
    """Returns one of torch's relatives of Adam."""
    return with_options(_ADAM_LIKE_TORCH[request.name], request.adam, request)


@register_optimizer("muon", refuses=["deepspeed"])  # ZeRO steps flat pieces, in which no matrix is left
def muon(request: OptimizerRequest) -> ClassAndArguments:
    """Returns torch's Muon for the hidden matrices and AdamW for embeddings, the output layer, norms and biases."""
    from finetune.optim.muon import MuonAdamW, muon_parameters

    model, options = request.require_model(), request.options
    kwargs = {
        **request.adam,
        "muon_params": muon_parameters(model),
        "momentum": options.take("momentum", float, 0.95),
        "nesterov": options.take("nesterov", bool, True),
        "ns_steps": options.take("ns_steps", int, 5),
        # Updates get AdamW's root mean square, so one `learning_rate` suits both halves.
        "adjust_lr_fn": options.choice("adjust_lr_fn", ("match_rms_adamw", "original"), "match_rms_adamw"),
    }
    return MuonAdamW, kwargs


_BITSANDBYTES = {
    "adamw_bnb_8bit": ("AdamW", 8, False),
    "adamw_8bit": ("AdamW", 8, False),
    "paged_adamw_32bit": ("AdamW", 32, True),
    "paged_adamw_8bit": ("AdamW", 8, True),
    "ademamix": ("AdEMAMix", 32, False),
    "ademamix_8bit": ("AdEMAMix", 8, False),
    "paged_ademamix_32bit": ("AdEMAMix", 32, True),
    "paged_ademamix_8bit": ("AdEMAMix", 8, True),
    "lion_32bit": ("Lion", 32, False),
    "lion_8bit": ("Lion", 8, False),
    "paged_lion_32bit": ("Lion", 32, True),
    "paged_lion_8bit": ("Lion", 8, True),
    "rmsprop_bnb": ("RMSprop", 32, False),
    "rmsprop_bnb_8bit": ("RMSprop", 8, False),
    "rmsprop_bnb_32bit": ("RMSprop", 32, False),
}


@register_optimizer(*_BITSANDBYTES)
def bitsandbytes(request: OptimizerRequest) -> ClassAndArguments:
    """Returns a bitsandbytes optimizer with 8- or 32-bit states, paged or not."""
    family, bits, paged = _BITSANDBYTES[request.name]
    cls = getattr(import_or_explain("bitsandbytes.optim", "pip install bitsandbytes", request), family)
    args, options = request.args, request.options
    kwargs: dict[str, Any] = {"lr": args.learning_rate, "optim_bits": bits}
    if family != "RMSprop":
        kwargs["is_paged"] = paged
    if family == "AdamW":
        kwargs.update(request.adam)
    elif family == "Lion":
        kwargs["betas"] = (args.adam_beta1, args.adam_beta2)
    elif family == "AdEMAMix":
        kwargs["betas"] = (
            options.take("beta1", float, args.adam_beta1),
            options.take("beta2", float, args.adam_beta2),
            options.take("beta3", float, 0.9999),
        )
        kwargs["eps"] = options.take("eps", float, args.adam_epsilon)
        kwargs["alpha"] = options.take("alpha", float, 5.0)
    return with_options(cls, kwargs, request)


def override_embedding_bits(model: nn.Module) -> None:
    """Tells bitsandbytes to keep 32-bit states for the weights of every `nn.Embedding`."""
    manager = importlib.import_module("bitsandbytes.optim").GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})


@register_optimizer("adamw_torch_4bit", "adamw_torch_8bit")
def torchao(request: OptimizerRequest) -> ClassAndArguments:
    """Returns torchao's 4- or 8-bit AdamW."""
    module = import_or_explain("torchao.optim", "pip install torchao", request)
    cls = module.AdamW4bit if request.name == "adamw_torch_4bit" else module.AdamW8bit
    defaults = {"block_size": 256, "bf16_stochastic_round": False}
    return with_options(cls, {**request.adam, **defaults}, request)


@register_optimizer("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd")
def schedule_free(request: OptimizerRequest) -> ClassAndArguments:
    """Returns a schedule-free optimizer, which the trainer must switch between `train()` and `eval()`."""
    module = import_or_explain("schedulefree", "pip install schedulefree", request)
    args, options = request.args, request.options
    kwargs: dict[str, Any] = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    if request.name != "schedule_free_sgd":
        kwargs.update(request.adam)
    if request.name != "schedule_free_radam":
        # Below one, `warmup_steps` is a share of a run whose length is not known here.
        if 0 < args.warmup_steps < 1:
            raise ArgumentError(
                f"`optim={request.name}` warms up by itself and needs `warmup_steps` as a number of steps; "
                f"given: {args.warmup_steps}."
            )
        kwargs["warmup_steps"] = int(args.warmup_steps)
    kwargs["weight_lr_power"] = options.take("weight_lr_power", float, 2.0)
    kwargs["r"] = options.take("r", float, 0.0)
    names = {
        "schedule_free_radam": "RAdamScheduleFree",
        "schedule_free_adamw": "AdamWScheduleFree",
        "schedule_free_sgd": "SGDScheduleFree",
    }
    return with_options(getattr(module, names[request.name]), kwargs, request)


@register_optimizer("grokadamw")
def grokadamw(request: OptimizerRequest) -> ClassAndArguments:
    """Returns GrokAdamW, with its state where torch's optimizers have it."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    cls = import_or_explain("grokadamw", "pip install grokadamw", request).GrokAdamW
    # Importing the package reconfigures the logging of the whole program.
    root.setLevel(level)
    root.handlers[:] = handlers
    defaults = {"alpha_init": 0.98, "lamb": 2.0, "gamma": 0.1}
    defaults |= {"grokking_signal_decay_rate": 0.1, "gradient_clipping": 1.0}
    kwargs = {key: request.options.take(key, float, value) for key, value in defaults.items()}
    return _with_state_in_its_place(cls), {"lr": request.args.learning_rate, **kwargs}


@functools.cache
def _with_state_in_its_place(cls: Any) -> Any:
    """Returns GrokAdamW with one state for all groups: torch's.

    The package keeps moments in `param_groups`, by parameter, so a loaded checkpoint has those of parameters that are
    gone and training starts from zero moments. What a step computes stays the package's.
    """

    class GrokAdamW(cls):
        def add_param_group(self, param_group: dict[str, Any]) -> None:
            super().add_param_group(param_group)
            self.param_groups[-1]["state"] = self.state

        def state_dict(self) -> dict[str, Any]:
            saved = super().state_dict()
            for group in saved["param_groups"]:
                group.pop("state", None)
            return saved

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict)
            for group in self.param_groups:
                group["state"] = self.state

    return GrokAdamW


@register_optimizer("stable_adamw")
def stable_adamw(request: OptimizerRequest) -> ClassAndArguments:
    """Returns StableAdamW of torch-optimi."""
    cls = import_or_explain("optimi", "pip install torch-optimi", request).StableAdamW
    options = request.options
    max_lr = options.take("max_lr", float, float("nan"))
    kahan = options.choice("kahan_sum", ("true", "false", "auto"), "auto")
    kwargs = {
        **request.adam,
        "weight_decay": request.args.weight_decay,
        "decouple_lr": options.take("decouple_lr", bool, False),
        "max_lr": None if max_lr != max_lr else max_lr,
        "kahan_sum": {"true": True, "false": False, "auto": None}[kahan],
    }
    if not torch.cuda.is_available():
        # The package prefers Triton wherever it is installed, also where there is no driver for it.
        kwargs["triton"] = False
    return with_options(cls, kwargs, request)
