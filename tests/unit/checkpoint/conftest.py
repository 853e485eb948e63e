"""A run without a Trainer: a model, its optimizer and schedule, and the four methods a save calls."""

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from finetune.checkpoint import manager, stateful
from finetune.checkpoint.writer import CheckpointWriter
from finetune.control.callbacks import CallbackHandler, Events
from finetune.control.state import TrainerControl, TrainerState


class Counter:
    """Counts tokens, with a tensor among its state."""

    def __init__(self) -> None:
        self.tokens, self.seen = 0, torch.zeros(2)

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "seen": self.seen.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens, self.seen = state_dict["tokens"], state_dict["seen"].clone()


class TinyRun:
    """Trains a small network on noise. Two runs with the same steps end bit for bit the same."""

    def __init__(self, out: Path, asynchronous: bool = False, **overrides: Any) -> None:
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        self.model: Any = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 2))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.lr_scheduler: Any = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        settings = {
            "output_dir": str(out), "world_size": 1, "process_index": 0, "should_save": True, "save_only_model": False,
            "save_on_each_node": False, "save_total_limit": None, "keep_last": None, "keep_best": None,
            "metric_for_best_model": "loss", "greater_is_better": False, "save_strategy": "steps",
            "parallel_mode": "not_parallel", "logging_steps": 1, "eval_steps": 1, "save_steps": 1,
            "on_save_failure": "stop",
        }  # fmt: skip
        self.args = SimpleNamespace(**{**settings, **overrides})
        self.args.to_dict = lambda: {k: v for k, v in vars(self.args).items() if k != "to_dict"}
        self.accelerator = SimpleNamespace(
            state=SimpleNamespace(), num_processes=1, is_main_process=True, scaler=None, device=torch.device("cpu")
        )
        handler = CallbackHandler([], self.model, None, self.optimizer, self.lr_scheduler)
        self.events = Events(
            self.args, handler, TrainerState(logging_steps=1, eval_steps=1, save_steps=1), TrainerControl()
        )
        self.writer = CheckpointWriter(asynchronous)
        self.counter = Counter()
        self.out = out

    def train(self, steps: int) -> "TinyRun":
        self.model.train()
        for _ in range(steps):
            loss = self.model(torch.randn(4, 6)).square().mean() * (1 + random.random() + np.random.rand())
            loss.backward()
            self.optimizer.step(), self.lr_scheduler.step(), self.optimizer.zero_grad()
            self.events.state.global_step += 1
            self.events.state.log_history.append({"loss": loss.item(), "step": self.events.state.global_step})
            self.counter.tokens += 4
            self.counter.seen += 1
        return self

    def save(self) -> manager.SaveReport:
        return manager.save_checkpoint(
            self, run_dir=str(self.out), args=self.args, events=self.events,
            model=self.model, optimizer=self.optimizer, writer=self.writer, stateful={"counter": self.counter},
        )  # fmt: skip

    def resume(self, value: Any = True) -> str | None:
        checkpoint = manager.resolve_resume(value, str(self.out))
        if checkpoint is not None:
            self.load(checkpoint)
        return checkpoint

    def load(self, checkpoint: str, verify: bool = True) -> None:
        manager.load_model(checkpoint, accelerator=self.accelerator, model=self.model, verify=verify)
        self.events.state = manager.load_state(checkpoint, self.args)
        manager.load_optimizer_and_scheduler(
            checkpoint, accelerator=self.accelerator, model=self.model, optimizer=self.optimizer,
            lr_scheduler=self.lr_scheduler,
        )  # fmt: skip
        manager.load_scaler(checkpoint, accelerator=self.accelerator)
        stateful.load_stateful(checkpoint, {"counter": self.counter}, rank=0, world_size=1)
        manager.load_rng_state(checkpoint, self.args)

    def everything(self) -> dict[str, Any]:
        """Returns all that must be the same after a resume. Draws from the generators, so call it last."""
        return {
            "weights": {k: v.clone() for k, v in self.model.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.lr_scheduler.state_dict(),
            "history": self.events.state.log_history,
            "step": self.events.state.global_step,
            "counter": self.counter.state_dict(),
            "draws": [random.random(), float(np.random.rand()), torch.rand(3)],
        }

    # What a save calls.

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        manager.save_model(
            self._save, str(output_dir), accelerator=self.accelerator, model=self.model, model_wrapped=self.model,
            for_checkpoint=_internal_call,
        )  # fmt: skip

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        manager.write_model(str(output_dir), state_dict, model=self.model, args=self.args, writer=self.writer)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        manager.save_optimizer_and_scheduler(
            output_dir, accelerator=self.accelerator, args=self.args, model=self.model, model_wrapped=self.model,
            optimizer=self.optimizer, lr_scheduler=self.lr_scheduler, writer=self.writer,
        )  # fmt: skip

    def _save_scaler(self, output_dir: str) -> None:
        manager.save_scaler(output_dir, accelerator=self.accelerator, args=self.args, writer=self.writer)

    def _save_rng_state(self, output_dir: str) -> None:
        manager.save_rng_state(output_dir, self.args)


def same(left: Any, right: Any) -> bool:
    """Returns whether two nested states are equal to the last bit."""
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


@pytest.fixture
def tiny_run(tmp_path: Path) -> Callable[..., TinyRun]:
    """Makes a `TinyRun` in the test's folder."""

    def make(out: Path | None = None, **overrides: Any) -> TinyRun:
        return TinyRun(out or tmp_path / "run", **overrides)

    return make


@pytest.fixture(scope="session")
def run_class() -> type[TinyRun]:
    return TinyRun


@pytest.fixture(name="same")
def _same() -> Callable[[Any, Any], bool]:
    return same
