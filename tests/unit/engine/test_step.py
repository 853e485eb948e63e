"""Counting, scaling and computing the loss of a micro-batch."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from finetune.engine import step
from finetune.engine.divisor import LossDivisor, at_least_one
from finetune.errors import ArgumentError


class WithLoss(nn.Module):
    """Returns sum(x * w) as loss, divided by `num_items_in_batch` when given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor, labels: Any = None, num_items_in_batch: Any = None) -> dict[str, torch.Tensor]:
        total = (x * self.weight).sum()
        return {"loss": total / num_items_in_batch if num_items_in_batch is not None else total, "logits": x}


LABELS = torch.tensor([[5, 6, -100], [-100, 7, 8]])


def test_a_causal_model_does_not_predict_the_first_token() -> None:
    assert step.count_items([{"labels": LABELS}], shifts_labels=True) == 3
    assert step.count_items([{"labels": LABELS}], shifts_labels=False) == 4


def test_counts_add_up_over_the_window() -> None:
    assert step.count_items([{"labels": LABELS}] * 3, shifts_labels=True) == 9


def test_shift_labels_are_taken_at_their_word() -> None:
    assert step.count_items([{"labels": LABELS, "shift_labels": LABELS[:, 1:]}], shifts_labels=True) == 3


@pytest.mark.parametrize("batches", [[], [{"x": LABELS}], [{"labels": [1, 2]}]])
def test_nothing_to_count(batches: Any) -> None:
    assert step.count_items(batches, shifts_labels=True) is None


def test_the_model_divides_by_the_items_it_is_told() -> None:
    loss, _ = step.forward_loss(
        WithLoss(), {"x": torch.ones(4)}, num_items_in_batch=torch.tensor(8), accepts_loss_kwargs=True
    )
    assert loss == 1.0


def test_a_model_without_loss_kwargs_is_not_told() -> None:
    loss, _ = step.forward_loss(WithLoss(), {"x": torch.ones(4)}, num_items_in_batch=8, accepts_loss_kwargs=False)
    assert loss == 8.0


def test_compute_loss_func_with_and_without_the_count() -> None:
    inputs = {"x": torch.ones(4), "labels": torch.tensor(3.0)}
    new, _ = step.forward_loss(
        WithLoss(),
        inputs,
        num_items_in_batch=2,
        accepts_loss_kwargs=True,
        compute_loss_func=lambda outputs, labels, num_items_in_batch=None: labels / num_items_in_batch,
    )
    old, _ = step.forward_loss(
        WithLoss(),
        inputs,
        num_items_in_batch=2,
        accepts_loss_kwargs=True,
        compute_loss_func=lambda outputs, labels: labels,
    )
    # The old one is a mean over its batch: one item of the two in the window.
    assert (new, old) == (1.5, 1.5)
    assert "labels" in inputs


def test_a_model_without_a_loss_is_an_error_that_names_the_columns() -> None:
    class Headless(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": x}

    with pytest.raises(ArgumentError, match=r"logits.*columns \['x'\].*labels"):
        step.forward_loss(Headless(), {"x": torch.ones(1)}, accepts_loss_kwargs=False)


def test_scaling_is_done_once() -> None:
    loss = torch.tensor(8.0)
    assert step.scale_loss(loss, already_scaled=True, accumulation=4) == 8.0
    assert step.scale_loss(loss, already_scaled=False, accumulation=4) == 2.0


def test_move_keeps_structure_and_casts_floats_only() -> None:
    data = {"ids": torch.tensor([1]), "nested": [torch.tensor([1.5]), "text"], "pair": (torch.tensor([1.0]), 3)}
    moved = step.move(data, torch.device("cpu"), torch.bfloat16)
    assert moved["ids"].dtype == torch.int64
    assert moved["nested"][0].dtype == torch.bfloat16
    assert moved["nested"][1] == "text"
    assert isinstance(moved["pair"], tuple)


def test_accepts_num_items() -> None:
    def new(model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> None: ...
    def old(model: Any, inputs: Any, return_outputs: bool = False) -> None: ...
    def loose(model: Any, inputs: Any, **kwargs: Any) -> None: ...

    assert [step.accepts_num_items(f) for f in (new, old, loose)] == [True, False, True]


@pytest.mark.parametrize("shift", [True, False])
def test_label_smoothing_equals_torch(shift: bool) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 7, dtype=torch.float32)
    labels = torch.randint(0, 7, (2, 5))
    labels[0, 1] = labels[1, 4] = -100
    got = step.LabelSmoother(0.1, shift_labels=shift)({"logits": logits}, labels)
    scores, targets = (logits[:, :-1], labels[:, 1:]) if shift else (logits, labels)
    expected = nn.functional.cross_entropy(scores.reshape(-1, 7), targets.reshape(-1), label_smoothing=0.1)
    assert torch.allclose(got, expected, atol=1e-6)


def test_a_new_schedule_free_optimizer_is_put_in_training_mode():
    """A model that is in training mode already says nothing about the optimizer, which is new."""
    asked = []
    optimizer = SimpleNamespace(train=lambda: asked.append("train"))
    model = nn.Linear(1, 1).train()
    step.enter_train_mode(model, optimizer)
    assert asked == ["train"]
    model.eval()
    step.enter_train_mode(model, torch.optim.SGD(model.parameters(), lr=1.0))
    assert model.training


def test_a_wrapper_around_a_model_in_evaluation_mode_trains_it() -> None:
    """`from_pretrained` returns models in evaluation mode; a wrapper says `training` all the same."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, **size)).eval()
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert wrapped.training and not model.model.layers[0].training
    step.enter_train_mode(wrapped, None)
    assert all(module.training for module in wrapped.modules())
    model.eval()
    step.enter_train_mode(nn.DataParallel(model), None)
    assert all(module.training for module in model.modules())


class Averages(nn.Module):
    """A model whose loss is the mean over its own labels: 0/0 where there are none."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 5)

    def forward(self, x: torch.Tensor, labels: Any = None, **kwargs: Any) -> dict[str, Any]:
        logits = self.head(x)
        return {"loss": None if labels is None else nn.functional.cross_entropy(logits, labels), "logits": logits}


def mean(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs["logits"], labels)


@pytest.mark.parametrize("items", [None, 7])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"divisor": LossDivisor()},
        {"compute_loss_func": mean},
        {"label_smoother": step.LabelSmoother(0.1, shift_labels=False)},
    ],
    ids=["mean", "divisor", "function", "smoothed"],
)
def test_the_loss_of_no_labels_is_0_and_has_no_gradient(options: dict[str, Any], items: int | None) -> None:
    model, told = Averages(), None if items is None else torch.tensor(items)
    for labels in ([-100, -100], [1, -100]):
        inputs = {"x": torch.ones(2, 3), "labels": torch.tensor(labels)}
        accepts = "divisor" in options
        loss, _ = step.forward_loss(model, inputs, num_items_in_batch=told, accepts_loss_kwargs=accepts, **options)
        model.zero_grad()
        loss.backward()
        assert model.head.weight.grad is not None
        empty = labels == [-100, -100]
        assert (loss.item() == 0.0) is empty and bool(model.head.weight.grad.any()) is not empty


def test_a_nan_of_labels_that_are_there_stays_one() -> None:
    inputs = {"x": torch.full((2, 3), float("nan")), "labels": torch.tensor([1, 2])}
    loss, _ = step.forward_loss(Averages(), inputs, accepts_loss_kwargs=False)
    assert loss.isnan()


def test_what_a_sum_is_divided_by() -> None:
    assert at_least_one(torch.tensor(0)) == 1 and at_least_one(torch.tensor(0)).dtype == torch.int64
    assert [float(at_least_one(count)) for count in (0, 3, torch.tensor(0.5))] == [1.0, 3.0, 0.5]
