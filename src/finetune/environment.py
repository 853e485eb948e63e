"""What launchers and users say through the environment variables of this process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from finetune.errors import ArgumentError


def parse_bool(name: str, value: Any) -> bool:
    """Returns the truth value of `yes`, `on`, `1`, `true`, ... and of their opposites.

    Raises:
        ArgumentError: any other `value`; `name` says whose it is.
    """
    word = str(value).strip().lower()
    if word in ("y", "yes", "t", "true", "on", "1"):
        return True
    if word in ("n", "no", "f", "false", "off", "0"):
        return False
    raise ArgumentError(f"`{name}={value!r}` must be true or false.")


def launched_on_cpu() -> bool:
    """Returns whether `accelerate launch` was told to use the CPU. Raises `ArgumentError` as `parse_bool` does."""
    # An empty one is refused: accelerate reads it too, and fails without naming it.
    return parse_bool("ACCELERATE_USE_CPU", os.environ.get("ACCELERATE_USE_CPU", "false"))


def launched_sharding(kind: str) -> bool:
    """Returns whether `accelerate launch` was told to use "fsdp" or "deepspeed", whichever `kind` is, in any case.

    The variable is how it tells its processes what its config file says; an empty one says nothing, as for
    accelerate. Raises `ArgumentError` as `parse_bool` does.
    """
    variable = f"ACCELERATE_USE_{kind.upper()}"
    return parse_bool(variable, os.environ.get(variable) or "false")


def launched_precision() -> str:
    """Returns the mixed precision that `accelerate launch` was told to use, in lower case; "no" without one."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()


def rank() -> int:
    """Returns the number that the launcher gave this process among all; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Returns how many processes the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def was_launched() -> bool:
    """Returns whether a launcher started this process as one that can join the others.

    `RANK` alone does not count: accelerate forms no process group without `LOCAL_RANK` or the variables of MPI.
    """
    return any(name in os.environ for name in ("LOCAL_RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"))


def is_alone_against_orders() -> bool:
    """Returns whether `accelerate launch` was asked for several processes and started this one alone.

    It sets `MASTER_ADDR` for several processes, and a rank only when it really starts them.
    """
    was_asked = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
    return was_asked and "RANK" not in os.environ and not was_launched()


def require_whole_world(num_processes: int, seen: str) -> None:
    """Raises `ArgumentError` if the launcher started another number of processes than `num_processes`.

    `seen` says what there is instead of a process group of them all.
    """
    launched = world_size()
    if launched != num_processes:
        raise ArgumentError(
            f"The launcher started {launched} processes, but {seen}, so each would train alone and write to the same"
            " `output_dir`. Without accelerators set `use_cpu=True` (under DeepSpeed instead `ddp_backend='gloo'` and"
            " the environment variable DS_ACCELERATOR=cpu)."
        )


@contextmanager
def temporarily(name: str, value: str) -> Iterator[None]:
    """Sets an environment variable for the block."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            # The block may have removed it itself.
            os.environ.pop(name, None)
        else:
            os.environ[name] = before
