import json
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler as schedules
from transformers.optimization import Adafactor

from finetune.checkpoint import files, optimizer
from finetune.checkpoint.writer import CheckpointWriter
from finetune.errors import CheckpointError

PLAIN = SimpleNamespace(state=SimpleNamespace(), scaler=None, num_processes=1)
ARGS = SimpleNamespace(should_save=True)


def build(seed: int = 0, width: int = 4, optim: Any = torch.optim.AdamW, **kwargs: Any) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.Linear(width, 1))
    return model, optim(model.parameters(), lr=0.1, **kwargs)


def step(model: Any, optim: Any, schedule: Any = None, metric: float | None = None) -> None:
    torch.manual_seed(5)
    model(torch.randn(3, model[0].in_features)).square().sum().backward()
    optim.step(), optim.zero_grad()
    if schedule is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            schedule.step(*([] if metric is None else [metric]))


def save(folder: Path, model: Any, optim: Any, schedule: Any) -> None:
    optimizer.save_optimizer_and_scheduler(
        folder, accelerator=PLAIN, args=ARGS, model=model, model_wrapped=model, optimizer=optim,
        lr_scheduler=schedule, writer=CheckpointWriter(),
    )  # fmt: skip


def load(folder: Path, model: Any, optim: Any, schedule: Any) -> None:
    optimizer.load_optimizer_and_scheduler(
        folder, accelerator=PLAIN, model=model, optimizer=optim, lr_scheduler=schedule
    )


class Warmup:
    """A schedule with state of its own, given as an object."""

    def __init__(self) -> None:
        self.power = 1.5

    def __call__(self, epoch: int) -> float:
        return 1 / (1 + epoch) ** self.power


SCHEDULES: dict[str, Any] = {
    "lambda": lambda o: schedules.LambdaLR(o, lambda step: 1 / (1 + step)),
    "object": lambda o: schedules.LambdaLR(o, Warmup()),
    "plateau": lambda o: schedules.ReduceLROnPlateau(o, patience=1),
    "onecycle": lambda o: schedules.OneCycleLR(o, 0.5, total_steps=20),
    "multistep": lambda o: schedules.MultiStepLR(o, [2, 4]),
    "restarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 3),
    "cyclic": lambda o: schedules.CyclicLR(o, 0.01, 0.2, step_size_up=3, cycle_momentum=False),
    "sequence": lambda o: schedules.SequentialLR(
        o, [schedules.ConstantLR(o, 0.1, 2), schedules.ExponentialLR(o, 0.9)], milestones=[2]
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_resumes_exactly(tmp_path: Path, name: str) -> None:
    metric = [np.float64(1.0), 0.9, 1.1, 1.2, 1.3, 0.5, 0.6, 0.7] if name == "plateau" else [None] * 8
    model, optim = build()
    schedule = SCHEDULES[name](optim)
    rates: list[Any] = []
    for number, value in enumerate(metric):
        step(model, optim, schedule, value)
        rates.append(optim.param_groups[0]["lr"])
        if number == 3:
            save(tmp_path, model, optim, schedule)
            weights = {k: v.clone() for k, v in model.state_dict().items()}
    resumed, other = build(seed=9)
    resumed.load_state_dict(weights)
    schedule = SCHEDULES[name](other)
    load(tmp_path, resumed, other, schedule)
    continued = []
    for value in metric[4:]:
        step(resumed, other, schedule, value)
        continued.append(other.param_groups[0]["lr"])
    assert continued == rates[4:]
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in resumed.state_dict().items())


@pytest.mark.parametrize(
    "optim", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor, torch.optim.RMSprop, torch.optim.Adagrad]
)
def test_optimizers_resume_exactly(tmp_path: Path, optim: Any) -> None:
    kwargs = {"momentum": 0.9} if optim is torch.optim.SGD else {}
    model, first = build(optim=optim, **kwargs)
    schedule = SCHEDULES["lambda"](first)
    for _ in range(3):
        step(model, first, schedule)
    save(tmp_path, model, first, schedule)
    other, second = build(optim=optim, **kwargs)
    other.load_state_dict(model.state_dict())
    schedule2 = SCHEDULES["lambda"](second)
    load(tmp_path, other, second, schedule2)
    for _ in range(3):
        step(model, first, schedule), step(other, second, schedule2)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in other.state_dict().items())


WIDE: dict[str, Any] = {
    "adafactor": partial(Adafactor, scale_parameter=False, relative_step=False),
    "nadam": torch.optim.NAdam,
    "asgd": torch.optim.ASGD,
}


@pytest.mark.parametrize("name", WIDE)
def test_state_wider_than_its_weights_resumes_exactly(tmp_path: Path, name: str) -> None:
    """torch rounds what it loads to the type of the weights, and these keep float32 for weights in 16 bits."""

    def start() -> tuple[Any, Any]:
        model, _ = build()
        model.bfloat16()
        return model, WIDE[name](model.parameters(), lr=0.1)

    def update(model: Any, optim: Any) -> None:
        model(torch.linspace(-1, 2, 12).view(3, 4).bfloat16()).square().sum().backward()
        optim.step(), optim.zero_grad()

    model, first = start()
    for _ in range(3):
        update(model, first)
    assert any(
        value.dtype == torch.float32 for value in first.state[model[0].weight].values() if torch.is_tensor(value)
    )
    save(tmp_path, model, first, SCHEDULES["lambda"](first))
    other, second = start()
    other.load_state_dict(model.state_dict())
    load(tmp_path, other, second, SCHEDULES["lambda"](second))
    for _ in range(3):
        update(model, first), update(other, second)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in other.state_dict().items())


def test_layouts_without_types_are_read(tmp_path: Path) -> None:
    model, optim = build()
    schedule = SCHEDULES["lambda"](optim)
    step(model, optim, schedule)
    save(tmp_path, model, optim, schedule)
    path = tmp_path / optimizer.OPTIMIZER_LAYOUT
    path.write_text(json.dumps([[entry[:2] for entry in group] for group in json.loads(path.read_text())]))
    other, second = build()
    load(tmp_path, other, second, SCHEDULES["lambda"](second))
    assert torch.equal(second.state[other[0].weight]["exp_avg"], optim.state[model[0].weight]["exp_avg"])


class TestWrongRun:
    @pytest.fixture
    def saved(self, tmp_path: Path) -> Path:
        model, optim = build()
        schedule = SCHEDULES["lambda"](optim)
        step(model, optim, schedule)
        save(tmp_path, model, optim, schedule)
        return tmp_path

    def test_other_shapes(self, saved: Path) -> None:
        model, optim = build(width=5)
        with pytest.raises(CheckpointError, match=r"number 0 was `0\.weight` \(4, 4\) and is `0\.weight` \(5, 5\)"):
            load(saved, model, optim, SCHEDULES["lambda"](optim))

    def test_other_order_of_parameters_with_one_shape(self, tmp_path: Path) -> None:
        model, _ = build()
        pair = [model[0].bias, model[0].weight]
        optim = torch.optim.AdamW(pair)
        schedule = SCHEDULES["lambda"](optim)
        step(model, optim, schedule)
        save(tmp_path, model, optim, schedule)
        other = torch.optim.AdamW(pair[::-1])
        with pytest.raises(CheckpointError, match="other parameters"):
            load(tmp_path, model, other, SCHEDULES["lambda"](other))

    def test_frozen_since(self, saved: Path) -> None:
        model, _ = build()
        optim = torch.optim.AdamW(list(model[1].parameters()))
        with pytest.raises(CheckpointError, match=r"there were 4|number 0"):
            load(saved, model, optim, SCHEDULES["lambda"](optim))

    def test_optimizer_that_drops_its_state(self, saved: Path) -> None:
        class Forgetful(torch.optim.AdamW):
            def load_state_dict(self, state_dict: Any) -> None:
                pass

        model, optim = build(optim=Forgetful)
        with pytest.raises(CheckpointError, match=r"did not take over its state.*`state\.0` is missing"):
            load(saved, model, optim, SCHEDULES["lambda"](optim))

    @pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad])
    def test_another_kind_of_optimizer(self, saved: Path, kind: Any) -> None:
        """PyTorch takes the settings over as they are; the first update then fails with `KeyError`."""
        model, optim = build(optim=kind)
        with pytest.raises(CheckpointError, match=r"another kind of optimizer, without `.*same `optim`"):
            load(saved, model, optim, SCHEDULES["lambda"](optim))

    def test_settings_that_do_not_act_are_named(self, saved: Path, caplog: pytest.LogCaptureFixture) -> None:
        model, optim = build(weight_decay=0.5)
        optim.param_groups[0]["lr"] = 0.3
        load(saved, model, optim, SCHEDULES["lambda"](optim))
        assert "`learning_rate` 0.1 instead of 0.3; `weight_decay` 0.01 instead of 0.5. To change" in caplog.text
        assert optim.param_groups[0]["weight_decay"] == 0.01

    @pytest.mark.parametrize("name", SCHEDULES)
    def test_nothing_is_said_of_the_same_settings(
        self, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        model, optim = build()
        schedule = SCHEDULES[name](optim)
        for _ in range(3):
            step(model, optim, schedule, 1.0 if name == "plateau" else None)
        save(tmp_path, model, optim, schedule)
        model, optim = build()
        load(tmp_path, model, optim, SCHEDULES[name](optim))
        assert "settings" not in caplog.text

    def test_weights_of_another_type(self, saved: Path) -> None:
        model, optim = build()
        model.bfloat16()
        with pytest.raises(CheckpointError, match=r"torch.float32.*torch.bfloat16"):
            load(saved, model, optim, SCHEDULES["lambda"](optim))

    def test_file_of_another_kind(self, saved: Path) -> None:
        for content in ([1], {"state": 3}, {"state": {}, "param_groups": 4}, {"state": {0: 5}, "param_groups": []}):
            files.save_plain(content, saved / "optimizer.pt")
            model, optim = build()
            with pytest.raises(CheckpointError):
                load(saved, model, optim, SCHEDULES["lambda"](optim))

    def test_schedule_of_another_kind(self, saved: Path) -> None:
        for content in ([1], 3, None):
            files.save_plain(content, saved / "scheduler.pt")
            model, optim = build()
            with pytest.raises(CheckpointError, match="scheduler"):
                load(saved, model, optim, SCHEDULES["lambda"](optim))


def test_weights_only_checkpoint_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, optim = build()
    load(tmp_path, model, optim, SCHEDULES["lambda"](optim))
    assert "weights only" in caplog.text


def test_object_in_optimizer_state_is_refused_at_save(tmp_path: Path) -> None:
    model, optim = build()
    step(model, optim)
    optim.state[model[0].weight]["projector"] = object()
    with pytest.raises(CheckpointError, match=r"optimizer\.pt\.state\.0\.projector"):
        save(tmp_path, model, optim, SCHEDULES["lambda"](optim))


def test_scaler(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def scaling(scale: float) -> Any:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=True)
        return SimpleNamespace(scaler=scaler, state=SimpleNamespace())

    optimizer.save_scaler(tmp_path, accelerator=PLAIN, args=ARGS, writer=CheckpointWriter())
    assert not (tmp_path / "scaler.pt").exists()
    optimizer.save_scaler(tmp_path, accelerator=scaling(512.0), args=ARGS, writer=CheckpointWriter())
    other = scaling(4.0)
    optimizer.load_scaler(tmp_path, accelerator=other)
    assert other.scaler.get_scale() == 512.0
    optimizer.load_scaler(tmp_path, accelerator=PLAIN)
    assert "loss scaler" in caplog.text


def test_parameter_names_do_not_depend_on_wrappers() -> None:
    model, optim = build()
    plain = optimizer.parameter_layout(model, optim)
    assert plain[0][0] == ["0.weight", [4, 4], "torch.float32"]
    wrapped = torch.nn.Module()
    wrapped.module = model
    assert optimizer.parameter_layout(wrapped, optim) == plain
