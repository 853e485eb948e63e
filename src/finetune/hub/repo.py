"""What a trainer does with the Hub. Bound as methods: the first argument is the trainer.

Local files come first: a push reads a snapshot of the output folder made of hard links, so later saves, deletions and
failures of the network touch neither the run nor a push in progress.
"""

import functools
import logging
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

from finetune.checkpoint import layout
from finetune.errors import ArgumentError
from finetune.hub.snapshots import SNAPSHOT_PREFIX, checkpoint_upload, model_upload
from finetune.hub.uploads import PushQueue, RefusedError, Repository

logger = logging.getLogger(__name__)

_NO_SNAPSHOT = "Push to the Hub left out, its snapshot cannot be made: %s"


class HubOwner(Protocol):
    """What these functions use of a trainer."""

    args: Any
    state: Any
    control: Any
    model: Any
    callback_handler: Any
    hub_model_id: str | None

    def is_world_process_zero(self) -> bool: ...
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None: ...
    def create_model_card(self, *args: Any, **kwargs: Any) -> None: ...
    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None: ...
    def _finish_current_push(self) -> None: ...


def init_hf_repo(self: HubOwner, token: str | None = None, private: bool | None = None) -> None:
    """Creates the repository `hub_model_id` (or the output folder's name) if need be; sets `self.hub_model_id`.

    First process only. When the Hub cannot be reached the run goes on and each push tries again.

    Raises:
        ArgumentError: token or name are refused.
    """
    if not self.is_world_process_zero():
        return
    name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
    repository = Repository(
        name,
        token if token is not None else self.args.hub_token,
        private if private is not None else self.args.hub_private_repo,
    )
    self.hub_model_id = _create_early(repository)
    # The attribute's name is that of transformers; it exists from the first contact with the Hub on.
    trainer: Any = self
    trainer.push_in_progress = PushQueue(repository)
    for leftover in Path(self.args.output_dir).glob(f"{SNAPSHOT_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _create_early(repository: Repository) -> str | None:
    """Returns the repository's id, or None when the Hub cannot be reached now (the first push tries again).

    Raises:
        ArgumentError: the Hub answered that token or name are wrong, which no later attempt would change.
    """
    try:
        return repository.ensure()
    except RefusedError as error:
        raise ArgumentError(
            f"The Hub refuses the repository `{repository.name}`: {error}. Set `hub_model_id` to `owner/name` and "
            "`hub_token` to a token with write access (or run `hf auth login`), or set `push_to_hub=False`."
        ) from None
    except Exception as error:
        logger.warning(
            "The Hub cannot be reached (%s). Training goes on; each push will try to create `%s` again.",
            repository.reason(error),
            repository.name,
        )
        return None


def push_to_hub(
    self: HubOwner,
    commit_message: str | None = "End of training",
    blocking: bool = True,
    token: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    **kwargs: Any,
) -> "Any | Future[Any] | None":
    """Saves the model and uploads the output folder, without checkpoints; `kwargs` go to `create_model_card`.

    Call it on every process. Returns the `CommitInfo`, with `blocking=False` a future of it, and None on the other
    processes. A failed push is logged with the command that repeats it, and gives None.

    Raises:
        ArgumentError: token or name of the repository are refused.
    """
    self.callback_handler.on_push_begin(self.args, self.state, self.control)
    if self.is_world_process_zero() and _queue(self) is None:
        self.init_hf_repo(token=token, private=private)
    self.save_model(_internal_call=True)
    if not self.is_world_process_zero():
        return None
    if kwargs.get("model_name") is None:
        kwargs["model_name"] = (self.args.hub_model_id or Path(self.args.output_dir).absolute().name).split("/")[-1]
    model_tags = getattr(self.model, "model_tags", None)
    if model_tags:
        given = kwargs.get("tags") or []
        kwargs["tags"] = list(dict.fromkeys([*([given] if isinstance(given, str) else given), *model_tags]))
    self.create_model_card(**kwargs)
    self._finish_current_push()
    queue = _queue(self)
    assert queue is not None
    output_dir = Path(self.args.output_dir)
    revision = revision if revision is not None else self.args.hub_revision
    if token is not None:
        queue.repository.use_token(token)
    message = commit_message or "End of training"
    try:
        future = queue.submit(model_upload(queue.repository, output_dir, message, revision, link=blocking))
    except OSError as error:
        logger.error(_NO_SNAPSHOT, error)
        return None
    if not blocking:
        return future
    error = future.exception()
    self.hub_model_id = queue.repository.repo_id
    return None if error is not None else future.result()


def _push_from_checkpoint(self: HubOwner, checkpoint_folder: str) -> None:
    """Pushes the model of a finished checkpoint in the background, and the checkpoint itself if `hub_strategy` says so.

    Called after each checkpoint when `push_to_hub` is set. First process only. While the previous push is running
    this one is left out, unless `hub_always_push`.
    """
    if not self.is_world_process_zero() or self.args.hub_strategy == "end":
        return
    queue = _queue(self)
    if queue is None:
        self.init_hf_repo()
        queue = _queue(self)
        assert queue is not None
    if not self.args.hub_always_push and not queue.is_done():
        logger.info("The previous push is still running; `%s` is not pushed.", checkpoint_folder)
        return
    self.callback_handler.on_push_begin(self.args, self.state, self.control)
    if layout.holds_only_shards(Path(checkpoint_folder)):
        _warn_of_shards(self.args.output_dir)
    progress = (
        f"step {self.state.global_step}" if self.args.save_strategy != "epoch" else f"epoch {int(self.state.epoch)}"
    )
    message, revision = f"Training in progress, {progress}", self.args.hub_revision
    output_dir, checkpoint = Path(self.args.output_dir), Path(checkpoint_folder)
    repository = queue.repository
    try:
        queue.submit(model_upload(repository, output_dir, message, revision, checkpoint=checkpoint))
        if self.args.hub_strategy in ("checkpoint", "all_checkpoints"):
            where = "last-checkpoint" if self.args.hub_strategy == "checkpoint" else checkpoint.name
            queue.submit(checkpoint_upload(repository, output_dir, checkpoint, where, message, revision))
    except OSError as error:
        # A full disk, for instance. The checkpoint itself is complete, so training can go on.
        logger.error(_NO_SNAPSHOT, error)


def _finish_current_push(self: HubOwner) -> None:
    """Waits for pushes in progress, then says what on the Hub is not up to date. Called at the end of `train`."""
    queue = _queue(self)
    if queue is None:
        return
    if not queue.is_done():
        logger.info("Waiting for the push to the Hub to finish.")
        queue.wait_until_done()
    if queue.repository.repo_id is not None:
        self.hub_model_id = queue.repository.repo_id
    queue.report()


@functools.cache
def _warn_of_shards(output_dir: str) -> None:
    logger.warning(
        "The checkpoints in `%s` hold the model in shards, so the pushes during training have no weights that "
        "`from_pretrained` loads. Under FSDP call `push_to_hub()` after training or set `fsdp_state_dict_type: "
        "FULL_STATE_DICT`; under DeepSpeed turn `stage3_gather_16bit_weights_on_model_save` on.",
        output_dir,
    )


def _queue(trainer: Any) -> PushQueue | None:
    return getattr(trainer, "push_in_progress", None)
