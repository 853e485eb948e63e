"""Floating-point operations: how many a batch costs, and what share of the device's peak they reach."""

import re
import weakref
from typing import Any

import torch

from finetune.distributed import ranks

# Dense bf16/fp16 tensor-core peaks in operations per second, from the vendors' data sheets (SXM variants where
# there are several). Matched as whole words of `torch.cuda.get_device_name()`, the first hit counts.
_PEAKS: tuple[tuple[str, float], ...] = (
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("GH200", 989e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("MI300X", 1307e12),
    ("MI250X", 383e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("A40", 150e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
    ("V100", 125e12),
    ("T4", 65e12),
)

_parameters_without_embeddings: "weakref.WeakKeyDictionary[Any, int]" = weakref.WeakKeyDictionary()


def floating_point_ops(model: Any, inputs: Any) -> int:
    """Returns the operations of one forward and backward pass: 6 x tokens x parameters without embeddings.

    A batch of 2 x 8 tokens through 1,000 such parameters costs 96,000. 0 for models that cannot count their
    parameters (not of transformers) and batches without the model's main input. A model's own
    `floating_point_ops(inputs)` is asked first. Source: `transformers.Trainer.floating_point_ops`.
    """
    own = getattr(model, "floating_point_ops", None)
    if callable(own):
        return int(own(inputs))  # pyright: ignore[reportArgumentType]
    main_input = inputs.get(getattr(model, "main_input_name", "input_ids")) if hasattr(inputs, "get") else None
    if not isinstance(main_input, torch.Tensor) or not hasattr(model, "num_parameters"):
        return 0
    # Counting walks all parameters, which for every micro-batch would cost more than the rest of the loop.
    count = _parameters_without_embeddings.get(model)
    if count is None:
        count = _parameters_without_embeddings[model] = model.num_parameters(exclude_embeddings=True)
    return 6 * main_input.numel() * count


def sum_over_processes(local: float, accelerator: Any) -> float:
    """Returns the sum of `local` over all processes, on each of them."""
    if accelerator.num_processes == 1:
        return local
    device = accelerator.device
    return float(
        ranks.sum_over_processes(torch.tensor(local, dtype=ranks.sum_dtype(device), device=device), accelerator)
    )


def peak_flops_per_second(device: torch.device | str) -> float | None:
    """Returns the dense 16-bit peak of one device, or None where it is not known (every CPU, for instance)."""
    if torch.device(device).type != "cuda" or not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name(torch.device(device))
    return next((peak for words, peak in _PEAKS if re.search(rf"\b{words}\b", name)), None)


def model_flops_utilization(
    flops: float, seconds: float, device: torch.device | str, num_devices: int = 1
) -> float | None:
    """Returns the share of the devices' peak that `flops` in `seconds` reach, 0 to 1; None if the peak is unknown.

    989e12 operations in 4 s on one H100 are 0.25. Operations recomputed by gradient checkpointing are not counted,
    as is usual for this figure (PaLM, arXiv:2204.02311, appendix B).
    """
    peak = peak_flops_per_second(device)
    return None if peak is None or seconds <= 0 else flops / seconds / (peak * num_devices)
