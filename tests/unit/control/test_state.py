import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from finetune.control.state import ExportableState, TrainerControl, TrainerState, export_states, is_exportable
from finetune.errors import CheckpointError


class Counter(ExportableState):
    def __init__(self, start: int = 0) -> None:
        self.start = start
        self.seen = start

    def state(self):
        return {"args": {"start": self.start}, "attributes": {"seen": self.seen}}


def test_two_callbacks_of_one_class_keep_two_entries_at_every_checkpoint():
    first, second, control = Counter(1), Counter(2), TrainerControl()
    state = TrainerState(stateful_callbacks=[first, second, control])
    for step in range(4):
        first.seen, second.seen = step, 10 * step
        state.update_stateful_callbacks([first, second, control])
        assert [entry["attributes"]["seen"] for entry in state.stateful_callbacks["Counter"]] == [step, 10 * step]
    assert state.stateful_callbacks["TrainerControl"] == control.state()


def test_states_of_absent_classes_are_kept():
    state = TrainerState(stateful_callbacks={"Gone": {"args": {}, "attributes": {}}})
    state.update_stateful_callbacks([Counter()])
    assert set(state.stateful_callbacks) == {"Gone", "Counter"}


def test_from_state_is_the_inverse_of_state():
    counter = Counter(3)
    counter.seen = 9
    again = Counter.from_state(json.loads(json.dumps(counter.state())))
    assert (again.start, again.seen) == (3, 9)
    control = TrainerControl(should_save=True)
    assert TrainerControl.from_state(control.state()) == control


def test_only_exportable_objects_are_taken():
    assert is_exportable(Counter()) and not is_exportable(object())
    assert export_states([object(), Counter()]) == {"Counter": Counter().state()}
    with pytest.raises(TypeError, match="`ExportableState`, not `object`"):
        TrainerState(stateful_callbacks=[object()])
    with pytest.raises(NotImplementedError, match="must implement `state"):
        ExportableState().state()


def test_round_trip_through_the_file(tmp_path):
    state = TrainerState(epoch=0.5, global_step=3, log_history=[{"loss": 0.25, "step": 3}], best_metric=0.1)
    state.trial_params = {"learning_rate": 1e-3}
    state.save_to_json(tmp_path / "trainer_state.json")
    assert TrainerState.load_from_json(tmp_path / "trainer_state.json") == state


def test_numpy_and_tensor_scalars_become_numbers(tmp_path):
    logs = {"a": np.float32(0.5), "b": np.int64(3), "c": torch.tensor(2.5)}
    TrainerState(log_history=[logs]).save_to_json(tmp_path / "s.json")
    assert TrainerState.load_from_json(tmp_path / "s.json").log_history == [{"a": 0.5, "b": 3, "c": 2.5}]


def test_arrays_become_lists(tmp_path):
    """A confusion matrix among the metrics must not end a run at its first checkpoint."""
    logs = {"matrix": np.eye(2, dtype=int), "per_class": torch.tensor([0.5, 0.25]), "one": np.array([3])}
    TrainerState(log_history=[logs]).save_to_json(tmp_path / "s.json")
    expected = [{"matrix": [[1, 0], [0, 1]], "per_class": [0.5, 0.25], "one": 3}]
    assert TrainerState.load_from_json(tmp_path / "s.json").log_history == expected


def test_what_is_not_json_is_refused_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "s.json"
    TrainerState(global_step=1).save_to_json(path)
    with pytest.raises(TypeError, match="`object` cannot be written"):
        TrainerState(log_history=[{"a": object()}]).save_to_json(path)
    assert TrainerState.load_from_json(path).global_step == 1


@pytest.mark.parametrize("content", ["{", "[1]", ""])
def test_damaged_file_is_one_clear_error(tmp_path, content):
    path = tmp_path / "trainer_state.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match="resume_from_checkpoint"):
        TrainerState.load_from_json(path)


def test_missing_file_is_one_clear_error(tmp_path):
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        TrainerState.load_from_json(tmp_path / "trainer_state.json")


def test_fields_of_a_later_version_are_named(tmp_path, caplog):
    path = tmp_path / "trainer_state.json"
    path.write_text(json.dumps({"global_step": 4, "from_the_future": 1}))
    assert TrainerState.load_from_json(path).global_step == 4
    assert "from_the_future" in caplog.text


def test_shares_of_the_run_become_steps():
    state = TrainerState()
    state.compute_steps(SimpleNamespace(logging_steps=0.1, eval_steps=None, save_steps=7), max_steps=25)
    assert (state.logging_steps, state.eval_steps, state.save_steps) == (3, 500, 7)


@pytest.mark.parametrize("trial", [{"lr": 1.0}, SimpleNamespace(params={"lr": 1.0})])
def test_training_references(trial):
    trainer = SimpleNamespace(
        hp_name=lambda trial: f"trial-{trial}",
        _trial=7,
        is_local_process_zero=lambda: True,
        is_world_process_zero=lambda: False,
    )
    state = TrainerState()
    state.init_training_references(trainer, 10, 2, trial)
    assert (state.trial_name, state.trial_params, state.max_steps, state.num_train_epochs) == (
        "trial-7",
        {"lr": 1.0},
        10,
        2,
    )
    assert state.is_local_process_zero and not state.is_world_process_zero


def test_control_resets():
    control = TrainerControl(*[True] * 5)
    control._new_step()
    assert dataclasses.astuple(control) == (True, True, False, False, False)
    control._new_epoch()
    control._new_training()
    assert dataclasses.astuple(control) == (False,) * 5
