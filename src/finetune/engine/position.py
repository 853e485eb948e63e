"""Where in its data a run stands, as part of a checkpoint: saved, verified, and carried to another geometry.

Progress is counted in rows. A run saved after 6 micro-batches of 2 rows on 2 processes (24 rows) continues on one
process with micro-batches of 4 rows behind 6 of them, as long as the rows per optimizer step stay the same.
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from finetune.data.loading import position as loaders
from finetune.data.loading.digest import digest, rows_digest
from finetune.engine.plan import ResumePoint
from finetune.engine.run import PLACES, TrainingRun
from finetune.errors import CheckpointError

logger = logging.getLogger(__name__)


class DataPosition:
    """The position of a run's training data. `load_state_dict` moves `run.resume` to it.

    Raises, when loading:
        CheckpointError: the data, its order or the rows per optimizer step are not what they were.
    """

    def __init__(self, run: TrainingRun) -> None:
        self.run = run

    def state_dict(self) -> dict[str, Any]:
        """Returns the position after the last finished update, and hashes of the rows that come next: of their
        indices (`next_order`) and of what they hold (`next_rows`). None where either cannot be known."""
        run = self.run
        fetches = loaders.fetches_of(run.loader)
        epoch, batches = self._place()
        order, rows = self._next_rows(batches, epoch)
        return {
            "epoch": epoch,
            "batches_done": batches,
            "rows_per_batch": loaders.rows_per_batch(run.loader),
            "accumulation": run.plan.accumulation,
            "loader": loaders.loader_state(run.loader),
            "next_order": order,
            "next_rows": rows,
            "next_fetch": None if run.epoch_is_over or fetches is None else fetches.of(batches),
        }

    def _place(self) -> tuple[int, int]:
        """Returns the epoch and how many of its micro-batches a run resumed from here must leave out.

        Where a callback asked for the end of an epoch that has not ended yet: more than it has, so that the resumed run
        still fires `on_epoch_end`.
        """
        run = self.run
        if run.epoch_is_over:
            return run.epoch + 1, 0
        return run.epoch, PLACES if run.ends_epoch() else run.batches_updated

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Moves the run to the saved position, after verifying that the data is the same."""
        run = self.run
        if run.args.ignore_data_skip:
            return
        loaders.load_loader_state(run.loader, state_dict["loader"])
        epoch, batches = state_dict["epoch"], self._batches_here(state_dict)
        if not self._follow(state_dict, batches, epoch) and not self._followed_in_old_format(state_dict):
            place = f"{batches} batches" if batches < PLACES else "the last batch"
            raise CheckpointError(
                f"The rows that follow after {place} of epoch {epoch} are not those that followed when the "
                "checkpoint was saved: the data, its preparation or its order changed. Restore it, or go on with other "
                "data by `ignore_data_skip=True`."
            )
        if run.random_rows:
            logger.warning(
                "The training rows are random (their generator is not in the checkpoint), so a resumed run cannot "
                "verify them."
            )
        run.resume = ResumePoint(epoch, batches // run.plan.accumulation, batches)
        fetches = loaders.fetches_of(run.loader)
        if fetches is not None and batches and batches == state_dict["batches_done"]:
            # A loader fetches ahead: the next batch was drawn before the checkpoint's own random state was taken.
            fetches.replay(batches, state_dict.get("next_fetch"), then=run.restore_rng_once)

    def _follow(self, saved: dict[str, Any], batches: int, epoch: int) -> bool:
        """Returns whether the rows that follow are those that followed when `saved` was, as far as both are known."""
        order, rows = self._next_rows(batches, epoch)
        before = saved["next_rows"]
        known = before is not None and rows is not None
        return not (known and rows != before) and order == saved.get("next_order", order)

    def _followed_in_old_format(self, saved: dict[str, Any]) -> bool:
        """Returns whether the rows are the same in a checkpoint that an earlier version wrote at the end of an epoch.

        Its hashes are of the rows behind the last batch that was done, not of those of the next epoch.
        """
        plan, epoch = self.run.plan, saved["epoch"] - 1
        if saved["batches_done"] or epoch < 0:
            return False
        if self._follow(saved, plan.batches_per_epoch, epoch):
            return True
        inside = plan.resume_at(self.run.initial_step).batches_done
        if not self._follow(saved, inside, epoch):
            return False
        logger.warning(
            "The checkpoint was saved after %s of %s batches of epoch %s, as the end of that epoch: the run goes on "
            "with epoch %s.",
            inside,
            plan.batches_per_epoch,
            epoch,
            epoch + 1,
        )
        return True

    def _next_rows(self, batches: int, epoch: int) -> tuple[str | None, str | None]:
        """Returns hashes of the indices and the contents of the rows that follow; contents None where they vary.

        Whether they do is found out once per run, by reading rows twice. Those that vary are not read again: that would
        draw from their generator.
        """
        run = self.run
        indices = loaders.following_rows(run.loader, batches, epoch)
        if indices is None:
            return None, None
        with self._rows_of(epoch):
            rows = None if run.random_rows else rows_digest(run.loader.dataset, indices)
            if run.random_rows is None:
                run.random_rows = rows_digest(run.loader.dataset, indices) != rows
        return digest(indices), None if run.random_rows else rows

    @contextlib.contextmanager
    def _rows_of(self, epoch: int) -> Iterator[None]:
        """Makes a dataset whose rows depend on the epoch give those of `epoch`, and afterwards those of the run's."""
        run = self.run
        tell = getattr(run.loader.dataset, "set_epoch", None)
        if not callable(tell) or not callable(getattr(run.loader, "set_epoch", None)):
            yield
            return
        tell(epoch)
        try:
            yield
        finally:
            tell(run.epoch)

    def load_state_dicts(self, states: list[dict[str, Any]]) -> None:
        """As `load_state_dict`, for another number of processes than before: the position is the same on all."""
        split_by_node = getattr(getattr(self.run.loader, "dataset", None), "_distributed", None) is not None
        if states[0]["loader"]["kind"] != "map" and split_by_node:
            raise CheckpointError(
                f"The stream was split by `split_dataset_by_node` over {len(states)} processes, each at its own "
                "position. Resume with as many, or start the stream anew with `ignore_data_skip=True`."
            )
        self.load_state_dict({**states[0], "next_fetch": None})

    def _batches_here(self, saved: dict[str, Any]) -> int:
        """Returns the saved position in micro-batches of this run's size."""
        before, here = saved["rows_per_batch"], loaders.rows_per_batch(self.run.loader)
        batches, accumulation = saved["batches_done"], self.run.plan.accumulation
        if before is None or here is None or (before, saved["accumulation"]) == (here, accumulation):
            return batches
        if before * saved["accumulation"] != here * accumulation:
            raise CheckpointError(
                f"The checkpoint was trained with {before * saved['accumulation']} rows per optimizer step, this run "
                f"has {here * accumulation}. Change `per_device_train_batch_size` or `gradient_accumulation_steps` so "
                "that micro-batch x accumulation x processes is the same, or pass `ignore_data_skip=True`."
            )
        logger.warning(
            "Continuing with %s rows x %s accumulation instead of %s x %s: the same rows per optimizer step.",
            here,
            accumulation,
            before,
            saved["accumulation"],
        )
        return -(-batches * before // here)  # only the last update of an epoch can have fewer rows


def describe_batch(loader: Any, place: int, process: int) -> str:
    """Returns which micro-batch is at `place` and which rows of the dataset it has; `process` -1 for this one."""
    epoch, number = divmod(place, PLACES)
    rows = loaders.batch_rows(loader, number, epoch, process_index=None if process < 0 else process)
    whose = "" if process < 0 else f" of process {process}"
    known = "rows unknown: the data has no fixed order" if rows is None else f"rows {rows} of the training data"
    return f"micro-batch {number}{whose} of epoch {epoch} ({known})"
