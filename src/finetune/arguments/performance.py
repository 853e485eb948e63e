"""Number formats, memory for time, compilation, kernels, and reproducibility."""

# ruff: noqa: RUF009

import warnings
from dataclasses import dataclass
from typing import Any

from finetune import environment
from finetune.arguments.base import ArgumentGroup, arg, require
from finetune.errors import ArgumentError


@dataclass(kw_only=True, repr=False)
class PrecisionArguments(ArgumentGroup):
    """Number formats of training and evaluation."""

    bf16: bool = arg(False, "Mixed precision with bfloat16.")
    fp16: bool = arg(False, "Mixed precision with float16 and loss scaling.")
    bf16_full_eval: bool = arg(False, "Convert the model to bfloat16 for evaluation.")
    fp16_full_eval: bool = arg(False, "Convert the model to float16 for evaluation.")
    tf32: bool | None = arg(None, "TF32 matrix products on Ampere and newer; unset leaves torch's setting alone.")

    @property
    def mixed_precision(self) -> str:
        """`"fp16"`, `"bf16"` or `"no"`; without an argument, what `accelerate launch` put in the environment."""
        if self.fp16:
            return "fp16"
        if self.bf16:
            return "bf16"
        return environment.launched_precision()

    def _validate(self) -> None:
        require(not (self.fp16 and self.bf16), "`fp16=True` and `bf16=True` exclude each other; set one.")
        require(
            not (self.fp16_full_eval and self.bf16_full_eval),
            "`fp16_full_eval=True` and `bf16_full_eval=True` exclude each other; set one.",
        )
        launched = environment.launched_precision()
        asked = "fp16" if self.fp16 else "bf16" if self.bf16 else "no"
        if "no" not in (launched, asked) and launched != asked:
            raise ArgumentError(
                f"`{asked}=True` disagrees with ACCELERATE_MIXED_PRECISION={launched}, which `accelerate launch` took"
                f" from `--mixed_precision` or its config file. Set both to the same, or drop `{asked}`."
            )


@dataclass(kw_only=True, repr=False)
class MemoryArguments(ArgumentGroup):
    """Memory traded for time.

    `activation_checkpointing` and `gradient_checkpointing` are two names of one setting. After construction both hold
    the resolved value; if both are given and differ, `activation_checkpointing` decides, with a warning.
    """

    activation_checkpointing: bool | None = arg(
        None, "Recompute activations in the backward pass instead of keeping them.", nargs="?", const=True
    )
    activation_checkpointing_kwargs: dict[str, Any] | str | None = arg(
        None,
        "Settings of activation checkpointing: `every_n_layers`, `offload`, `selective` (keeps attention), or "
        "those of torch's checkpoint.",
    )
    gradient_checkpointing: bool | None = arg(
        None, "The same as `activation_checkpointing`, under its usual name.", nargs="?", const=True
    )
    gradient_checkpointing_kwargs: dict[str, Any] | str | None = arg(
        None, "The same as `activation_checkpointing_kwargs`."
    )
    offload_optimizer_state: bool = arg(False, "Keep the optimizer's state in host memory between steps.")
    torch_empty_cache_steps: int | None = arg(None, "Empty the device's memory cache every N steps.")
    use_cache: bool = arg(False, "Let the model keep its key-value cache while training; some PEFT methods need it.")

    def _validate(self) -> None:
        steps = self.torch_empty_cache_steps
        require(
            steps is None or (isinstance(steps, int) and steps > 0),
            f"`torch_empty_cache_steps={steps!r}` must be a whole number above 0, or None.",
        )
        given = self.activation_checkpointing_kwargs
        if isinstance(given, dict) and given.get("selective"):
            require(
                self.activation_checkpointing is not False,
                "`gradient_checkpointing_kwargs` has `selective`, and `gradient_checkpointing` is off. Set it to True, "
                "or drop `selective`.",
            )
            require(
                not given.get("use_reentrant"),
                "`gradient_checkpointing_kwargs` has `selective` and `use_reentrant=True`, which exclude each other. "
                "Drop one of them.",
            )
        if given and self.activation_checkpointing is False:
            warnings.warn(
                "`gradient_checkpointing_kwargs` has no effect while `gradient_checkpointing` is off. Set it to True, "
                "or drop the settings.",
                stacklevel=2,
            )
        require(
            not self.offload_optimizer_state or (accelerator_present() and not getattr(self, "use_cpu", False)),
            "`offload_optimizer_state=True` needs an accelerator; on a CPU run the state is in host memory already. Set"
            " it to False.",
        )


@dataclass(kw_only=True, repr=False)
class KernelArguments(ArgumentGroup):
    """Compilation, fused kernels, and noise on the embeddings."""

    torch_compile: bool = arg(False, "Compile the model with `torch.compile`.")
    torch_compile_backend: str | None = arg(
        None, "Backend of `torch.compile`; naming one turns compilation on.", old=["torchdynamo"]
    )
    torch_compile_mode: str | None = arg(None, "Mode of `torch.compile`; naming one turns compilation on.")
    use_liger_kernel: bool = arg(False, "Run supported layers with Liger's Triton kernels.", old=["use_liger"])
    liger_kernel_config: dict[str, Any] | str | None = arg(None, "Which Liger kernels to use, as a dict or JSON.")
    neftune_noise_alpha: float | None = arg(None, "Strength of NEFTune noise on the embeddings; 5 to 15 is usual.")

    def _validate(self) -> None:
        alpha = self.neftune_noise_alpha
        require(alpha is None or alpha >= 0, f"`neftune_noise_alpha={alpha!r}` must be at least 0, or None.")
        if self.liger_kernel_config and not self.use_liger_kernel:
            warnings.warn(
                "`liger_kernel_config` has no effect without `use_liger_kernel=True`. Set that, or drop the settings.",
                stacklevel=2,
            )


@dataclass(kw_only=True, repr=False)
class ReproducibilityArguments(ArgumentGroup):
    """Seeds."""

    seed: int = arg(42, "Seed set before the model is built and training starts.")
    data_seed: int | None = arg(None, "Seed of the sampling order; unset means `seed`.")
    full_determinism: bool = arg(False, "Deterministic kernels only: slower, for debugging.")


def set_tf32(enabled: bool) -> None:
    """Switches TF32 matrix products on or off for the process, where the device has them.

    Raises:
        ArgumentError: asked for on a device without TF32.
    """
    import torch

    available = torch.cuda.is_available() and torch.version.cuda is not None
    if not (available and torch.cuda.get_device_properties(torch.cuda.current_device()).major >= 8):
        require(not enabled, "`tf32=True` needs an NVIDIA GPU of the Ampere generation or newer. Leave `tf32` unset.")
        return
    backends: Any = torch.backends
    if hasattr(backends, "fp32_precision"):
        # torch 2.9 and newer refuse to mix this switch with the two older ones.
        backends.fp32_precision = "tf32" if enabled else "ieee"
    else:
        torch.backends.cuda.matmul.allow_tf32 = enabled
        torch.backends.cudnn.allow_tf32 = enabled


def bf16_supported(emulated: bool = True) -> bool:
    """Returns whether the accelerator computes in bfloat16, natively unless `emulated`; False without one."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=emulated)
    if torch.backends.mps.is_available():
        return torch.backends.mps.is_macos_or_newer(14, 0)
    accelerator = torch.accelerator.current_accelerator() if accelerator_present() else None
    if accelerator is None:
        return False
    check = getattr(getattr(torch, accelerator.type, None), "is_bf16_supported", None)
    return bool(check()) if check is not None else True


def best_precision(use_cpu: bool) -> str:
    """Returns the number format that suits the device: `"bf16"`, `"fp16"`, or `"no"` for float32 on a CPU."""
    cpu = use_cpu or environment.launched_on_cpu()
    if cpu or not accelerator_present():
        return "no"
    return "bf16" if bf16_supported(emulated=False) else "fp16"


def accelerator_present() -> bool:
    """Returns whether torch sees any device other than the CPU."""
    import torch

    return torch.accelerator.is_available()
