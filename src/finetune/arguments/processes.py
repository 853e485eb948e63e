"""The process that reads the arguments: its device, its rank, what it logs and saves."""

import contextlib
import logging
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from finetune import environment
from finetune.arguments.distributed import DistributedArguments
from finetune.arguments.evaluation import EvaluationArguments
from finetune.arguments.optimization import BatchingArguments
from finetune.arguments.performance import PrecisionArguments
from finetune.arguments.reporting import LoggingArguments
from finetune.arguments.saving import SavingArguments
from finetune.compat import LOG_LEVELS, ParallelMode, library_verbosity
from finetune.errors import ArgumentError

if TYPE_CHECKING:
    import torch
    from accelerate.state import PartialState

logger = logging.getLogger(__name__)


class ProcessView(
    DistributedArguments, SavingArguments, EvaluationArguments, LoggingArguments, PrecisionArguments, BatchingArguments
):
    """Properties that depend on the running process rather than on the arguments alone.

    The process group and the device are set up when the arguments are made, and again after unpickling elsewhere.
    """

    @property
    def distributed_state(self) -> "PartialState":
        """accelerate's `PartialState` of this process; an existing one is reused if it fits these arguments."""
        if "_distributed_state" not in self.__dict__:
            self.__dict__["_distributed_state"] = _open_state(self)
        return self.__dict__["_distributed_state"]

    @property
    def device(self) -> "torch.device":
        """The device of this process. One process uses one device."""
        if "_device" not in self.__dict__:
            self.__dict__["_device"] = _pick_device(self.distributed_state)
        return self.__dict__["_device"]

    @property
    def _setup_devices(self) -> "torch.device":
        return self.device

    @property
    def n_gpu(self) -> int:
        """Accelerators that this process uses: 1, or 0 on the CPU. `nn.DataParallel` is not supported."""
        return 0 if self.device.type == "cpu" else 1

    @property
    def parallel_mode(self) -> ParallelMode:
        """`DISTRIBUTED` if there is a process group, else `NOT_PARALLEL`."""
        alone = self.distributed_state.distributed_type.value == "NO"
        return ParallelMode.NOT_PARALLEL if alone else ParallelMode.DISTRIBUTED

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.distributed_state.num_processes

    @property
    def process_index(self) -> int:
        """Rank of this process among all."""
        return self.distributed_state.process_index

    @property
    def local_process_index(self) -> int:
        """Rank of this process on its machine."""
        return self.distributed_state.local_process_index

    @property
    def should_log(self) -> bool:
        """Whether this process logs."""
        return (self.local_process_index if self.log_on_each_node else self.process_index) == 0

    @property
    def should_save(self) -> bool:
        """Whether this process writes models and checkpoints."""
        return (self.local_process_index if self.save_on_each_node else self.process_index) == 0

    @property
    def train_batch_size(self) -> int:
        """Training samples per process and forward pass."""
        return self.per_device_train_batch_size

    @property
    def eval_batch_size(self) -> int:
        """Evaluation samples per process and forward pass."""
        return self.per_device_eval_batch_size

    @property
    def ddp_timeout_delta(self) -> timedelta:
        """`ddp_timeout` as a time span."""
        return timedelta(seconds=self.ddp_timeout)

    @property
    def place_model_on_device(self) -> bool | None:
        """Override to decide whether the trainer moves the model to the device; None leaves it to the trainer."""
        return None

    @property
    def _no_sync_in_gradient_accumulation(self) -> bool:
        return not self.deepspeed

    def get_process_log_level(self) -> int:
        """Returns the level of `logging` for this process: `log_level` if it logs, else `log_level_replica`."""
        level = LOG_LEVELS[self.log_level if self.should_log else self.log_level_replica]
        return library_verbosity() if level == -1 else level

    @contextlib.contextmanager
    def main_process_first(self, local: bool = True, desc: str = "work") -> Iterator[None]:
        """Runs the block in the main process (of each machine if `local`) while the others wait, then in the others."""
        if self.world_size == 1:
            yield
            return
        import torch.distributed

        index = self.local_process_index if local else self.process_index
        if index != 0:
            logger.debug("Process %d waits for the main process: %s", self.process_index, desc)
            torch.distributed.barrier()
        try:
            yield
        finally:
            if index == 0:
                logger.debug("The main process is done: %s", desc)
                torch.distributed.barrier()


def _open_state(args: ProcessView) -> "PartialState":
    """Returns the `PartialState` for `args`, and makes way for an `Accelerator` that fits them.

    accelerate keeps one state per process and refuses an `Accelerator` with other settings. What exists is kept if it
    fits, so that a copy of the arguments made during a run leaves the run alone; otherwise it is cleared.

    Raises:
        ArgumentError: `use_configured_state` without a state, or processes that would train alone.
    """
    from accelerate.state import AcceleratorState, PartialState

    config: Any = args.accelerator_config
    cpu = args.use_cpu or environment.launched_on_cpu()
    existing = PartialState() if PartialState._shared_state else None
    if config.use_configured_state:
        if existing is None:
            raise ArgumentError(
                "`accelerator_config={'use_configured_state': True}` needs an `Accelerator` or `PartialState` that"
                " exists before the arguments are made. Create one first, or drop the key."
            )
        return existing
    same_place = existing is not None and bool(existing._cpu) == cpu
    if not (same_place and _accelerator_fits(args)):
        # accelerate writes FSDP into the state of the processes, where the next `Accelerator` would not undo it.
        same_place = existing is not None and same_place and existing.distributed_type.value != "FSDP"
        AcceleratorState._reset_state(reset_partial_state=not same_place)
    if existing is not None and same_place:
        return existing
    settings: dict[str, Any] = {"cpu": True} if cpu else {"timeout": args.ddp_timeout_delta}
    if args.deepspeed and not cpu:
        with environment.temporarily("ACCELERATE_USE_DEEPSPEED", "true"):
            state = PartialState(**settings)
    else:
        # A single process has no process group, and accelerate fails on a backend named for none.
        state = PartialState(backend=args.ddp_backend if environment.was_launched() else None, **settings)
    if "LOCAL_RANK" in os.environ:
        environment.require_whole_world(state.num_processes, "no process group could be formed")
    return state


def _accelerator_fits(args: ProcessView) -> bool:
    """Returns whether the accelerate state of this process, if any, was made for the same precision and sharding."""
    from accelerate.state import AcceleratorState

    state: dict[str, Any] = AcceleratorState._shared_state
    if not state:
        return True
    kind = getattr(state.get("distributed_type"), "value", "NO")
    for name, asked in (("FSDP", args.fsdp), ("DEEPSPEED", args.deepspeed)):
        if (bool(asked) or environment.launched_sharding(name)) != (kind == name):
            return False
    # Under DeepSpeed accelerate leaves the precision to the engine and records "no".
    return kind == "DEEPSPEED" or state.get("_mixed_precision") == args.mixed_precision


def _pick_device(state: "PartialState") -> "torch.device":
    """Returns the device of this process with its index."""
    import torch

    device = torch.device(state.device or "cpu")
    if state.num_processes > 1 or device.type in ("cpu", "mps", "meta"):
        return device
    if device.index is None:
        device = torch.device(device.type, 0)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device
