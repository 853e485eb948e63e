from types import SimpleNamespace

import pytest
import torch
from torch import nn

from finetune.errors import ArgumentError
from finetune.optim import registry
from finetune.optim.registry import build_optimizer, optimizer_cls_and_kwargs, register_optimizer, why_not_sharded


def arguments(optim, optim_args=None, **changes):
    values = {
        "optim": optim,
        "optim_args": optim_args,
        "optim_target_modules": None,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "adam_beta1": 0.9,
        "adam_beta2": 0.99,
        "adam_epsilon": 1e-8,
        "warmup_steps": 0,
    }
    return SimpleNamespace(**{**values, **changes})


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def test_a_third_party_adds_an_optimizer_in_three_lines(model):
    @register_optimizer("mine")
    def mine(request):
        return torch.optim.SGD, {"lr": request.args.learning_rate, "momentum": request.options.take("m", float, 0.0)}

    try:
        optimizer = build_optimizer(arguments("mine", "m=0.5"), model)
        assert type(optimizer) is torch.optim.SGD
        assert optimizer.defaults["momentum"] == 0.5
        assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    finally:
        del registry._REGISTERED["mine"]


def test_a_third_party_says_what_its_optimizer_refuses(model):
    register_optimizer("whole", refuses=["fsdp"])(lambda request: (torch.optim.SGD, {"lr": 0.1}))
    try:
        assert "`optim=whole` needs whole weight matrices" in why_not_sharded("whole", "fsdp")
        assert why_not_sharded("whole", "deepspeed") == why_not_sharded("adamw_torch", "fsdp") == ""
        with pytest.raises(ArgumentError, match="which `fsdp` splits"):
            build_optimizer(arguments("whole", fsdp=True), model)
    finally:
        del registry._REGISTERED["whole"]


@pytest.mark.parametrize(
    ("optim", "optim_args", "words"),
    [
        ("adamw_troch", None, ["`optim=adamw_troch`", "Did you mean `adamw_torch`"]),
        ("adamw_torch", "amsgard=true", ["`amsgard`", "Did you mean `amsgrad`"]),
        ("sgd", "weight_decay=0.1", ["`weight_decay`"]),
        ("muon", None, ["needs the model"]),
        ("adamw_torch_xla", None, ["`optim=adamw_torch_xla`", "pip install torch_xla"]),
        ("adamw_torch_npu_fused", None, ["pip install torch_npu"]),
        ("adamw_anyprecision", None, ["torchdistx"]),
    ],
)
def test_errors_name_the_remedy(optim, optim_args, words):
    with pytest.raises(ArgumentError) as error:
        optimizer_cls_and_kwargs(arguments(optim, optim_args), None)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("optim", ["muon", "galore_adamw", "apollo_adamw"])
@pytest.mark.parametrize("launcher", ["deepspeed", "fsdp"])
def test_optimizers_of_whole_matrices_refuse_to_be_sharded(optim, launcher, model, monkeypatch):
    changes = {"seed": 0, "optim_target_modules": "all-linear"}
    if (optim, launcher) == ("muon", "fsdp"):  # whose parameters stay matrices
        build_optimizer(arguments(optim, fsdp=True, **changes), model)
        return
    with pytest.raises(ArgumentError, match=f"`optim={optim}` needs whole weight matrices.*`{launcher}`"):
        build_optimizer(arguments(optim, **{launcher: "config.json"}, **changes), model)
    for word in ("1", "true", "True", "yes", "on"):
        monkeypatch.setenv(f"ACCELERATE_USE_{launcher.upper()}", word)
        with pytest.raises(ArgumentError, match=f"which `{launcher}` splits"):
            build_optimizer(arguments(optim, **changes), model)
    for word in ("", "0", "false", "no"):
        monkeypatch.setenv(f"ACCELERATE_USE_{launcher.upper()}", word)
        build_optimizer(arguments(optim, **changes), model)


MISSING = {
    "schedule_free_adamw": ("schedulefree", "pip install schedulefree"),
    "lomo": ("lomo_optim", "pip install lomo-optim"),
    "adalomo": ("lomo_optim", "pip install lomo-optim"),
    "grokadamw": ("grokadamw", "pip install grokadamw"),
    "stable_adamw": ("optimi", "pip install torch-optimi"),
    "adamw_torch_4bit": ("torchao.optim", "pip install torchao"),
    "adamw_8bit": ("bitsandbytes.optim", "pip install bitsandbytes"),
}


@pytest.mark.parametrize("optim", MISSING)
def test_a_missing_package_is_named_with_its_command(optim, model, monkeypatch):
    module, command = MISSING[optim]
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ArgumentError, match="`optim=" + optim) as error:
        optimizer_cls_and_kwargs(arguments(optim), model)
    assert command in str(error.value)


def test_transformers_substitutes_for_the_groups_are_understood(model):
    only = [model[0].weight]
    given = (torch.optim.SGD, {"lr": 0.5, "params": [{"params": only}]})
    optimizer = build_optimizer(arguments("sgd"), model, cls_and_kwargs=given)
    assert optimizer.param_groups[0]["params"] == only
    assert "params" in given[1]

    class Factory:
        def __call__(self, opt_model, lr):
            return torch.optim.SGD(opt_model.parameters(), lr=lr)

    assert build_optimizer(arguments("sgd"), model, cls_and_kwargs=(Factory, {"lr": 0.2})).defaults["lr"] == 0.2
    for substitute in (given, (Factory, {"lr": 0.2})):
        with pytest.raises(ArgumentError, match=r"`lr@weight`.*own parameter groups"):
            build_optimizer(arguments("sgd", "lr@weight=0.1"), model, cls_and_kwargs=substitute)


def test_learning_rate_groups_follow_the_schedule(model):
    optimizer = build_optimizer(arguments("adamw_torch", r"lr@^2\.=1e-4"), model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [5e-3, 5e-5, 5e-3, 5e-5]


TORCH_ONLY = ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop", "asgd", "adadelta"]
TORCH_ONLY += ["rprop", "adam", "nadam", "radam", "adamax", "muon"]
BITSANDBYTES = [
    *("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "ademamix", "ademamix_8bit"),
    *("paged_ademamix_32bit", "paged_ademamix_8bit", "lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit"),
    *("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"),
]
OTHERS = ["schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd", "stable_adamw", "grokadamw"]
LOW_RANK = ["galore_adamw", "galore_adamw_8bit", "galore_adafactor", "apollo_adamw"]
ELSEWHERE = {
    # They update, or project, inside backward: tests/trajectories/test_resume_optimizers.py, tests/numerics.
    *("lomo", "apollo_adamw_layerwise", "galore_adamw_layerwise", "galore_adamw_8bit_layerwise"),
    "galore_adafactor_layerwise",
    # They compile for half a minute: tests/trajectories/test_resume_optimizers.py.
    *("adamw_torch_4bit", "adamw_torch_8bit"),
    # They need another device or a package that nobody publishes.
    *("adamw_torch_xla", "adamw_torch_npu_fused", "adamw_anyprecision", "adalomo"),
}


def test_every_optimizer_is_listed():
    tested = {*TORCH_ONLY, *BITSANDBYTES, *OTHERS, *LOW_RANK}
    assert tested | ELSEWHERE == set(registry._registered()) and not tested & ELSEWHERE


@pytest.mark.parametrize("optim", TORCH_ONLY + BITSANDBYTES + OTHERS + LOW_RANK)
def test_each_learns_and_resumes_bit_exactly_from_tensors_only(optim, tmp_path):
    changes = {"learning_rate": 1e-2, "seed": 0}
    if optim in BITSANDBYTES or optim.endswith("8bit"):
        pytest.importorskip("bitsandbytes")
    if optim in LOW_RANK:
        changes |= {"optim_target_modules": ["^0$"], "optim_args": "rank=4, update_proj_gap=3, scale=1.0"}

    def fresh():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
        try:
            return model, build_optimizer(arguments(optim, **changes), model)
        except ArgumentError as error:
            assert "pip install" in str(error)
            pytest.skip(str(error))

    torch.manual_seed(1)
    inputs, wanted = torch.randn(32, 64), torch.randn(32, 8)

    def train(model, optimizer, steps):
        losses = []
        getattr(optimizer, "train", bool)()
        for _ in range(steps):
            loss = (model(inputs) - wanted).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    model, optimizer = fresh()
    first = train(model, optimizer, 6)
    getattr(optimizer, "eval", bool)()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "x.pt")
    rest = train(model, optimizer, 4)
    saved = torch.load(tmp_path / "x.pt", weights_only=True)
    model, optimizer = fresh()
    getattr(optimizer, "eval", bool)()
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert train(model, optimizer, 4) == rest
    assert rest[-1] < first[0]


def test_fused_adamw_takes_the_same_steps_as_plain(model):
    results = []
    for optim in ("adamw_torch", "adamw_torch_fused"):
        torch.manual_seed(0)
        m = nn.Linear(16, 16)
        optimizer = build_optimizer(arguments(optim), m)
        for _ in range(5):
            m(torch.ones(2, 16)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(m.weight.detach().clone())
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-7)


def test_embeddings_keep_wide_states_under_8_bit_adam():
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(128, 64), nn.Linear(64, 64, bias=False))
    optimizer = build_optimizer(arguments("adamw_8bit"), model)
    model(torch.arange(8)).sum().backward()
    optimizer.step()
    assert optimizer.state[model[0].weight]["state1"].dtype == torch.float32
    assert optimizer.state[model[1].weight]["state1"].dtype == torch.uint8


def test_grokadamw_takes_the_steps_of_its_package():
    package = pytest.importorskip("grokadamw")
    weights = []
    for build in ("ours", "theirs"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        optimizer = build_optimizer(arguments("grokadamw"), model)
        if build == "theirs":
            optimizer = package.GrokAdamW(
                [{k: g[k] for k in ("params", "weight_decay")} for g in optimizer.param_groups], lr=1e-2
            )
        for _ in range(5):
            (model(torch.ones(2, 8)) - 1).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *weights))


def test_grokadamw_does_not_configure_logging(model, monkeypatch):
    pytest.importorskip("grokadamw")
    import logging
    import sys

    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", logging.WARNING)
    for name in [name for name in sys.modules if name.split(".")[0] == "grokadamw"]:
        monkeypatch.delitem(sys.modules, name)
    build_optimizer(arguments("grokadamw"), model)
    assert root.handlers == [] and root.level == logging.WARNING
