"""Joining nested outputs of different lengths."""

import numpy as np
import torch

from finetune.engine import gather


def test_batch_size_of_nested_inputs() -> None:
    assert gather.find_batch_size({"a": ["x"], "b": {"c": torch.zeros(3, 2)}}) == 3
    assert gather.find_batch_size([np.zeros((4, 1))]) == 4
    assert gather.find_batch_size({"a": torch.tensor(1.0)}) is None


def test_concatenate_pads_the_second_dimension() -> None:
    joined = gather.concatenate(torch.ones(1, 2, dtype=torch.long), torch.ones(2, 3, dtype=torch.long))
    assert joined.tolist() == [[1, 1, -100], [1, 1, 1], [1, 1, 1]]
    arrays = gather.concatenate(np.ones((1, 3, 2)), np.ones((1, 1, 2)))
    assert arrays.shape == (2, 3, 2)
    assert arrays[1, 1:].tolist() == [[-100, -100], [-100, -100]]


def test_collected_joins_many_uneven_batches_in_order() -> None:
    kept = gather.Collected(concat=True)
    lengths = [2, 5, 3, 3, 1]
    for index, length in enumerate(lengths):
        kept.add((torch.full((1, length), index), {"score": torch.tensor([float(index)])}))
        if index == 2:
            kept.offload()
    ids, scores = kept.arrays()
    assert ids.shape == (5, 5)
    assert [row[row != -100].tolist() for row in ids] == [[i] * n for i, n in enumerate(lengths)]
    assert scores["score"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_collected_without_concatenation_keeps_batches() -> None:
    kept = gather.Collected(concat=False)
    kept.add(torch.zeros(2, 3))
    kept.add(torch.zeros(1, 4))
    assert [piece.shape for piece in kept.arrays()] == [(2, 3), (1, 4)]


def test_collected_nothing() -> None:
    assert gather.Collected(concat=True).arrays() is None


def test_bfloat16_reaches_numpy_as_float32() -> None:
    assert gather.to_numpy(torch.ones(2, dtype=torch.bfloat16)).dtype == np.float32


def test_pad_rows_repeats_the_last_one() -> None:
    padded = gather.pad_rows((torch.tensor([[1], [2]]), torch.tensor(3)), 4)
    assert padded[0].tolist() == [[1], [2], [2], [2]]
    assert padded[1] == 3
