"""Lets Triton's interpreter run Liger's kernels on a CPU (`TRITON_INTERPRET=1`). For tests only.

Triton 3.9 leaves float arguments as Python floats, on which Liger calls `.to`, and its libdevice functions return None.
"""

from importlib import import_module
from typing import Any


def install() -> None:
    """Call it before a kernel runs; `TRITON_INTERPRET=1` must be set before Triton is imported."""
    import numpy as np
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    module: Any = interpreter
    language: Any = tl
    convert = module._implicit_cvt

    def convert_floats(argument: Any) -> Any:
        if isinstance(argument, float):
            scalar = module.TensorHandle(np.array([argument], dtype=np.float32), language.float32)
            return language.tensor(scalar, language.float32)
        return convert(argument)

    module._implicit_cvt = convert_floats
    for name in ("rms_norm", "cross_entropy"):
        kernels: Any = import_module(f"liger_kernel.ops.{name}")
        if hasattr(kernels, "rsqrt"):
            kernels.rsqrt = lambda x: language.rsqrt(x)  # noqa: PLW0108  # a function, so that kernels call it as it is
        if hasattr(kernels, "tanh"):
            kernels.tanh = lambda x: 2 * language.sigmoid(2 * x) - 1
