"""Sums kept on the device between two logs, so that a training step never waits for the host.

`LossMeter` holds the running loss, `MetricBag` any other quantity that is a sum over a count (accuracy, entropy).
"""

import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from finetune.data.rows import IGNORE_INDEX
from finetune.distributed import ranks
from finetune.errors import NonFiniteLossError

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

NonFinitePolicy = Literal["raise", "skip_step", "log"]


class LossMeter:
    """The loss of a run: a device sum since the last log, and a host total since the start.

    A non-finite loss is never replaced by something that looks healthy (`transformers` substitutes the running mean).
    It is counted on the device, and the policy decides: `raise` stops the run, `skip_step` drops the update,
    `log` goes on and reports `nonfinite_losses` beside the NaN it produced. All three name the rows of the first
    offending batch.

    Attributes:
        running: 0-d tensor, the sum since the last log. `Trainer._tr_loss` is this tensor.
        total: sum of everything already logged.
        logged_at: global step of the last log.
    """

    def __init__(
        self,
        device: torch.device,
        policy: NonFinitePolicy,
        start_step: int,
        describe_batch: Callable[[int, int], str] | None = None,
        processes: int = 1,
    ) -> None:
        """`policy` is `nonfinite_policy`; `describe_batch(place, process)` says which rows the batch at `place` has."""
        self.policy = policy
        self._describe = describe_batch
        self.running = torch.tensor(0.0, device=device)
        self.total = 0.0
        self.start_step = start_step
        self.logged_at = start_step
        self._nonfinite = torch.zeros((), dtype=torch.int64, device=device)
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self._unlabelled = torch.zeros((), dtype=torch.int64, device=device)
        self._window_bad = torch.zeros((), dtype=torch.bool, device=device)
        self._processes = processes
        # One of several processes must not stop alone: the others would wait for it until they lose the connection.
        self._on_host = device.type == "cpu"
        self._stops_at_once = self._on_host and processes == 1

    def add(self, loss: Tensor, step: int, place: int = -1) -> None:
        """Adds the scaled loss of the micro-batch at `place`. Under `raise`, one process on a CPU stops at a NaN here.

        Otherwise the check waits for `drain` and `require_finite`: reading the value would stall an accelerator, and
        several processes stop together, where all of them learn of it.
        """
        self.running += loss
        if self._on_host and math.isfinite(loss.item()):
            return  # nobody waits for a number of the host's own
        bad = ~torch.isfinite(loss)
        self._first_bad.masked_fill_(bad & (self._nonfinite == 0), place)
        self._nonfinite += bad
        if self.policy == "skip_step":
            self._window_bad |= bad
        if self.policy == "raise" and self._stops_at_once and bool(bad):
            self._raise(step + 1, float(loss), self._where([place]), int(self._unlabelled))

    def note_items(self, num_items: Tensor) -> None:
        """Counts the window that begins if it has no items, so that its loss is 0 and trains nothing."""
        if not self._on_host or num_items.item() == 0:
            self._unlabelled += num_items == 0

    def window_is_bad(self, grad_norm: Tensor | float | None) -> bool:
        """Returns whether the update of the finished window must be dropped, and forgets the window.

        Only `skip_step` ever answers yes; that policy reads one value per update from the device, and several
        processes agree on it, so that all of them drop the same updates.
        """
        if self.policy != "skip_step":
            return False
        bad = self._window_bad.clone()
        if grad_norm is not None:
            bad |= ~torch.isfinite(torch.as_tensor(grad_norm, device=bad.device))
        if self._processes > 1:
            bad = ranks.highest(bad.int()).bool()
        self._window_bad.zero_()
        return bool(bad)

    def forget_window(self) -> None:
        """Forgets a window without an update, so that its losses do not drop the next one."""
        self._window_bad.zero_()

    def drain(self, accelerator: "Accelerator", step: int) -> tuple[float, int]:
        """Returns the loss summed since the last log (mean over processes) and the non-finite count, and resets both.

        Raises:
            NonFiniteLossError: under `raise`, when any loss since the last log was not finite.
        """
        loss, bad, places, unlabelled = self._over_processes(accelerator)
        self.running.zero_()
        self._nonfinite.zero_()
        self._unlabelled.zero_()
        self._first_bad.fill_(-1)
        if bad and self.policy == "raise":
            self._raise(step, loss, self._where(places), unlabelled)
        if bad:
            logger.warning("%s non-finite losses up to update %s%s.", bad, step, self._where(places))
        if unlabelled:
            logger.warning(
                "%s of the updates after step %s, up to step %s, had no label in the loss (all are %s): they trained "
                "nothing. Leave such rows out.",
                unlabelled,
                self.logged_at,
                step,
                IGNORE_INDEX,
            )
        self.total += loss
        self.logged_at = step
        return loss, bad

    def require_finite(self, accelerator: "Accelerator", step: int) -> None:
        """Raises as `drain` does and resets nothing: called before saving, so that no checkpoint holds NaN weights."""
        if self.policy == "raise":
            loss, bad, places, unlabelled = self._over_processes(accelerator)
            if bad:
                self._raise(step, loss, self._where(places), unlabelled)

    def _over_processes(self, accelerator: "Accelerator") -> tuple[float, int, list[int], int]:
        """Returns the mean loss, how many were not finite, the first bad place of each process (-1: none), and how many
        windows had no items."""
        mine = [self.running, self._nonfinite, self._first_bad, self._unlabelled]
        if accelerator.num_processes == 1:
            running, bad, first, unlabelled = (value.item() for value in mine)
            return running, int(bad), [int(first)], int(unlabelled)
        # float64 exists wherever there can be several processes, and places need it.
        everywhere = accelerator.gather(torch.stack([value.double() for value in mine]).unsqueeze(0))
        assert isinstance(everywhere, Tensor)
        running, bad, first, unlabelled = everywhere.unbind(1)
        # Processes count the windows of all of them, or each its own.
        return float(running.float().mean()), int(bad.sum()), [int(n) for n in first], int(unlabelled.max())

    def state_dict(self) -> dict[str, float | int]:
        """Returns what a resumed run needs to log the same numbers: reads the device, so call it when saving."""
        return {
            "running": self.running.item(),
            "total": self.total,
            "logged_at": self.logged_at,
            "start_step": self.start_step,
        }

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        self.running.fill_(float(state["running"]))
        self.total = float(state["total"])
        self.logged_at, self.start_step = int(state["logged_at"]), int(state["start_step"])

    def _where(self, places: list[int]) -> str:
        """Returns, for each process, which batch the first non-finite loss came from. `places` has one per process."""
        if self._describe is None:
            return ""
        alone = len(places) == 1
        found = [self._describe(place, -1 if alone else rank) for rank, place in enumerate(places) if place >= 0]
        return f", first in {'; '.join(found)}" if found else ""

    def load_state_dicts(self, states: list[dict[str, float | int]]) -> None:
        """As `load_state_dict` for another number of processes: each goes on from the mean, which is what is logged."""
        mean = sum(float(state["running"]) for state in states) / len(states)
        self.load_state_dict({**states[0], "running": mean})

    def _raise(self, update: int, loss: float, where: str, unlabelled: int) -> None:
        message = f"The training loss became {loss} by update {update}{where}."
        if unlabelled:
            message += (
                f" Since step {self.logged_at}, {unlabelled} of the updates had no label in the loss (all are "
                f"{IGNORE_INDEX}), and a mean over no labels is 0/0. Leave such rows out, or divide the sum by "
                "`num_items_in_batch`."
            )
        else:
            message += " Lower `learning_rate`, set `max_grad_norm`, or check the labels of that batch."
        raise NonFiniteLossError(f"{message} `nonfinite_policy='skip_step'` or `'log'` goes on.")


class MetricBag:
    """Named (sum, count) pairs on the device; one reduction and one host read per `drain`.

    >>> bag = MetricBag()
    >>> bag.add("accuracy", torch.tensor(3.0), torch.tensor(4.0)); bag.add("accuracy", torch.tensor(1.0), 4)
    >>> bag.drain()
    {'accuracy': 0.5}
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, total: Tensor, count: Tensor | int) -> None:
        """Adds `total` over `count` items to the quantity `name`; both stay on the device."""
        dtype = ranks.sum_dtype(total.device)
        pair = torch.stack([total.detach().to(dtype), torch.as_tensor(count, device=total.device).to(dtype)])
        before = self._sums.get(name)
        # Loaded sums are float64 in host memory, and are converted there.
        self._sums[name] = pair if before is None else before.to(dtype).to(pair.device) + pair

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the sums since the last drain, for a checkpoint between two logs."""
        return {name: pair.cpu() for name, pair in self._sums.items()}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Goes on from saved sums; they follow the device of the next `add`."""
        self._sums = dict(state_dict)

    def load_state_dicts(self, states: list[dict[str, Tensor]]) -> None:
        """As `load_state_dict` for another number of processes: each takes an equal share of all sums."""
        names = {name for state in states for name in state}
        share = 1 / ranks.world_size()
        self._sums = {
            name: torch.stack([state[name] for state in states if name in state]).sum(0) * share for name in names
        }

    def drain(self, accelerator: "Accelerator | None" = None) -> dict[str, float]:
        """Returns each quantity's mean over all processes since the last drain; empty quantities are left out."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        pairs = torch.stack([self._sums[name] for name in names])
        self._sums.clear()
        if accelerator is not None:
            pairs = ranks.sum_over_processes(pairs, accelerator)
        return {name: total / count for name, (total, count) in zip(names, pairs.tolist(), strict=True) if count}


class TokenCounter:
    """Tokens trained on so far: counted on the device, saved with the checkpoint (TRL starts from 0 on resume)."""

    def __init__(self) -> None:
        self.total = 0
        self._pending: Tensor | int = 0

    def add(self, tokens: Tensor | int) -> None:
        self._pending = self._pending + tokens

    def read(self, accelerator: Any) -> int:
        """Returns the tokens of all processes since the start of the run. Reads the device."""
        pending, self._pending = self._pending, 0
        if accelerator.num_processes > 1:
            pending = ranks.sum_over_processes(torch.as_tensor(pending, device=accelerator.device), accelerator)
        self.total += int(pending)
        return self.total

    def state_dict(self) -> dict[str, int]:
        return {"total": self.total}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.total, self._pending = state_dict["total"], 0
