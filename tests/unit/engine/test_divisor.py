"""Who divides is found out by tracing the count, or, for sharded models, by comparing two losses."""

import pytest
import torch
from torch import nn

from finetune.engine.divisor import DivisionCheck, LossDivisor


@pytest.mark.parametrize("divides", [True, False])
def test_a_sharded_model_is_told_from_two_losses_and_nothing_that_asks_for_a_gradient(divides: bool) -> None:
    """A dropout would make the two losses differ, if they did not start from one random state."""
    divisor, dropout, seen = LossDivisor(sharded=True), nn.Dropout(0.5), []
    weight = torch.ones(64, requires_grad=True)

    def loss_for(count: torch.Tensor) -> torch.Tensor:
        seen.append(count.requires_grad)
        total = dropout(weight).sum()
        return total / count if divides else total / 64

    before = torch.random.get_rng_state()
    count = torch.tensor(128)
    assert divisor.probe(count, loss_for) is count
    assert divisor.model_divides is divides
    assert seen == [False, False] and torch.equal(before, torch.random.get_rng_state())
    loss = loss_for(count)
    corrected = divisor.correct(loss, count, count, lambda: 64)
    assert corrected.item() == pytest.approx(loss.item() if divides else loss.item() / 2)
    assert divisor.probe(count, loss_for) is count and len(seen) == 3


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_batch_without_labels_tells_nothing(value: float) -> None:
    divisor = LossDivisor(sharded=True)
    divisor.probe(torch.tensor(4), lambda count: torch.tensor(value))
    assert divisor.model_divides is None
    divisor.probe(torch.tensor(4), lambda count: 3.0 / count)
    assert divisor.model_divides is True


def test_one_process_traces_the_count() -> None:
    divisor = LossDivisor()
    passed = divisor.probe(torch.tensor(4), lambda count: pytest.fail("no second forward pass"))
    divisor.correct(torch.ones(1, requires_grad=True).sum() / passed, passed, torch.tensor(4), lambda: 4)
    assert divisor.model_divides is True


def test_an_override_of_a_sharded_model_gets_no_count_that_asks_for_a_gradient() -> None:
    count = torch.tensor(4)
    assert DivisionCheck(sharded=True).pass_on(count) is count
    assert DivisionCheck().pass_on(count).requires_grad
