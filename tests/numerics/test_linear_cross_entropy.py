"""The fused head and loss against full logits and autograd: values, gradients, every option, every dtype."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.errors import ArgumentError
from finetune.kernels.linear_cross_entropy import linear_cross_entropy, reference

T, D, V = 37, 12, 53

OPTIONS = {
    "plain": {},
    "scale": {"scale": 0.37},
    "softcap": {"softcap": 2.5},
    "scale and softcap": {"scale": 1.7, "softcap": 2.0},
    "smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 0.03},
    "dft": {"dft": True},
    "all but dft": {"scale": 1.3, "softcap": 3.0, "label_smoothing": 0.2, "z_loss": 0.01},
    "dft, softcap, z-loss": {"dft": True, "softcap": 3.0, "z_loss": 0.01, "scale": 0.8},
}


def inputs(dtype=torch.float64, bias=False, seed=0) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(seed)
    values = {
        "hidden": torch.randn(T, D, generator=make, dtype=torch.float64),
        "weight": torch.randn(V, D, generator=make, dtype=torch.float64),
    }
    if bias:
        values["bias"] = torch.randn(V, generator=make, dtype=torch.float64)
    values = {name: value.to(dtype).requires_grad_() for name, value in values.items()}
    labels = torch.randint(0, V, (T,), generator=make)
    labels[torch.rand(T, generator=make) < 0.6] = -100
    return {**values, "labels": labels}


def run(function, values: dict, upstream: float = 0.25, **options):
    leaves = {n: v.detach().clone().requires_grad_() for n, v in values.items() if n in ("hidden", "weight", "bias")}
    result = function(**{**values, **leaves}, **options)
    (result.loss * upstream).backward()
    return result, {name: leaf.grad for name, leaf in leaves.items()}


def assert_same(ours, theirs, tolerance: float) -> None:
    (result, grads), (expected, expected_grads) = ours, theirs
    for name in ("loss", "nll", "entropy"):
        torch.testing.assert_close(getattr(result, name), getattr(expected, name), rtol=tolerance, atol=tolerance)
    assert result.count.item() == expected.count.item() and result.correct.item() == expected.correct.item()
    assert grads.keys() == expected_grads.keys()
    for name in grads:
        torch.testing.assert_close(grads[name], expected_grads[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "bias", "chunk"), itertools.product(OPTIONS, [False, True], [None, 5]))
def test_float64_equals_the_definition(name: str, bias: bool, chunk) -> None:
    values = inputs(bias=bias)
    ours = run(linear_cross_entropy, values, chunk_tokens=chunk, **OPTIONS[name])
    assert_same(ours, run(reference, values, **OPTIONS[name]), 1e-11)


@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck(name: str) -> None:
    values = inputs(bias=True)
    labels = values.pop("labels")
    if OPTIONS[name].get("dft"):
        pytest.skip("the weight of DFT is held constant, which finite differences cannot know")

    def loss(hidden, weight, bias):
        return linear_cross_entropy(
            hidden, weight, labels, bias=bias, chunk_tokens=4, repeatable_backward=True, **OPTIONS[name]
        ).loss

    assert torch.autograd.gradcheck(loss, tuple(values.values()))


def test_token_weights() -> None:
    values = inputs()
    weights = torch.rand(T, dtype=torch.float64)
    ours = run(linear_cross_entropy, values, token_weights=weights, chunk_tokens=7, label_smoothing=0.1)
    assert_same(ours, run(reference, values, token_weights=weights, label_smoothing=0.1), 1e-11)
    assert ours[0].nll.item() == pytest.approx(run(reference, values)[0].nll.item())


def test_float32_agrees_with_torch_cross_entropy() -> None:
    values = inputs(torch.float32)
    ours, _ = run(linear_cross_entropy, values)
    logits = values["hidden"] @ values["weight"].T
    expected = torch.nn.functional.cross_entropy(logits, values["labels"], reduction="sum")
    torch.testing.assert_close(ours.loss, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["plain", "softcap", "scale"])
def test_autocast_and_low_precision_weights(dtype, name: str) -> None:
    exact = run(reference, inputs(bias=True), **OPTIONS[name])
    step = torch.finfo(dtype).eps
    for values, autocast in ((inputs(torch.float32, bias=True), True), (inputs(dtype, bias=True), False)):
        with torch.autocast("cpu", dtype, enabled=autocast):
            result, grads = run(linear_cross_entropy, values, chunk_tokens=6, **OPTIONS[name])
        assert result.loss.dtype == torch.float32
        assert all(grads[name].dtype == values[name].dtype for name in grads)
        torch.testing.assert_close(result.loss.double(), exact[0].loss, rtol=2 * step, atol=0)
        for name_, grad in grads.items():
            error = (grad.double() - exact[1][name_]).norm() / exact[1][name_].norm()
            assert error < 4 * step, (name_, error)


def test_autocast_decides_the_dtype_of_the_products() -> None:
    """float32 operands under bfloat16 autocast give what bfloat16 operands give, and not what float32 ones do."""
    values = inputs(torch.float32)
    whole = run(linear_cross_entropy, values)[0].loss
    with torch.autocast("cpu", torch.bfloat16):
        cast = run(linear_cross_entropy, values)[0].loss
    low = {**values, **{name: values[name].bfloat16() for name in ("hidden", "weight")}}
    assert torch.equal(cast, run(linear_cross_entropy, low)[0].loss)
    assert not torch.equal(cast, whole)


def test_fp16_does_not_flush_small_gradients() -> None:
    """A rival with probability 1e-8: its gradient is below fp16's smallest number unless it is lifted."""
    hidden = torch.ones((1, 1), dtype=torch.float16, requires_grad=True)
    weight = torch.tensor([[19.4], [1.0]], dtype=torch.float16)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0])).loss
    (loss * 1e6).backward()
    assert hidden.grad is not None and hidden.grad.item() == pytest.approx(1e6 * 1.02e-8, rel=0.02)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_fp16_does_not_overflow_in_the_heads_gradient(device: str) -> None:
    """The gradient of the head is (p - y) h, here 99 and, of 8 such tokens, 795: lifted, more than fp16 holds."""
    for tokens in (1, 8):
        grads = []
        for dtype in (torch.float16, torch.float64):
            hidden = torch.full((tokens, 1), 100.0, dtype=dtype, device=device, requires_grad=True)
            weight = torch.tensor([[0.0], [0.05]], device=device).half().to(dtype).requires_grad_()
            function = linear_cross_entropy if dtype == torch.float16 else reference
            function(hidden, weight, torch.zeros(tokens, dtype=torch.int64, device=device)).loss.backward()
            grads.append((hidden.grad, weight.grad))
        for ours, exact in zip(*grads, strict=True):
            torch.testing.assert_close(ours.double(), exact, rtol=2e-3, atol=0)


def test_fp16_does_not_flush_small_gradients_of_the_head() -> None:
    """As above for the weights of the rival, where the small gradient is multiplied by a small hidden state."""
    hidden = torch.tensor([[19.4, 0.01]], dtype=torch.float16)
    weight = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float16, requires_grad=True)
    (linear_cross_entropy(hidden, weight, torch.tensor([0])).loss * 1e6).backward()
    exact = weight.detach().double().requires_grad_()
    (reference(hidden.double(), exact, torch.tensor([0])).loss * 1e6).backward()
    assert weight.grad is not None and exact.grad is not None
    torch.testing.assert_close(weight.grad[1].double(), exact.grad[1], rtol=0.02, atol=0)


def test_result_does_not_depend_on_the_chunk() -> None:
    values = inputs(torch.float32)
    losses = [run(linear_cross_entropy, values, chunk_tokens=c)[0].loss for c in (1, 3, 64)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(losses[0], losses[2], rtol=1e-6, atol=0)
    again = run(linear_cross_entropy, values, chunk_tokens=3)
    first = run(linear_cross_entropy, values, chunk_tokens=3)
    assert torch.equal(again[0].loss, first[0].loss) and torch.equal(again[1]["weight"], first[1]["weight"])


def test_batched_shape_and_given_positions() -> None:
    values = inputs()
    flat = run(linear_cross_entropy, values)
    hidden = values["hidden"].detach()[:36].view(4, 9, D)
    labels = values["labels"][:36].view(4, 9)
    kept = labels.flatten().ne(-100).nonzero().squeeze(1)
    by_mask = linear_cross_entropy(hidden, values["weight"], labels)
    by_position = linear_cross_entropy(hidden, values["weight"], labels, positions=kept)
    assert torch.equal(by_mask.loss, by_position.loss)
    assert by_mask.count.item() == labels.ne(-100).sum().item() <= flat[0].count.item()


def test_tied_weight_gets_both_gradients() -> None:
    table = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, V, (T,))
    labels = ids.roll(-1)

    def loss(function):
        hidden = torch.tanh(torch.nn.functional.embedding(ids, table))
        return torch.autograd.grad(function(hidden, table, labels).loss, table)[0]

    torch.testing.assert_close(loss(linear_cross_entropy), loss(reference), rtol=1e-11, atol=1e-11)


def test_frozen_inputs_cost_nothing() -> None:
    values = inputs()
    hidden, weight = values["hidden"], values["weight"].detach()
    linear_cross_entropy(hidden, weight, values["labels"]).loss.backward()
    assert hidden.grad is not None and weight.grad is None
    with torch.no_grad():
        result = linear_cross_entropy(hidden, weight, values["labels"])
    assert not result.loss.requires_grad
    torch.testing.assert_close(result.loss, reference(hidden, weight, values["labels"]).loss.detach())


def test_no_supervised_token_is_a_differentiable_zero() -> None:
    values = inputs()
    values["labels"] = torch.full_like(values["labels"], -100)
    result, grads = run(linear_cross_entropy, values)
    assert result.loss.item() == 0 and result.count.item() == 0
    assert all(grad is not None and not grad.any() for grad in grads.values())


def test_second_backward_is_refused_not_wrong() -> None:
    values = inputs()
    loss = linear_cross_entropy(values["hidden"], values["weight"], values["labels"]).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="repeatable_backward"):
        loss.backward()


class LargestAllocation(TorchDispatchMode):
    """Notes the largest tensor, in elements, that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, Tensor):
                self.largest = max(self.largest, each.numel())
        return out


def test_tokens_times_vocabulary_never_exists() -> None:
    tokens, chunk, vocabulary = 400, 16, 1000
    hidden = torch.randn(tokens, D, requires_grad=True)
    weight = torch.randn(vocabulary, D, requires_grad=True)
    labels = torch.randint(0, vocabulary, (tokens,))
    with LargestAllocation() as mode:
        linear_cross_entropy(hidden, weight, labels, chunk_tokens=chunk, softcap=5.0).loss.backward()
    assert mode.largest <= chunk * vocabulary < tokens * vocabulary
    with LargestAllocation() as plain:
        reference(hidden, weight, labels).loss.backward()
    assert plain.largest >= tokens * vocabulary


def test_wrong_arguments() -> None:
    values = inputs()
    for change, match in (
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "one label per position"),
        ({"weight": torch.zeros(V, D + 1)}, "gathered"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"dft": True, "label_smoothing": 0.1}, "Use one of the two"),
        ({"softcap": 0.0}, "softcap"),
    ):
        with pytest.raises(ArgumentError, match=match):
            linear_cross_entropy(**{**values, **change})  # pyright: ignore
