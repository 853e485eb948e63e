import pytest
import torch

from finetune.optim.galore_basis import Basis, exact_basis, project, project_back, randomized_basis, side_of


def gradient(m, n, power, seed=0):
    """A matrix whose singular values fall like k ** -power."""
    g = torch.Generator().manual_seed(seed)
    k = min(m, n)
    left = torch.linalg.qr(torch.randn(m, k, generator=g)).Q
    right = torch.linalg.qr(torch.randn(n, k, generator=g)).Q
    return (left * torch.arange(1, k + 1).float() ** -power) @ right.T


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("shape", "proj_type", "side"),
    [
        ((8, 4), "std", "right"),
        ((4, 8), "std", "left"),
        ((4, 4), "std", "right"),
        ((8, 4), "reverse_std", "left"),
        ((4, 8), "reverse_std", "right"),
        ((8, 4), "left", "left"),
        ((8, 4), "full", "full"),
    ],
)
def test_side(shape, proj_type, side):
    assert side_of(torch.Size(shape), proj_type) == side


@pytest.mark.parametrize("side", ["left", "right", "full"])
@pytest.mark.parametrize("find", ["exact", "randomized"])
def test_bases_are_orthonormal_and_keep_what_lies_in_them(side, find):
    low_rank = gradient(20, 30, 0.5)[:, :5] @ torch.randn(5, 30, generator=generator())
    if find == "exact":
        basis, energy = exact_basis(low_rank, 5, side)
    else:
        basis, energy = randomized_basis(low_rank, 5, side, previous=None, generator=generator())
    torch.testing.assert_close(energy, torch.tensor(1.0), rtol=1e-4, atol=0)
    torch.testing.assert_close(project_back(project(low_rank, basis), basis), low_rank, rtol=1e-3, atol=1e-4)
    for q in (basis.left, None if basis.right is None else basis.right.T):
        if q is not None:
            torch.testing.assert_close(q.T @ q, torch.eye(5), rtol=0, atol=1e-5)
    shapes = {"left": (5, 30), "right": (20, 5), "full": (5, 5)}
    assert project(low_rank, basis).shape == shapes[side]


@pytest.mark.parametrize("power", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("shape", [(128, 512), (512, 128)])
def test_randomized_captures_nearly_the_optimal_energy_cold_and_warm(shape, power):
    rank = 16
    side = side_of(torch.Size(shape), "std")
    first = gradient(*shape, power)
    _, best = exact_basis(first, rank, side)
    basis, energy = randomized_basis(first, rank, side, previous=None, generator=generator())
    assert 0.99 * best <= energy <= best * (1 + 1e-5)
    captured = project(first, basis).square().sum() / first.square().sum()
    torch.testing.assert_close(captured, energy, rtol=1e-4, atol=0)

    later = 0.8 * first + 0.2 * gradient(*shape, power, seed=1)
    _, best = exact_basis(later, rank, side)
    _, warm = randomized_basis(later, rank, side, previous=basis, generator=generator(1))
    stale = project(later, basis).square().sum() / later.square().sum()
    assert warm >= 0.99 * best
    assert stale < warm


def test_the_same_generator_gives_the_same_basis():
    matrix = gradient(16, 24, 1.0)
    a, b = (randomized_basis(matrix, 4, "left", previous=None, generator=generator(5))[0] for _ in range(2))
    assert torch.equal(a.left, b.left)


def test_reduce_gives_the_basis_of_the_average():
    parts = [gradient(16, 24, 1.0, seed) for seed in (0, 1)]

    calls = []

    def average(product):
        calls.append(product.shape)
        return product

    matrix = (parts[0] + parts[1]) / 2
    a, _ = randomized_basis(matrix, 4, "left", previous=None, generator=generator(), reduce=average)
    b, _ = randomized_basis(matrix, 4, "left", previous=None, generator=generator())
    assert torch.equal(a.left, b.left)
    # Every product with the gradient is low-rank: nothing of size (m, n) is ever exchanged.
    assert max(s.numel() for s in calls) <= 24 * 16


def test_rank_above_the_matrix_is_the_whole_space():
    matrix = gradient(4, 6, 1.0)
    for basis in (
        exact_basis(matrix, 9, "left")[0],
        randomized_basis(matrix, 9, "left", previous=None, generator=generator())[0],
    ):
        assert basis.left.shape == (4, 4)
        torch.testing.assert_close(project_back(project(matrix, basis), basis), matrix, rtol=0, atol=1e-5)


def test_bfloat16_bases_keep_the_type_of_the_gradient():
    basis, _ = randomized_basis(gradient(8, 12, 1.0).bfloat16(), 3, "left", previous=None, generator=generator())
    assert basis.left.dtype == torch.bfloat16
    again, _ = randomized_basis(gradient(8, 12, 1.0).bfloat16(), 3, "left", previous=basis, generator=generator())
    assert isinstance(again, Basis)


@pytest.mark.parametrize("side", ["left", "right"])
def test_directions_keep_their_sign_from_one_refresh_to_the_next(side):
    matrix = gradient(16, 24, 1.0)
    basis, _ = randomized_basis(matrix, 4, side, previous=None, generator=generator(1))
    for factor in (1.0, -1.0, 0.37):
        again, _ = randomized_basis(matrix * factor, 4, side, previous=basis, generator=generator(2))
        old, new = (b.left if side == "left" else b.right.T for b in (basis, again))
        assert torch.all((old * new).sum(dim=0) > 0.99)
    other, _ = randomized_basis(-matrix, 4, side, previous=None, generator=generator(3))
    new = other.left if side == "left" else other.right.T
    assert torch.all((old * new).sum(dim=0) > 0.99)
