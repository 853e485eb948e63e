"""The arithmetic of epochs, updates and resuming."""

import pytest

from finetune.engine.plan import ResumePoint, StepPlan
from finetune.errors import ArgumentError


def make(num_batches: int | None = 10, **changes: object) -> StepPlan:
    values = {
        "num_batches": num_batches,
        "num_examples": 20,
        "accumulation": 4,
        "num_train_epochs": 2.0,
        "max_steps": -1,
        "total_batch_size": 8,
    }
    return StepPlan.resolve(**{**values, **changes})  # type: ignore[arg-type]


def test_the_last_window_of_an_epoch_is_shorter() -> None:
    plan = make()
    assert [plan.batches_in_update(u) for u in range(plan.updates_per_epoch)] == [4, 4, 2]
    assert plan.max_steps == 6


def test_whole_windows() -> None:
    plan = make(num_batches=8)
    assert [plan.batches_in_update(u) for u in range(plan.updates_per_epoch)] == [4, 4]


def test_fewer_batches_than_a_window() -> None:
    plan = make(num_batches=3)
    assert (plan.updates_per_epoch, plan.batches_in_update(0)) == (1, 3)


def test_fractional_epochs_stop_in_the_middle() -> None:
    plan = make(num_train_epochs=1.5)
    assert (plan.num_train_epochs, plan.max_steps, plan.num_train_samples) == (2, 5, 30.0)


def test_max_steps_beats_epochs() -> None:
    plan = make(max_steps=7)
    assert (plan.num_train_epochs, plan.max_steps, plan.num_train_samples) == (3, 7, 56)


def test_no_steps_are_no_steps() -> None:
    """Neither all epochs, as if the argument were unset, nor one step, as in transformers."""
    plan = make(max_steps=0)
    assert (plan.num_train_epochs, plan.max_steps, plan.num_train_samples) == (0, 0, 0)


@pytest.mark.parametrize("rows", [0, 7])
def test_data_without_a_batch_is_an_error_that_says_so(rows: int) -> None:
    with pytest.raises(ArgumentError, match=rf"has {rows} rows and gives no batch.*dataloader_drop_last"):
        make(num_batches=0, num_examples=rows, max_steps=5)


def test_a_stream_is_one_endless_epoch() -> None:
    plan = make(num_batches=None, max_steps=5)
    assert (plan.updates_per_epoch, plan.batches_per_epoch, plan.num_examples) == (5, 20, 40)


def test_a_stream_without_max_steps_is_an_error() -> None:
    with pytest.raises(ArgumentError, match="max_steps"):
        make(num_batches=None)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, ResumePoint()),
        (2, ResumePoint(0, 2, 8)),
        (3, ResumePoint(1)),
        (5, ResumePoint(1, 2, 8)),
        (6, ResumePoint(2)),
    ],
)
def test_resume_point(step: int, expected: ResumePoint) -> None:
    assert make().resume_at(step) == expected


def test_ignoring_the_data_position_starts_the_epoch_again() -> None:
    assert make().resume_at(5, skip_data=False) == ResumePoint(1, 0, 0)
