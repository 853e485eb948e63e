from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from finetune.data.preparation.labels import (
    StopTokens,
    build_labels,
    count_supervised,
    count_supervised_in,
    label_batch,
    truncate,
)
from finetune.data.preparation.tokenize import (
    NOTHING_BEFORE_TRUNCATION,
    NOTHING_TRAINED,
    STOP_EXPECTED,
    STOP_TRAINED,
    TRUNCATED,
    TokenBatch,
)


def batch(*rows: list[int], **masks: Any) -> TokenBatch:
    ids = np.array([token for row in rows for token in row], np.int32)
    flat = {key: np.array(value, bool) for key, value in masks.items()}
    return TokenBatch(ids, np.cumsum([0] + [len(row) for row in rows]), **flat)


class Decoder:
    def decode(self, ids: list[int]) -> str:
        return " " if ids[0] == 9 else "word"


STOPS = StopTokens(Decoder(), {2})


def label(tokens: TokenBatch, max_length: int | None = None, mode: Any = "keep_start", expects: Any = True) -> Any:
    return label_batch(
        tokens,
        completion_only=True,
        max_length=max_length,
        truncation_mode=mode,
        stop_tokens=STOPS,
        expects_stop=expects,
    )


def test_the_worked_example() -> None:
    tokens = [5, 6, 7, 8, 2]
    made = label(batch(tokens, completion_mask=[0, 0, 0, 1, 1]))
    assert made.tokens.labels.tolist() == [-100, -100, -100, 8, 2]
    assert made.supervised.tolist() == [2]
    start = label(batch(tokens, completion_mask=[0, 0, 0, 1, 1]), 3)
    assert start.tokens.ids.tolist() == [5, 6, 7]
    assert start.tokens.flags[0] == TRUNCATED | STOP_EXPECTED | NOTHING_TRAINED
    assert (start.source_lengths.tolist(), start.supervised.tolist()) == ([5], [0])
    end = label(batch(tokens, completion_mask=[0, 0, 0, 1, 1]), 3, "keep_end")
    assert end.tokens.ids.tolist() == [7, 8, 2]
    assert end.tokens.labels.tolist() == [-100, 8, 2]
    assert end.tokens.flags[0] == TRUNCATED | STOP_EXPECTED | STOP_TRAINED


def test_masks_are_combined() -> None:
    tokens = batch([3, 4, 5, 6], completion_mask=[0, 0, 1, 1], assistant_mask=[0, 1, 1, 0])
    assert build_labels(tokens, completion_only=True).tolist() == [-100, -100, 5, -100]
    assert build_labels(tokens, completion_only=False).tolist() == [-100, 4, 5, -100]
    assert build_labels(batch([3, 4]), completion_only=True).tolist() == [3, 4]
    given = batch([3, 4], completion_mask=[0, 0])
    given.labels = np.array([-100, 7], np.int32)
    assert build_labels(given, completion_only=True).tolist() == [-100, 7]


def test_the_first_position_never_counts() -> None:
    made = label(batch([2], [3, 2], [], [4]))
    assert made.supervised.tolist() == [0, 1, 0, 0]
    nothing = (made.tokens.flags & NOTHING_TRAINED) != 0
    assert nothing.tolist() == [True, False, True, True]
    assert (((made.tokens.flags & NOTHING_BEFORE_TRUNCATION) != 0) == nothing).all()


def test_counts_are_those_of_the_loss() -> None:
    """The numbers the trainer divides by: labels that are not ignored, from position 1 on."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(0, 7, 50)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    labels = np.where(generator.random(offsets[-1]) < 0.4, -100, generator.integers(0, 9, offsets[-1])).astype(np.int32)
    counts = count_supervised(labels, offsets)
    for i in range(50):
        assert counts[i] == (labels[offsets[i] : offsets[i + 1]][1:] != -100).sum()


@pytest.mark.parametrize(
    ("row", "mask", "trained"),
    [
        ([5, 2], [1, 1], True),
        ([5, 2, 9, 9], [1, 1, 1, 1], True),
        ([5, 2, 6], [1, 1, 1], False),
        ([5, 2, 6], [1, 1, 0], True),
        ([5, 2], [1, 0], False),
        ([9, 9], [1, 1], False),
        ([2, 9], [0, 1], False),
        ([5, 6], [0, 0], False),
    ],
)
def test_the_last_trained_token_must_be_a_stop(row: list[int], mask: list[int], trained: bool) -> None:
    # Neighbours with the opposite answer: a row must not look into the one before.
    other = [3, 2] if not trained else [3, 4]
    made = label(batch(other, row, other, completion_mask=[1, 1, *mask, 1, 1]))
    assert bool(made.tokens.flags[1] & STOP_TRAINED) == trained
    assert bool(made.tokens.flags[0] & STOP_TRAINED) != trained


def test_rows_say_themselves_whether_they_should_stop() -> None:
    made = label(batch([5, 2], [5, 2]), expects=np.array([True, False]))
    assert ((made.tokens.flags & STOP_EXPECTED) != 0).tolist() == [True, False]


def test_short_rows_are_not_touched() -> None:
    tokens = batch([1, 2, 3], [4])
    assert truncate(tokens, 3, "keep_end") is tokens
    assert not tokens.flags.any()


def test_the_first_label_of_each_packed_sample_is_in_no_loss() -> None:
    labels = [[7, 8, 9], [-100, 8, 7, 6], [-100, -100], [5]]
    table = pa.table({"labels": labels})
    assert count_supervised_in(table).tolist() == [2, 3, 0, 0]
    packed = table.append_column("seq_lengths", pa.array([[1, 2], [2, 1, 1], [1, 1], [1]]))
    assert count_supervised_in(packed).tolist() == [1, 1, 0, 0]
    assert count_supervised_in(packed.slice(1, 2)).tolist() == [1, 0], "offsets of a slice do not start at 0"
