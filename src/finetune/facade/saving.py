"""Mixin of `Trainer`: checkpoints, weights, and the Hub."""

import contextlib
import gc
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from finetune.checkpoint import manager as checkpoints
from finetune.engine.position import DataPosition
from finetune.engine.run import OwedEvaluation
from finetune.errors import CheckpointError, NonFiniteLossError
from finetune.facade.base import TrainerBase
from finetune.hub import card, repo


class SavingMethods(TrainerBase):
    """Checkpoints and the Hub. Use `Trainer`."""

    init_hf_repo = repo.init_hf_repo
    push_to_hub = repo.push_to_hub
    create_model_card = card.create_model_card
    _push_from_checkpoint = repo._push_from_checkpoint
    _finish_current_push = repo._finish_current_push

    def _get_output_dir(self, trial: Any = None) -> str:
        """Returns the folder that checkpoints go to: `output_dir`, or that of a search trial below it."""
        if trial is None or self.hp_search_backend is None:
            return self.output_dir
        name = self.hp_name(trial) if self.hp_name is not None else f"run-{trial.number}"
        return os.path.join(self.output_dir, name)

    def _stateful(self) -> dict[str, Any]:
        """Returns what else of this run belongs into a checkpoint, by name. Subclasses add to it."""
        run = self._run
        if run is None:
            return {}
        return {"meter": run.meter, "data": DataPosition(run), "evaluation": OwedEvaluation(run)}

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> Any:
        """Saves `checkpoint-<step>` completely or not at all. Called when `control.should_save` is set.

        Returns the `SaveReport`, whose `error` says why it failed where `on_save_failure` is `continue`.
        """
        if self._run is not None:
            self._run.meter.require_finite(self.accelerator, self.state.global_step)
        self.store_flos()
        self.store_tokens()
        self._writer.asynchronous = checkpoints.saves_in_background(self)
        report = checkpoints.save_checkpoint(
            self,
            run_dir=self._get_output_dir(trial),
            args=self.args,
            events=self._events,
            model=self.model,
            optimizer=self.optimizer,
            writer=self._writer,
            stateful=self._stateful(),
            steady=checkpoints.changes_in_step(self),
        )
        if self.args.push_to_hub:
            self._writer.wait()
            if report.error is None:
                self._push_from_checkpoint(str(report.path))
        return report

    @property
    def _save_error(self) -> str | None:
        """Why the checkpoint of this step could not be written, as far as is known; None if it was, or is being."""
        last = self._writer.last
        return None if last is None or last.step != self.state.global_step else last.error

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model so that `from_pretrained` loads it. Called for every checkpoint, and by the user."""
        checkpoints.save_model(
            self._save,
            output_dir or self.output_dir,
            accelerator=self.accelerator,
            model=self.model,
            model_wrapped=self.model_wrapped,
            # `push_to_hub` makes an internal call too, for whole weights in the output folder.
            for_checkpoint=_internal_call and output_dir is not None,
        )
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Writes weights, tokenizer and arguments. Called by `save_model`, with gathered weights when sharded."""
        checkpoints.write_model(
            output_dir or self.output_dir,
            state_dict,
            model=self.model,
            args=self.args,
            processing_class=self.processing_class,
            data_collator=self.data_collator,
            writer=self._writer,
        )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        checkpoints.save_optimizer_and_scheduler(
            output_dir,
            accelerator=self.accelerator,
            args=self.args,
            model=self.model,
            model_wrapped=self.model_wrapped,
            optimizer=self.optimizer,
            lr_scheduler=self.lr_scheduler,
            writer=self._writer,
        )

    def _save_scaler(self, output_dir: str) -> None:
        checkpoints.save_scaler(output_dir, accelerator=self.accelerator, args=self.args, writer=self._writer)

    def _save_rng_state(self, output_dir: str) -> None:
        checkpoints.save_rng_state(output_dir, self.args)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Loads the weights of a checkpoint: before the model is wrapped, after it under FSDP and DeepSpeed."""
        checkpoints.load_model(
            resume_from_checkpoint,
            accelerator=self.accelerator,
            model=self.model if model is None else model,
            model_wrapped=self.model_wrapped,
        )

    def _load_best_model(self) -> None:
        """Loads the best checkpoint's weights. Called at the end of `train` with `load_best_model_at_end`."""
        self._writer.wait()  # it may be the one being written
        checkpoints.load_best_model(
            self.state, accelerator=self.accelerator, model=self.model, model_wrapped=self.model_wrapped
        )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        checkpoints.load_optimizer_and_scheduler(
            checkpoint,
            accelerator=self.accelerator,
            model=self.model,
            optimizer=self.optimizer,
            lr_scheduler=self.lr_scheduler,
        )

    def _load_scaler(self, checkpoint: str | None) -> None:
        checkpoints.load_scaler(checkpoint, accelerator=self.accelerator)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        checkpoints.load_rng_state(checkpoint, self.args)

    def _load_callback_state(self) -> None:
        if self.args.restore_callback_states_from_checkpoint:
            self._events.restore()

    def end(self) -> None:
        """Finishes trackers and background work and leaves the process group. Call it last, on every process.

        The wrapped model goes first: if DDP held the last reference to the process group, the interpreter could wait
        for a thread that waits for the interpreter.
        """
        self._writer.wait()
        self._finish_current_push()
        self._run, self.model_wrapped = None, self.model
        self._eval_loaders.clear()
        self.accelerator.free_memory()
        gc.collect()
        self.accelerator.end_training()

    @contextlib.contextmanager
    def _settling_checkpoints(self, trial: Any) -> Iterator[None]:
        """Waits for the last write at the end of the block. An error, but in a search, saves and says what there is."""
        if trial is not None:
            with self._writer.finishing():
                yield
            return
        reporting = checkpoints.report_last_on_error(self._get_output_dir(trial), self._writer)
        with reporting, self._saving_on_exception(trial):
            yield

    @contextlib.contextmanager
    def _saving_on_exception(self, trial: Any) -> Iterator[None]:
        """Context manager: an error saves a checkpoint (`save_on_exception`) before it goes on to the caller."""
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            unsafe = isinstance(error, (NonFiniteLossError, CheckpointError)) or self._run is None
            if self.args.save_on_exception and not unsafe:
                consistent = self._run is not None and not self._run.stepping
                checkpoints.emergency_save(partial(self._save_now, trial), error, consistent=consistent)
            raise

    def _save_now(self, trial: Any) -> str | None:
        """Saves a checkpoint and waits until it is on the disk. Returns why it failed, None if it did not."""
        self._save_checkpoint(self.model, trial)
        self._writer.wait()
        return self._save_error

    def _starting_batch_size(self, checkpoint: str | None) -> int:
        """Returns the batch size `auto_find_batch_size` begins with: the one it had found before the checkpoint."""
        found = checkpoints.load_state(checkpoint, self.args).train_batch_size if checkpoint else None
        return found or self._train_batch_size
