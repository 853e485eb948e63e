"""Who is created first: the order in which model and optimizer meet accelerate, per way to parallelise."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DummyOptim, DummyScheduler
from torch import nn

from finetune.distributed import prepare as preparation
from finetune.distributed.prepare import prepare, prepare_for_evaluation


@pytest.fixture(autouse=True)
def _unverified(monkeypatch, request) -> None:
    """A spy shards nothing; what was prepared is looked at in `test_verify.py`."""
    if "real" not in request.node.name:
        monkeypatch.setattr(preparation, "verify_prepared", lambda *_: None)


class Spy:
    """Stands for an accelerator: notes what is prepared, in which order, and returns marked objects."""

    def __init__(self, fsdp=None, stage=None, ds_config=None) -> None:
        self.events: list = []
        config = SimpleNamespace(
            config=dict(ds_config or {}), trainer_config_finalize=lambda *a: self.events.append(("finalize", a[2]))
        )
        deepspeed = None if stage is None else SimpleNamespace(zero_stage=stage, hf_ds_config=config)
        plugin = None if fsdp is None else SimpleNamespace(fsdp_version=fsdp, transformer_cls_names_to_wrap=None)
        self.state = SimpleNamespace(deepspeed_plugin=deepspeed, fsdp_plugin=plugin)

    def prepare(self, *objects):
        self.events.append(("prepare", [type(each).__name__ for each in objects]))
        return objects if len(objects) > 1 else objects[0]

    def create(self, *models):
        self.events.append(("optimizer", len(models)))
        return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)


@pytest.mark.parametrize("fsdp", [None, 2])
def test_optimizer_first_then_both_together(fsdp) -> None:
    spy = Spy(fsdp=fsdp)
    prepared = prepare(spy, nn.Linear(1, 1), spy.create)
    assert spy.events == [("optimizer", 0), ("prepare", ["Linear", "SGD"])]
    assert prepared.lr_scheduler is None


def test_fsdp1_wraps_the_model_before_the_optimizer_sees_parameters() -> None:
    spy = Spy(fsdp=1)
    prepare(spy, nn.Linear(1, 1), spy.create)
    assert spy.events == [("prepare", ["Linear"]), ("optimizer", 1), ("prepare", ["SGD"])]


def test_deepspeed_takes_optimizer_and_schedule_from_its_config() -> None:
    spy = Spy(stage=2)
    prepare(spy, nn.Linear(1, 1), spy.create, max_steps=9)
    assert spy.events == [("finalize", 9), ("optimizer", 0), ("prepare", ["Linear", "SGD"])]
    assert spy.state.deepspeed_plugin.hf_ds_config.config["zero_allow_untested_optimizer"] is True

    spy = Spy(stage=2, ds_config={"optimizer": {}, "scheduler": {}})
    prepared = prepare(spy, nn.Linear(1, 1), spy.create, max_steps=9)
    assert spy.events == [("finalize", 9), ("prepare", ["Linear", "DummyOptim", "DummyScheduler"])]
    assert isinstance(prepared.optimizer, DummyOptim) and isinstance(prepared.lr_scheduler, DummyScheduler)

    spy = Spy(stage=2, ds_config={"optimizer": {}})
    calls = []
    prepared = prepare(spy, nn.Linear(1, 1), spy.create, max_steps=9, create_scheduler=lambda **kw: calls.append(kw))
    prepared.lr_scheduler.lr_scheduler_callable("real")
    assert calls == [{"num_training_steps": 9, "optimizer": "real"}]


def test_with_the_real_accelerator() -> None:
    model = nn.Linear(2, 2)
    prepared = prepare(Accelerator(cpu=True), model, lambda: torch.optim.SGD(model.parameters(), lr=0.1))
    assert prepared.model is model
    assert isinstance(prepared.optimizer.optimizer, torch.optim.SGD)
    assert prepare_for_evaluation(Accelerator(cpu=True), model) is model


class Embeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(4, 2)


class Layer(nn.Linear):
    pass


class Encoder(nn.Module):
    _no_split_modules = ["Embeddings", "Layer"]

    def __init__(self) -> None:
        super().__init__()
        self.embeddings, self.layer = Embeddings(), Layer(2, 2)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.words


@pytest.mark.parametrize("named", [None, ["Layer", "Embeddings"]])
def test_fsdp2_does_not_shard_what_holds_the_embedding_as_one_unit(named) -> None:
    """accelerate shards the embedding by itself, and torch refuses to shard it twice."""
    seen = []
    spy = Spy(fsdp=2)
    plugin = spy.state.fsdp_plugin
    plugin.transformer_cls_names_to_wrap = named
    spy.prepare = lambda *objects: seen.append(plugin.transformer_cls_names_to_wrap) or objects
    prepare(spy, Encoder(), spy.create)
    assert seen == [["Layer"]] and plugin.transformer_cls_names_to_wrap is named
    plugin.transformer_cls_names_to_wrap = ["Layer"]
    prepare(spy, Encoder(), spy.create)
    assert seen[1] == ["Layer"]
