import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from finetune.control.state import TrainerState
from finetune.reporting import header


def arguments(**changes):
    values = {
        "world_size": 2,
        "device": "cpu",
        "mixed_precision": "no",
        "num_train_epochs": 3.0,
        "max_steps": -1,
        "learning_rate": 2e-5,
        "lr_scheduler_type": "linear",
        "output_dir": "runs/x",
        "get_process_log_level": lambda: logging.WARNING,
    }
    return SimpleNamespace(**{**values, **changes})


PLAN = SimpleNamespace(
    max_steps=30, num_train_epochs=3, num_examples=80, total_batch_size=8, accumulation=2, updates_per_epoch=10
)


def model_with_frozen_part():
    model = nn.Sequential(nn.Linear(100, 99, bias=False), nn.Linear(100, 1, bias=False))
    model[0].requires_grad_(False)
    return model


def start(**changes):
    model = changes.pop("model", None) or model_with_frozen_part()
    optimizer = changes.pop("optimizer", None) or torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    state = changes.pop("state", TrainerState())
    return "\n".join(
        header.start_lines(model=model, args=arguments(**changes), optimizer=optimizer, plan=PLAN, state=state)
    )


def test_start_says_what_is_trained_and_how():
    text = start()
    assert "Sequential" in text
    assert "10.0k, trained: 100 (1.00%)" in text
    assert "cpu" in text and "2 processes" in text
    assert "float32 10.0k" in text and "no autocast" in text
    assert "8 rows = 2 per device x 2 accumulated x 2 processes" in text
    assert "30 steps, 3 epochs, 80 rows" in text
    assert "AdamW, learning rate 2e-05, linear, state about 800 B" in text
    assert "runs/x" in text


def test_start_of_other_runs():
    assert "bfloat16 (autocast)" in start(mixed_precision="bf16") and "float16 (autocast)" in start(
        mixed_precision="fp16"
    )
    assert "30 steps, 3 epochs" in start(max_steps=30)
    assert "continuing at step 7" in start(state=TrainerState(global_step=7))
    sgd = torch.optim.SGD(model_with_frozen_part().parameters())
    assert "state" not in start(optimizer=sgd).split("SGD")[1].splitlines()[0]


def test_optimizer_state_is_measured_once_it_exists():
    model = model_with_frozen_part()
    optimizer = torch.optim.AdamW(model[1].parameters())
    model[1](torch.ones(1, 100)).sum().backward()
    optimizer.step()
    wrapped = SimpleNamespace(optimizer=optimizer)
    assert "AdamW, learning rate 2e-05, linear, state 804 B" in start(model=model, optimizer=wrapped)


def test_end_says_how_it_went():
    history = [{"eval_loss": 3.0}, {"eval_loss": 1.5}]
    state = TrainerState(global_step=30, log_history=history, best_metric=1.5, best_model_checkpoint="x/checkpoint-30")
    metrics = {"train_runtime": 75.0, "train_samples_per_second": 12.5, "train_loss": 2.25}
    text = "\n".join(header.end_lines(metrics=metrics, state=state, args=arguments(), model=model_with_frozen_part()))
    assert "30 in 1 min 15 s, 12.5 samples/s" in text
    assert "2.25 (mean" in text and "3 -> 1.5" in text and "1.5 in x/checkpoint-30" in text
    stalled = header.end_lines(metrics=metrics, state=state, args=arguments(), stalls=[0.25, 0.5])
    assert any("checkpoints  2 (training paused at most 0.5 s each)" in line for line in stalled)
    assert "checkpoints" not in text
    assert "process peak" in text and "parameters 39.1 KiB" in text and "utilisation" not in text


@pytest.mark.parametrize(
    ("first", "level", "trial", "speaks"),
    [
        (True, logging.WARNING, None, True),
        (True, logging.INFO, None, True),
        (False, logging.WARNING, None, False),
        (True, logging.ERROR, None, False),
        (True, logging.WARNING, {"lr": 1}, False),
    ],
)
def test_who_speaks(capsys, first, level, trial, speaks):
    model = model_with_frozen_part()
    trainer = SimpleNamespace(
        model=model,
        args=arguments(get_process_log_level=lambda: level),
        state=TrainerState(),
        is_world_process_zero=lambda: first,
    )
    run = SimpleNamespace(trial=trial, optimizer=torch.optim.AdamW(model.parameters()), plan=PLAN)
    header.start_observers(trainer, run)
    header.log_start(trainer, run)
    header.log_end(trainer, run, {"train_runtime": 1.0})
    shown = capsys.readouterr()
    assert shown.out == "" and (("Training\n" in shown.err) and ("Trained\n" in shown.err)) is speaks


def test_a_full_disk_at_the_end_is_a_warning(monkeypatch, capsys, caplog):
    model = model_with_frozen_part()
    trainer = SimpleNamespace(
        model=model,
        args=arguments(get_process_log_level=lambda: logging.WARNING, should_save=True),
        state=TrainerState(),
        is_world_process_zero=lambda: True,
    )
    run = SimpleNamespace(trial=None, optimizer=torch.optim.AdamW(model.parameters()), plan=PLAN)
    header.start_observers(trainer, run)

    def write(self, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(run.memory), "write", write)
    header.log_end(trainer, run, {"train_runtime": 1.0})
    assert "was not written" in caplog.text and "No space left on device" in caplog.text
    assert "Trained\n" in capsys.readouterr().err


def test_zero3_parameters_count_at_their_true_size():
    model = nn.Linear(1, 1, bias=False)
    model.weight.ds_numel = 2_000_000
    assert "2.0M, trained: 2.0M (all)" in start(model=model)


def test_one_of_a_thing_is_singular():
    assert [header.counted(1, "process"), header.counted(2, "process")] == ["1 process", "2 processes"]
    assert [header.counted(1.0, "epoch"), header.counted(0.5, "epoch")] == ["1 epoch", "0.5 epochs"]
    assert header.counted(1200, "step") == "1,200 steps"
