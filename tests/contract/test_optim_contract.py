"""The optimizer stack against the installed transformers: names, groups, keyword arguments, every schedule."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, Trainer
from transformers import TrainingArguments as HFArguments
from transformers.optimization import get_scheduler
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from finetune.arguments.optimization import REGISTERED_OPTIMIZERS
from finetune.errors import ArgumentError
from finetune.optim import registry
from finetune.optim.groups import decay_parameter_names, parameter_groups
from finetune.optim.registry import build_optimizer, optimizer_cls_and_kwargs
from finetune.optim.schedules import build_scheduler, current_learning_rate


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_labels=3
    )
    return BertForSequenceClassification(config)


class OddNames(nn.Module):
    """Names at the edges of the patterns, and a module shared by two parents."""

    def __init__(self):
        super().__init__()
        self.norm = nn.Linear(2, 2, bias=False)
        self.abnormal = nn.Linear(2, 2)
        self.q_norm = nn.Linear(2, 2, bias=False)
        self.normalizer = nn.Linear(2, 2)
        self.MyRMSNorm = nn.Linear(2, 2)
        self.block = nn.ModuleDict({"norm": nn.Linear(2, 2), "ln": nn.LayerNorm(2), "again": self.abnormal})
        self.scale = nn.Parameter(torch.ones(2))
        self.bias_free = nn.Parameter(torch.ones(2))


def hf_args(tmp_path, **changes):
    return HFArguments(str(tmp_path), use_cpu=True, report_to="none", **changes)


@pytest.mark.parametrize("make", [llama, bert, OddNames])
def test_decay_names_are_those_of_transformers(make):
    model = make()
    assert decay_parameter_names(model) == Trainer.get_decay_parameter_names(None, model)


@pytest.mark.parametrize("make", [llama, bert])
def test_groups_and_optimizer_state_cross_over(make, tmp_path):
    model = make()
    args = hf_args(tmp_path, weight_decay=0.3, learning_rate=1e-3)
    theirs = Trainer(model=model, args=args).create_optimizer()
    ours = build_optimizer(args, model)
    assert [g["weight_decay"] for g in ours.param_groups] == [0.3, 0.0]
    for a, b in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert [id(p) for p in a["params"]] == [id(p) for p in b["params"]]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    theirs.step()
    ours.load_state_dict(theirs.state_dict())
    p = ours.param_groups[0]["params"][0]
    assert torch.equal(ours.state[p]["exp_avg"], theirs.state[p]["exp_avg"])


def test_both_groups_exist_when_one_is_empty():
    model = nn.Linear(3, 3, bias=False)
    assert [len(g["params"]) for g in parameter_groups(model, 0.1)] == [1, 0]


def test_every_optimizer_name_of_transformers_is_registered():
    assert {name.value for name in OptimizerNames} <= set(registry._registered())


def test_registered_names_are_accepted_by_the_arguments():
    assert set(registry._registered()) <= REGISTERED_OPTIMIZERS | {name.value for name in OptimizerNames}


PLAIN = [
    "adamw_torch",
    "adamw_torch_fused",
    "adafactor",
    "sgd",
    "adagrad",
    "rmsprop",
    "adamw_bnb_8bit",
    "adamw_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "ademamix",
    "ademamix_8bit",
    "paged_ademamix_32bit",
    "paged_ademamix_8bit",
    "lion_32bit",
    "lion_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
    "rmsprop_bnb",
    "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit",
]


@pytest.mark.parametrize("name", PLAIN)
def test_class_and_keywords_are_those_of_transformers(name, tmp_path):
    if "bit" in name or "bnb" in name or "ademamix" in name:
        pytest.importorskip("bitsandbytes")
    args = hf_args(tmp_path, optim=name, learning_rate=3e-4, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-7)
    assert optimizer_cls_and_kwargs(args, None) == Trainer.get_optimizer_cls_and_kwargs(args, None)


EXTERNAL = {
    "schedule_free_radam": "schedulefree",
    "schedule_free_adamw": "schedulefree",
    "schedule_free_sgd": "schedulefree",
    "grokadamw": "grokadamw",
    "stable_adamw": "optimi",
    "lomo": "lomo_optim",
    "adamw_torch_4bit": "torchao",
    "adamw_torch_8bit": "torchao",
}


@pytest.mark.parametrize("name", EXTERNAL)
def test_optimizers_of_other_packages_agree_and_learn(name, tmp_path):
    pytest.importorskip(EXTERNAL[name])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    decay = 0.0 if name == "lomo" else 0.1  # refused, see tests/unit/optim/test_lomo.py
    args = hf_args(tmp_path, optim=name, learning_rate=1e-2, weight_decay=decay, adam_beta1=0.8)
    cls, kwargs = optimizer_cls_and_kwargs(args, model)
    their_cls, their_kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
    assert cls is their_cls or (name == "grokadamw" and issubclass(cls, their_cls))
    # Triton is preferred by the package wherever it is installed, and fails where there is no GPU.
    assert {k: v for k, v in kwargs.items() if k != "triton"} == their_kwargs
    optimizer = build_optimizer(args, model)
    if name.startswith("schedule_free"):
        optimizer.train()
    x, losses = torch.randn(32, 64), []
    for _ in range(6):
        loss = (model(x) - 1).square().mean()
        if name == "lomo":
            optimizer.fused_backward(loss, 1e-2)
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sgd", "momentum=0.9, nesterov=true"),
        ("rmsprop", "alpha=0.8, centered=True"),
        ("adagrad", "lr_decay=0.1,eps=1e-6"),
        ("ademamix", "beta3=0.99, alpha=3, t_alpha=10"),
    ],
)
def test_optim_args_are_read_as_transformers_reads_them(name, text, tmp_path):
    args = hf_args(tmp_path, optim=name, optim_args=text)
    cls, kwargs = optimizer_cls_and_kwargs(args, None)
    assert (cls, kwargs) == Trainer.get_optimizer_cls_and_kwargs(args, None)


def schedule_args(name, kwargs):
    return SimpleNamespace(lr_scheduler_type=name, lr_scheduler_kwargs=kwargs, get_warmup_steps=lambda n: 5)


SCHEDULES = {
    "linear": [{}],
    "cosine": [{}, {"num_cycles": 1.5}],
    "cosine_with_restarts": [{"num_cycles": 3}],
    "polynomial": [{"lr_end": 1e-6, "power": 2.0}],
    "constant": [{}],
    "constant_with_warmup": [{}],
    "inverse_sqrt": [{}, {"timescale": 10}],
    "reduce_lr_on_plateau": [{"patience": 1, "factor": 0.5}],
    "cosine_with_min_lr": [{"min_lr_rate": 0.1}, {"min_lr": 1e-4}],
    "cosine_warmup_with_min_lr": [{"min_lr": 1e-4, "warmup_lr_rate": 0.2}],
    "warmup_stable_decay": [{"num_decay_steps": 4}],
    "greedy": [{"patience": 1}],
}


def test_every_schedule_of_transformers_is_covered():
    assert set(SCHEDULES) == {name.value for name in SchedulerType}


@pytest.mark.parametrize(("name", "kwargs"), [(n, k) for n, options in SCHEDULES.items() for k in options])
def test_schedules_equal_transformers_at_every_step(name, kwargs):
    rates = []
    for build in (
        lambda o: build_scheduler(schedule_args(SchedulerType(name), kwargs), o, 20),
        lambda o: get_scheduler(
            name, o, num_warmup_steps=5, num_training_steps=20, scheduler_specific_kwargs=dict(kwargs)
        ),
    ):
        layer = nn.Linear(2, 2)
        optimizer = torch.optim.SGD([{"params": [layer.weight]}, {"params": [layer.bias], "lr": 0.5}], lr=0.01)
        scheduler = build(optimizer)
        history = []
        for step in range(22):
            optimizer.step()
            metric = 1.0 + 0.1 * (step % 3)
            scheduler.step(metric) if name in ("reduce_lr_on_plateau", "greedy") else scheduler.step()
            history.append([g["lr"] for g in optimizer.param_groups])
            assert current_learning_rate(scheduler, optimizer) == history[-1][0]
        rates.append(history)
    assert rates[0] == rates[1]
    assert name == "constant" or len({r[0] for r in rates[0]}) > 1


@pytest.mark.parametrize(
    ("name", "kwargs", "words"),
    [
        ("cosin", {}, ["`lr_scheduler_type=cosin`", "`cosine`"]),
        ("linear", {"num_cycles": 2}, ["`num_cycles`", "linear"]),
        ("constant", {"min_lr": 2}, ["`min_lr`", "constant"]),
        ("cosine", {"num_cycle": 2}, ["Did you mean `num_cycles`"]),
        ("cosine_with_min_lr", {}, ["`lr_scheduler_kwargs={}`"]),
        ("reduce_lr_on_plateau", {"patienc": 2}, ["patienc"]),
    ],
)
def test_schedule_errors_name_the_argument(name, kwargs, words):
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ArgumentError) as error:
        build_scheduler(schedule_args(name, kwargs), optimizer, 20)
    assert all(word in str(error.value) for word in words)
