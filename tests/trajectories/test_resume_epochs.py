"""Exact resume from checkpoints at the end of an epoch, and of epochs and runs that end before their time."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import finetune
from finetune.engine.position import DataPosition

spec = importlib.util.spec_from_file_location("resume_helpers", Path(__file__).with_name("test_resume.py"))
assert spec is not None and spec.loader is not None
helpers: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(helpers)

BY_EPOCH: dict[str, Any] = {"save_strategy": "epoch", "num_train_epochs": 3, "logging_steps": 1}
DROP_LAST: dict[str, Any] = {**BY_EPOCH, "dataloader_drop_last": True}
BALANCED: dict[str, Any] = {"train_sampling_strategy": "batch_rebalance"}


class Flow(finetune.TrainerCallback):
    """Sets fields of the control at the given events and steps: `{("on_step_end", 3): "should_epoch_stop"}`."""

    def __init__(self, wanted: dict[tuple[str, int], str]) -> None:
        self.wanted = wanted

    def _answer(self, event: str, step: int) -> dict[str, bool] | None:
        field = self.wanted.get((event, step))
        return None if field is None else {field: True}

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        return self._answer("on_substep_end", state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        return self._answer("on_step_end", state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        return self._answer("on_evaluate", state.global_step)


def saved_steps(out: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in out.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("rows", "epoch", "options"),
    [
        (8, 1, BY_EPOCH),
        (18, 2, BY_EPOCH),
        (18, 1, {**BY_EPOCH, "train_sampling_strategy": "sequential"}),
        (43, 1, DROP_LAST),
        (19, 2, DROP_LAST),
        (19, 1, {**DROP_LAST, **BALANCED}),
        (19, 1, {**DROP_LAST, "train_sampling_strategy": "group_by_length"}),
    ],
)
def test_trainer(
    rows: int, epoch: int, options: dict[str, Any], tiny_llama: Any, padded_dataset: Any, tmp_path: Path
) -> None:
    dataset = padded_dataset(rows)
    whole = helpers.build(tiny_llama, dataset, tmp_path / "whole", **options)
    whole.train()
    at = saved_steps(tmp_path / "whole")[epoch - 1]
    resumed = helpers.interrupted_and_resumed(tiny_llama, dataset, tmp_path / "cut", at, **options)
    helpers.assert_equal(helpers.everything(resumed), helpers.everything(whole))


@pytest.mark.parametrize("options", [BY_EPOCH, {**DROP_LAST, "gradient_accumulation_steps": 3}])
def test_packed_sft(options: dict[str, Any], tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    from datasets import Dataset

    rows = Dataset.from_list([{"text": f"the cat sat on a mat {'and saw the sun ' * (i % 4)}"} for i in range(25)])

    def build(out: Path, *callbacks: Any) -> finetune.SFTTrainer:
        return finetune.SFTTrainer(
            tiny_llama(vocab_size=512),
            finetune.SFTConfig(str(out), **{**helpers.COMMON, **options}, packing=True, max_length=40),
            train_dataset=rows,
            processing_class=chat_tokenizer,
            callbacks=list(callbacks),
        )

    whole = build(tmp_path / "whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "cut", helpers.Interrupt(saved_steps(tmp_path / "whole")[0])).train()
    torch.manual_seed(99)
    resumed = build(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    helpers.assert_equal(helpers.everything(resumed), helpers.everything(whole))


# ---- A callback ends an epoch ----

STOP_EARLY = {("on_step_end", 2): "should_epoch_stop", ("on_step_end", 9): "should_epoch_stop"}


@pytest.mark.parametrize(
    ("wanted", "at", "options"),
    [
        (STOP_EARLY, 2, BY_EPOCH),
        (STOP_EARLY, 9, BY_EPOCH),
        (STOP_EARLY, 2, DROP_LAST),
        (STOP_EARLY, 2, {**BY_EPOCH, "save_strategy": "steps"}),
        (STOP_EARLY, 9, {**DROP_LAST, "save_strategy": "steps"}),
        ({("on_substep_end", 2): "should_epoch_stop"}, 2, BY_EPOCH),
        ({("on_evaluate", 2): "should_epoch_stop"}, 2, {"eval_strategy": "steps", "eval_steps": 1}),
    ],
)
def test_an_epoch_that_a_callback_ended(
    wanted: Any, at: int, options: dict[str, Any], tiny_llama: Any, padded_dataset: Any, tmp_path: Path
) -> None:
    dataset = padded_dataset(19)

    def build(name: str, *callbacks: Any) -> finetune.Trainer:
        return helpers.build(tiny_llama, dataset, tmp_path / name, [Flow(wanted), *callbacks], **options)

    whole = build("whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        build("cut", helpers.Interrupt(at)).train()
    resumed = build("cut")
    resumed.train(resume_from_checkpoint=True)
    helpers.assert_equal(helpers.everything(resumed), helpers.everything(whole))


def test_a_step_checkpoint_before_the_evaluation_of_an_epoch(tiny_bert: Any, tmp_path: Path) -> None:
    """The evaluation draws from the global generator before the next epoch does."""
    from datasets import Dataset

    ids = torch.randint(5, 128, (16, 12), generator=torch.Generator().manual_seed(0)).tolist()
    dataset = Dataset.from_dict({"input_ids": ids, "labels": [i % 3 for i in range(16)]})
    options = {"eval_strategy": "epoch"}
    whole = helpers.build(tiny_bert, dataset, tmp_path / "whole", **options)
    whole.train()
    resumed = helpers.interrupted_and_resumed(tiny_bert, dataset, tmp_path / "cut", 4, **options)
    helpers.assert_equal(helpers.everything(resumed), helpers.everything(whole))


# ---- A run ends within an epoch ----


@pytest.mark.parametrize("wanted", [{}, {("on_step_end", 3): "should_training_stop"}])
def test_a_run_that_stopped_within_an_epoch_goes_on_there(
    wanted: Any, tiny_llama: Any, padded_dataset: Any, tmp_path: Path
) -> None:
    dataset, options = padded_dataset(18), {"save_strategy": "epoch", "lr_scheduler_type": "constant"}
    whole = helpers.build(tiny_llama, dataset, tmp_path / "whole", max_steps=8, **options)
    whole.train()
    first = {"max_steps": 8 if wanted else 3}
    helpers.build(tiny_llama, dataset, tmp_path / "cut", [Flow(wanted)], **options, **first).train()
    assert saved_steps(tmp_path / "cut") == [3]
    resumed = helpers.build(tiny_llama, dataset, tmp_path / "cut", max_steps=8, **options)
    resumed.train(resume_from_checkpoint=True)
    helpers.assert_equal(helpers.everything(resumed)["weights"], helpers.everything(whole)["weights"])


def test_a_window_that_was_given_up_is_done_again(tiny_llama: Any, padded_dataset: Any, tmp_path: Path) -> None:
    dataset, options = padded_dataset(18), {"save_strategy": "epoch", "lr_scheduler_type": "constant"}
    whole = helpers.build(tiny_llama, dataset, tmp_path / "whole", **options)
    whole.train()
    stop = Flow({("on_substep_end", 2): "should_training_stop"})
    helpers.build(tiny_llama, dataset, tmp_path / "cut", [stop], **options).train()
    assert saved_steps(tmp_path / "cut") == [2]
    resumed = helpers.build(tiny_llama, dataset, tmp_path / "cut", **options)
    resumed.train(resume_from_checkpoint=True)
    helpers.assert_equal(helpers.everything(resumed)["weights"], helpers.everything(whole)["weights"])


def test_an_emergency_checkpoint_does_the_broken_window_again(
    tiny_llama: Any, padded_dataset: Any, tmp_path: Path
) -> None:
    class Fails(finetune.TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                raise RuntimeError("broken")

    dataset, options = padded_dataset(18), {"save_strategy": "no", "save_on_exception": True}
    whole = helpers.build(tiny_llama, dataset, tmp_path / "whole", **options)
    whole.train()
    with pytest.raises(RuntimeError, match="broken"):
        helpers.build(tiny_llama, dataset, tmp_path / "cut", [Fails()], **options).train()
    resumed = helpers.build(tiny_llama, dataset, tmp_path / "cut", **options)
    resumed.train(resume_from_checkpoint=True)
    helpers.assert_equal(helpers.everything(resumed)["weights"], helpers.everything(whole)["weights"])


# ---- Rows that depend on the epoch ----


class ByEpoch(torch.utils.data.Dataset):
    """Rows that differ in each epoch, by `set_epoch`."""

    def __init__(self, rows: Any) -> None:
        self.rows, self.epoch = rows, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = dict(self.rows[i])
        row["input_ids"] = [(int(token) + self.epoch) % 100 for token in row["input_ids"]]
        return row


@pytest.mark.parametrize(("rows", "at"), [(18, 7), (18, 10), (40, 13)])
def test_rows_that_depend_on_the_epoch(
    rows: int, at: int, tiny_llama: Any, padded_dataset: Any, tmp_path: Path
) -> None:
    dataset, options = padded_dataset(rows), {"save_steps": 1, "num_train_epochs": 3}
    whole = helpers.build(tiny_llama, ByEpoch(dataset), tmp_path / "whole", **options)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        helpers.build(tiny_llama, ByEpoch(dataset), tmp_path / "cut", [helpers.Interrupt(at)], **options).train()
    resumed = helpers.build(tiny_llama, ByEpoch(dataset), tmp_path / "cut", **options)
    resumed.train(resume_from_checkpoint=True)
    helpers.assert_equal(helpers.everything(resumed), helpers.everything(whole))


# ---- Checkpoints written before the position of an ended epoch was noted as the start of the next one ----


def old_state_dict(position: DataPosition) -> dict[str, Any]:
    state, run = NEW_STATE_DICT(position), position.run
    order, rows = position._next_rows(run.batches_done, run.epoch)
    return {**state, "next_order": order, "next_rows": rows}


NEW_STATE_DICT = DataPosition.state_dict


@pytest.mark.parametrize(
    ("rows", "options", "wanted"),
    [(8, BY_EPOCH, {}), (43, DROP_LAST, {}), (19, BY_EPOCH, {("on_step_end", 2): "should_epoch_stop"})],
)
def test_old_checkpoints(
    rows: int,
    options: dict[str, Any],
    wanted: Any,
    tiny_llama: Any,
    padded_dataset: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dataset = padded_dataset(rows)
    whole = helpers.build(tiny_llama, dataset, tmp_path / "whole", [Flow(wanted)], **options)
    monkeypatch.setattr(DataPosition, "state_dict", old_state_dict)
    whole.train()
    monkeypatch.undo()
    checkpoint = tmp_path / "whole" / f"checkpoint-{saved_steps(tmp_path / 'whole')[0]}"
    resumed = helpers.build(tiny_llama, dataset, tmp_path / "cut", [Flow(wanted)], **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    helpers.assert_equal(helpers.everything(resumed)["weights"], helpers.everything(whole)["weights"])
    with pytest.raises(finetune.CheckpointError, match="are not those that followed"):
        changed = helpers.build(tiny_llama, padded_dataset(rows, seed=1), tmp_path / "changed", **options)
        changed.train(resume_from_checkpoint=str(checkpoint))
