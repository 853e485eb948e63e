"""LOMO and AdaLOMO of `lomo_optim`: weights are updated, and gradients freed, while backward goes on."""

import logging

import torch

from finetune.arguments.optimization import OptimizerArguments
from finetune.errors import ArgumentError
from finetune.optim.builders import import_or_explain, with_options
from finetune.optim.fused_backward import require_update_in_backward
from finetune.optim.registry import ClassAndArguments, OptimizerRequest, register_optimizer

logger = logging.getLogger(__name__)


@register_optimizer("lomo", "adalomo")
def lomo(request: OptimizerRequest) -> ClassAndArguments:
    """Returns LOMO or AdaLOMO, which update inside backward: the trainer passes `learning_rate` to it."""
    module = import_or_explain("lomo_optim", "pip install lomo-optim", request)
    cls = module.AdaLomo if request.name == "adalomo" else module.Lomo
    if request.name == "adalomo" and not torch.cuda.is_available():
        raise ArgumentError("`optim=adalomo` needs a CUDA device: the package allocates there. Use `optim=lomo`.")
    _require_plain_updates(request)
    # The package clips by a norm only when its caller runs every backward twice.
    given = {"lr": request.args.learning_rate, "model": request.require_model()}
    return with_options(cls, given, request, except_for=("clip_grad_norm",))


def _require_plain_updates(request: OptimizerRequest) -> None:
    """Raises `ArgumentError` for what the package would leave out in silence; warns of the default `max_grad_norm`."""
    args = request.args
    default_norm = OptimizerArguments.max_grad_norm
    require_update_in_backward(
        args,
        request.name,
        clips=args.max_grad_norm not in (None, 0, default_norm),
        instead_of_clipping='`optim_args="clip_grad_value=1.0"` limits single values',
        advice="`optim=galore_adamw_layerwise` needs little memory too, and has fewer limits.",
    )
    if args.weight_decay:
        raise ArgumentError(
            f"`optim={request.name}` has no weight decay that leaves out biases and normalisation weights; given: "
            f"`weight_decay={args.weight_decay}`. Set it to 0."
        )
    if args.max_grad_norm == default_norm:
        # As in transformers, whose default would otherwise have to be unset for every run.
        logger.warning(
            "`optim=%s` updates weights inside backward, so `max_grad_norm=%s` has no effect. 0 says so.",
            request.name,
            default_norm,
        )
