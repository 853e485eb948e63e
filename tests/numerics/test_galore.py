"""GaLore against galore_torch, and the five defects of the incumbents (D1 to D5) as tests."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from finetune.errors import ArgumentError, CheckpointError
from finetune.optim.fused_backward import optimizer_logs, release_optimizer
from finetune.optim.registry import build_optimizer

LR = 1e-2


def arguments(optim, optim_args="rank=4, update_proj_gap=3, scale=0.5", **changes):
    values = {
        "optim": optim,
        "optim_args": optim_args,
        "optim_target_modules": ["hidden"],
        "learning_rate": LR,
        "weight_decay": 0.1,
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-7,
        "seed": 3,
        "fp16": False,
        "deepspeed": None,
        "fsdp": None,
        "gradient_accumulation_steps": 1,
        "max_grad_norm": 0.0,
    }
    return SimpleNamespace(**{**values, **changes})


class Net(nn.Module):
    """A tall, a wide and a square hidden matrix, and ordinary parameters around them."""

    def __init__(self, width=12):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(width, width)
        self.hidden_tall = nn.Linear(width, 2 * width, bias=False)
        self.hidden_wide = nn.Linear(2 * width, width, bias=False)
        self.hidden_square = nn.Linear(width, width, bias=False)
        self.ln = nn.LayerNorm(width)
        self.last = nn.Linear(width, 3)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        x = self.hidden_square(torch.tanh(self.hidden_wide(torch.tanh(self.hidden_tall(x)))))
        return self.last(self.ln(x))


def batches(steps, width=12):
    g = torch.Generator().manual_seed(7)
    teacher = torch.randn(width, 3, generator=g)
    for _ in range(steps):
        x = torch.randn(16, width, generator=g)
        yield x, torch.tanh(x @ teacher)


def train(model, optimizer, data, schedule=None, max_norm=None, accumulate=1):
    losses, norms = [], []
    for x, y in data:
        for xs, ys in zip(x.chunk(accumulate), y.chunk(accumulate), strict=True):
            loss = (model(xs) - ys).square().mean() / accumulate
            loss.backward()
        if max_norm is not None:
            clip = getattr(optimizer, "clip_grad_norm", None)
            norms.append(clip(max_norm) if clip else nn.utils.clip_grad_norm_(model.parameters(), max_norm))
        optimizer.step()
        if schedule:
            schedule.step()
        model.zero_grad()
        losses.append(loss.item())
    return losses, norms


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_close(a, b, tolerance):
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def reference(name, model, proj_type, gap=3, eps=1e-7):
    """galore_torch with the decay split of transformers and the same groups."""
    import galore_torch

    targets = [p for n, p in model.named_parameters() if "hidden" in n]
    plain = [p for n, p in model.named_parameters() if "hidden" not in n]
    decayed = [p for n, p in model.named_parameters() if n in ("first.weight", "last.weight")]
    others = [p for p in plain if not any(p is d for d in decayed)]
    low = {"rank": 4, "update_proj_gap": gap, "scale": 0.5, "proj_type": proj_type, "weight_decay": 0.1}
    groups = [
        {"params": decayed, "weight_decay": 0.1},
        {"params": targets, **low},
        {"params": others, "weight_decay": 0.0},
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name == "galore_adamw":
            return galore_torch.GaLoreAdamW(groups, lr=LR, betas=(0.8, 0.95), eps=eps)
        return galore_torch.GaLoreAdafactor(groups, lr=LR, scale_parameter=False, relative_step=False)


@pytest.mark.parametrize("name", ["galore_adamw", "galore_adafactor"])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right", "full"])
def test_with_an_exact_basis_the_trajectory_is_that_of_galore_torch(name, proj_type):
    pytest.importorskip("galore_torch")
    if name == "galore_adafactor" and proj_type == "full":
        pytest.skip("not more than the projection, which the AdamW case covers")
    ours, theirs = Net(), Net()
    text = f"rank=4, update_proj_gap=3, scale=0.5, proj_type={proj_type}, svd=exact"
    # A gradient in both of its own bases is diagonal, and Adam would blow up the rounding errors off the diagonal.
    eps = 1e-2 if proj_type == "full" else 1e-7
    a = build_optimizer(arguments(name, text, adam_epsilon=eps), ours)
    b = reference(name, theirs, proj_type, eps=eps)
    # With a schedule, so that an update that ignores the current learning rate would be seen.
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1.0 - step / 20) for o in (a, b)]
    train(ours, a, batches(12), schedules[0])
    train(theirs, b, batches(12), schedules[1])
    assert_close(weights(ours), weights(theirs), 1e-6)
    start = weights(Net())
    assert all((weights(ours)[n] - start[n]).abs().max() > 1e-3 for n in start if "weight" in n)


def test_galore_torch_stays_selectable_and_gets_weight_decay_and_betas():
    pytest.importorskip("galore_torch")
    ours, theirs = Net(), Net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = "rank=4, update_proj_gap=3, scale=0.5, implementation=galore_torch"
        b = build_optimizer(arguments("galore_adamw", text), theirs)
    a = build_optimizer(arguments("galore_adamw", "rank=4, update_proj_gap=3, scale=0.5, svd=exact"), ours)
    assert type(b).__mro__[1].__module__.startswith("galore_torch")
    assert [g["weight_decay"] for g in b.param_groups] == [g["weight_decay"] for g in a.param_groups]
    train(ours, a, batches(8))
    train(theirs, b, batches(8))
    assert_close(weights(ours), weights(theirs), 1e-6)


NAMES = ["galore_adamw", "galore_adafactor", "galore_adamw_layerwise", "galore_adafactor_layerwise"]
EIGHT_BIT = ["galore_adamw_8bit", "galore_adamw_8bit_layerwise"]


def build(name, width=12, rank=4, **changes):
    if "8bit" in name:
        pytest.importorskip("bitsandbytes")
    model = Net(width)
    return model, build_optimizer(arguments(name, f"rank={rank}, update_proj_gap=3, scale=0.5", **changes), model)


@pytest.mark.parametrize("name", NAMES + EIGHT_BIT)
def test_repeats_to_the_last_bit(name):
    runs = []
    for noise in (1, 2):
        model, optimizer = build(name)
        torch.manual_seed(noise)  # the global generator must not matter
        train(model, optimizer, batches(7))
        release_optimizer(optimizer)
        runs.append(weights(model))
    assert all(torch.equal(runs[0][n], runs[1][n]) for n in runs[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES + EIGHT_BIT)
def test_resumes_to_the_last_bit_from_tensors_only(name, dtype, tmp_path):
    # D1 and D4. Wide enough that 8-bit moments are in use; interrupted between two refreshes of staggered bases.
    width, rank = (96, 48) if "8bit" in name else (12, 4)

    def start():
        model, optimizer = build(name, width, rank)
        model.to(dtype)
        return model, optimizer

    data = [(x.to(dtype), y.to(dtype)) for x, y in batches(9, width)]
    model, optimizer = start()
    train(model, optimizer, data[:5])
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    losses, _ = train(model, optimizer, data[5:])
    final = weights(model)
    release_optimizer(optimizer)

    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    targets = [s for s in saved["optimizer"]["state"].values() if "basis_left" in s or "basis_right" in s]
    assert len(targets) == 3
    if "8bit" in name:
        assert {s["exp_avg"].dtype for s in targets} == {torch.uint8}
    model, optimizer = start()
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert train(model, optimizer, data[5:])[0] == losses
    assert all(torch.equal(final[n], p) for n, p in weights(model).items())


# Clipped, the factor meets the projection in another order of operations, and 8-bit codes amplify the last bit.
@pytest.mark.parametrize(
    ("name", "max_norm"),
    [
        ("galore_adamw", None),
        ("galore_adamw", 0.05),
        ("galore_adafactor", None),
        ("galore_adafactor", 0.05),
        ("galore_adamw_8bit", None),
    ],
)
def test_layerwise_equals_the_ordinary_run_without_accumulation(name, max_norm):
    width, rank = (96, 48) if "8bit" in name else (12, 4)
    a, first = build(name, width, rank)
    b, second = build(f"{name}_layerwise", width, rank)
    norms_a = train(a, first, batches(20, width), max_norm=max_norm)[1]
    norms_b = train(b, second, batches(20, width), max_norm=max_norm)[1]
    if max_norm is None:
        assert all(torch.equal(x, y) for x, y in zip(weights(a).values(), weights(b).values(), strict=True))
    else:
        assert_close(weights(a), weights(b), 1e-6)
        torch.testing.assert_close(torch.stack(norms_a), torch.stack(norms_b), rtol=1e-3, atol=0)
        assert min(n.item() for n in norms_a) > max_norm


def test_the_full_gradient_is_gone_as_soon_as_it_was_projected():
    model, optimizer = build("galore_adamw_layerwise")
    model(torch.ones(2, 12)).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == [
        "hidden_tall.weight",
        "hidden_wide.weight",
        "hidden_square.weight",
    ]
    assert [tuple(optimizer.backward.take(p).shape) for p in optimizer.targets()] == [(24, 4), (4, 24), (12, 4)]


def test_layerwise_accumulation_adds_projections():
    # With full rank the projection loses nothing, so micro-batches must add up to the undivided batch.
    runs = []
    for accumulate in (1, 4):
        model = Net()
        text = "rank=12, update_proj_gap=100, scale=1.0, proj_type=std"
        optimizer = build_optimizer(arguments("galore_adamw_layerwise", text), model)
        with torch.no_grad():
            # The same basis for both: the window's first micro-batch would otherwise choose it.
            for p in optimizer.targets():
                eye = torch.eye(12)
                side = "basis_right" if p.shape[0] >= p.shape[1] else "basis_left"
                optimizer.state[p].update({"step": torch.ones(()), "refreshes": torch.ones(()), side: eye})
        optimizer._index = dict.fromkeys(optimizer._index, 0)
        train(model, optimizer, batches(6), accumulate=accumulate)
        runs.append(weights(model))
    assert_close(*runs, 1e-5)


def test_clipping_acts_in_layerwise_mode():  # D5
    model, optimizer = build("galore_adamw_layerwise")
    x, y = next(batches(1))
    for _ in range(2):  # two micro-batches: the norm of the projections counts
        (model(x) - y).square().sum().backward()
    norm = optimizer.clip_grad_norm(0.5)
    held = [p.grad for p in model.parameters() if p.grad is not None]
    held += [optimizer.backward.take(p) for p in optimizer.targets()]
    after = torch.stack([t.norm() for t in held]).norm()
    assert norm > 1
    torch.testing.assert_close(after, torch.tensor(0.5), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_schedule_moves_the_real_learning_rate(name):  # D3
    model, optimizer = build(name, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 2 else 0.0)
    train(model, optimizer, batches(2), schedule)
    before = weights(model)
    train(model, optimizer, batches(1), schedule)
    assert all(torch.equal(before[n], p) for n, p in weights(model).items())


def test_weight_decay_betas_and_eps_are_those_asked_for():  # D2
    _, optimizer = build("galore_adamw")
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.1, 0.0]
    assert {g["betas"] for g in optimizer.param_groups} == {(0.8, 0.95)}
    assert {g["eps"] for g in optimizer.param_groups} == {1e-7}
    assert [g.get("rank") for g in optimizer.param_groups] == [None, 4, None]


def test_learning_rate_groups_reach_projected_weights():
    model = Net()
    optimizer = build_optimizer(arguments("galore_adamw", "rank=4, lr@hidden_tall=0"), model)
    before = weights(model)
    train(model, optimizer, batches(3))
    after = weights(model)
    assert torch.equal(before["hidden_tall.weight"], after["hidden_tall.weight"])
    assert not torch.equal(before["hidden_wide.weight"], after["hidden_wide.weight"])


@pytest.mark.parametrize(
    "text", ["svd=randomized", "svd=exact", "svd=randomized, rotate_moments=true", "proj_type=full"]
)
def test_converges(text):
    model = Net()
    optimizer = build_optimizer(
        arguments("galore_adamw", f"rank=4, update_proj_gap=20, scale=1.0, {text}", weight_decay=0.0), model
    )
    losses, _ = train(model, optimizer, batches(150))
    assert sum(losses[-10:]) < 0.35 * sum(losses[:10])


def test_dropped_windows_leave_nothing_behind():
    model, optimizer = build("galore_adamw_layerwise")
    x, y = next(batches(1))
    (model(x) - y).square().mean().backward()
    optimizer.zero_grad()
    before = weights(model)
    optimizer.step()
    assert all(torch.equal(before[n], p) for n, p in weights(model).items())


def test_release_gives_the_parameters_back():
    model, optimizer = build("galore_adamw_layerwise")
    release_optimizer(SimpleNamespace(optimizer=optimizer))
    model(torch.ones(2, 12)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_forgotten_optimizer_no_longer_takes_gradients():
    model, optimizer = build("galore_adamw_layerwise")
    del optimizer
    model(torch.ones(2, 12)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_refreshes_are_staggered_and_logged():
    model = Net()
    optimizer = build_optimizer(arguments("galore_adamw", "rank=4, update_proj_gap=6"), model)
    seen = []
    data = list(batches(14))
    for batch in data:
        train(model, optimizer, [batch])
        seen.append(optimizer_logs(optimizer)["galore_refreshes"])
    gains = [b - a for a, b in zip([0.0, *seen], seen, strict=False)]
    assert gains[0] == 3
    assert gains[1:] == [0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0]
    logs = optimizer_logs(optimizer)
    assert 0.5 < logs["galore_captured_energy"] <= 1.0
    assert logs["galore_refresh_seconds"] > 0


def test_describe_counts_weights_and_bytes():
    _, optimizer = build("galore_adamw_layerwise", rank=4)
    # moments 2*(24*4 + 4*24 + 12*4) + bases 3*(4*12) = 624 numbers; full moments 2*(288+288+144); 720 gradients
    expected = f"{624 * 4 / 2**20:.1f} MiB instead of {1440 * 4 / 2**20:.1f} MiB"
    assert "3 weights" in optimizer.describe()
    assert expected in optimizer.describe()
    _, optimizer = build("galore_adamw", rank=16)
    assert "3 weights are narrower than the rank" in optimizer.describe()


@pytest.mark.parametrize(
    ("name", "text", "changes", "words"),
    [
        ("galore_adamw", "rank=0", {}, ["`rank=0`"]),
        ("galore_adamw", "proj_type=sdt", {}, ["Did you mean `std`"]),
        ("galore_adamw", "rnak=4", {}, ["`rnak`", "`rank`"]),
        ("galore_adamw", None, {"optim_target_modules": None}, ["`optim_target_modules`"]),
        ("galore_adamw", None, {"optim_target_modules": ["hiden_tall"]}, ["Did you mean `hidden_tall`"]),
        ("galore_adamw", None, {"deepspeed": "x.json"}, ["`deepspeed`", "galore_adamw_layerwise"]),
        ("galore_adamw", None, {"fsdp": "full_shard"}, ["`fsdp`"]),
        ("galore_adamw_layerwise", None, {"fp16": True}, ["`fp16=True`", "`bf16=True`"]),
        ("galore_adamw_layerwise", "implementation=galore_torch", {}, ["`implementation=galore_torch`"]),
    ],
)
def test_errors(name, text, changes, words):
    with pytest.raises(ArgumentError) as error:
        build_optimizer(arguments(name, text, **changes), Net())
    assert all(word in str(error.value) for word in words)


def test_lora_is_refused():
    model = Net()
    model.hidden_tall.lora_A = nn.Linear(12, 2, bias=False)
    with pytest.raises(ArgumentError, match="low-rank already"):
        build_optimizer(arguments("galore_adamw"), model)


def test_a_checkpoint_of_another_rank_is_refused():
    _, optimizer = build("galore_adamw", rank=4)
    _, other = build("galore_adamw", rank=5)
    with pytest.raises(CheckpointError, match="`rank=4`"):
        other.load_state_dict(optimizer.state_dict())


def turned(basis_of, state):
    """The same space with its directions permuted and some of them reversed: what another SVD could have returned."""
    old = basis_of(state)
    r = (old.left.shape[1] if old.left is not None else old.right.shape[0]) if old else 0
    order = torch.randperm(r, generator=torch.Generator().manual_seed(1))
    signs = torch.tensor([1.0, -1.0]).repeat(r)[:r]
    left = None if old.left is None else (old.left * signs)[:, order]
    right = None if old.right is None else (old.right * signs.unsqueeze(1))[order]
    return old, type(old)(left, right)


@pytest.mark.parametrize("name", ["galore_adamw", "galore_adafactor", "galore_adamw_8bit"])
@pytest.mark.parametrize("proj_type", ["left", "right", "full"])
def test_rotated_moments_give_the_same_update_in_another_basis_of_the_space(name, proj_type):
    from finetune.optim.galore import _basis_in
    from finetune.optim.galore_basis import project, project_back

    width, rank = (192, 80) if "8bit" in name else (12, 4)
    if "8bit" in name:
        pytest.importorskip("bitsandbytes")
    model = Net(width)
    text = f"rank={rank}, update_proj_gap=100, scale=1.0, proj_type={proj_type}, rotate_moments=true"
    optimizer = build_optimizer(arguments(name, text, adam_epsilon=1e-3), model)
    train(model, optimizer, batches(3, width))
    group = next(g for g in optimizer.param_groups if "rank" in g)
    p = group["params"][0]
    state = optimizer.state[p]
    gradient = torch.randn(p.shape, generator=torch.Generator().manual_seed(2)) * 0.05
    old, new = turned(_basis_in, state)
    before = {key: value.clone() for key, value in state.items()}
    expected = project_back(optimizer.update_from(project(gradient, old), p, state, group), old)
    state.clear()
    state.update(before)
    optimizer.rotate(state, old, new)
    update = project_back(optimizer.update_from(project(gradient, new), p, state, group), new)
    tolerance = 0.1 if "8bit" in name else 1e-4
    assert (update - expected).norm() < tolerance * expected.norm()


def test_squares_of_unseen_directions_start_at_the_average():
    from finetune.optim.galore_rules import turn_squares

    # The first new direction is the second old one; the second new one was not in the old space at all.
    turn = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    square = torch.tensor([[2.0, 20.0], [4.0, 40.0]])
    assert turn_squares(turn, square).tolist() == [[4.0, 40.0], [3.0, 30.0]]
    assert turn_squares(turn, square[:, 0]).tolist() == [4.0, 3.0]


@pytest.mark.parametrize("svd", ["exact", "randomized"])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "full"])
def test_a_dropped_step_that_was_not_finite_leaves_no_trace(proj_type, svd):
    """As with `nonfinite_policy=skip_step`, in a step that renews the bases: the first one, and a later one."""
    runs = []
    for bad_steps in ((), (0, 3)):
        model = Net()
        options = f"rank=4, update_proj_gap=3, proj_type={proj_type}, svd={svd}, stagger=false"
        optimizer = build_optimizer(arguments("galore_adamw_layerwise", options), model)
        for step, (x, y) in enumerate(batches(6)):
            if step in bad_steps:
                ((model(x) - y).square().mean() * float("inf")).backward()
                optimizer.zero_grad()
            train(model, optimizer, [(x, y)])
        runs.append(weights(model))
    assert_close(*runs, 0)


@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_a_step_that_is_not_finite_is_no_error_of_the_decomposition(svd):
    """As with `nonfinite_policy=log`."""
    model = Net()
    optimizer = build_optimizer(arguments("galore_adamw", f"rank=4, update_proj_gap=1, svd={svd}"), model)
    for factor in (1.0, float("inf")):
        x, y = next(batches(1))
        ((model(x) - y).square().mean() * factor).backward()
        optimizer.step()
    assert not torch.isfinite(model.hidden_wide.weight).all()


@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_a_gradient_of_zeros_holds_no_energy(svd):
    model = Net()
    optimizer = build_optimizer(arguments("galore_adamw", f"rank=4, svd={svd}"), model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert optimizer.stats()["galore_captured_energy"] == 0.0
