"""The collector's settings inside and after a run."""

import gc

import pytest
import torch
from torch import nn

from finetune import Trainer, TrainerCallback, TrainingArguments
from finetune.features.garbage import garbage_control


def test_rare_inside_and_as_before_outside() -> None:
    before, frozen, callbacks = gc.get_threshold(), gc.get_freeze_count(), list(gc.callbacks)
    with pytest.raises(KeyError), garbage_control():
        assert gc.get_threshold()[0] > before[0]
        assert gc.get_freeze_count() == frozen, "garbage that waits to be collected is not kept"
        gc.collect(1)
        assert gc.get_freeze_count() == frozen
        gc.collect()
        assert gc.get_freeze_count() > frozen
        raise KeyError
    assert (gc.get_threshold(), gc.get_freeze_count(), gc.callbacks) == (before, frozen, callbacks)


def test_untouched_when_the_device_cache_is_emptied_or_the_collector_is_off() -> None:
    before = gc.get_threshold()
    with garbage_control(4):
        assert gc.get_threshold() == before
    gc.disable()
    try:
        with garbage_control():
            assert gc.get_threshold() == before
        assert not gc.isenabled()
    finally:
        gc.enable()


class Watch(TrainerCallback):
    def __init__(self) -> None:
        self.thresholds: list[int] = []

    def on_step_end(self, *_: object, **__: object) -> None:
        self.thresholds.append(gc.get_threshold()[0])


@pytest.mark.parametrize("every", [None, 2])
def test_a_run_collects_seldom_and_empties_the_cache_when_asked(every, tmp_path, monkeypatch) -> None:
    before, emptied, watch = gc.get_threshold(), [], Watch()
    monkeypatch.setattr("accelerate.utils.memory.clear_device_cache", lambda *_, **__: emptied.append(1))
    args = TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=1, torch_empty_cache_steps=every, use_cpu=True,
        save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    rows = [{"x": torch.ones(2), "labels": torch.ones(2)}] * 4
    trainer = Trainer(Model(), args, train_dataset=rows, callbacks=[watch], data_collator=stack)
    trainer.train()
    # Emptying the cache frees what was collected, so then the collector keeps its usual pace.
    assert watch.thresholds == [50_000 if every is None else before[0]] * 4
    assert len(emptied) == (0 if every is None else 2)
    assert gc.get_threshold() == before


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.inner(x) - labels).square().mean()}


def stack(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
