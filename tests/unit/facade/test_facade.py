"""What the facade decides itself: which arguments it accepts, sizes, names, and what it says when asked in vain."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset

import finetune
from finetune.control.builtin import ProgressCallback
from finetune.engine import checks, setup
from finetune.errors import ArgumentError

COMMON: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "use_cpu": True}


@pytest.fixture
def trainer(tiny_bert: Any, tmp_path: Path) -> finetune.Trainer:
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, **COMMON}
    return finetune.Trainer(model=tiny_bert(), args=finetune.TrainingArguments(str(tmp_path), **options))


def rows(count: int = 8) -> Dataset:
    labels = [i % 3 for i in range(count)]
    return Dataset.from_dict({"input_ids": [[3 + i] * 6 for i in range(count)], "labels": labels})


def test_arguments_of_transformers_and_trl_are_accepted(tiny_bert: Any, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")

    for theirs in (
        transformers.TrainingArguments(str(tmp_path), learning_rate=0.25, max_steps=1, **COMMON),
        trl.SFTConfig(str(tmp_path), learning_rate=0.25, max_steps=1, bf16=False, **COMMON),
        {"output_dir": str(tmp_path), "learning_rate": 0.25, "max_steps": 1, **COMMON},
    ):
        trainer = finetune.Trainer(model=tiny_bert(), args=theirs, train_dataset=rows())
        assert isinstance(trainer.args, finetune.TrainingArguments)
        assert trainer.args.learning_rate == 0.25
        assert trainer.train().global_step == 1


def test_the_old_name_of_the_tokenizer_is_accepted(tiny_bert: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    args = finetune.TrainingArguments(str(tmp_path), **COMMON)
    with pytest.warns(FutureWarning, match="`processing_class`"):
        trainer = finetune.Trainer(model=tiny_bert(), args=args, tokenizer=chat_tokenizer)
    assert trainer.processing_class is chat_tokenizer
    assert isinstance(trainer.data_collator, transformers.DataCollatorWithPadding)


def test_only_a_tokenizer_pads(tiny_bert: Any, tmp_path: Path) -> None:
    processor = SimpleNamespace(pad=None)  # image processors have a `pad` too, for images
    args = finetune.TrainingArguments(str(tmp_path), **COMMON)
    trainer = finetune.Trainer(model=tiny_bert(), args=args, processing_class=processor)
    assert trainer.data_collator is transformers.default_data_collator


def test_arguments_are_not_changed_by_a_run(trainer: finetune.Trainer) -> None:
    trainer.train_dataset = rows()
    before = trainer.args.to_dict()
    trainer.train()
    assert trainer.args.to_dict() == before


def test_processes_that_share_rows_count_once(trainer: finetune.Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (trainer.get_tp_size(), trainer.get_cp_size(), trainer.get_sp_size()) == (1, 1, 1)
    assert trainer.get_total_train_batch_size(trainer.args) == 8
    trainer.model._tp_size = 2
    monkeypatch.setattr(type(trainer.args), "world_size", 6)
    assert trainer.get_total_train_batch_size(trainer.args) == 4 * 2 * 3
    labels = {"labels": torch.tensor([1, 2, -100])}
    assert trainer._get_num_items_in_batch([labels, labels], torch.device("cpu")) == 4 / 2


def test_splitting_rows_is_refused(trainer: finetune.Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = SimpleNamespace(cp_size=2, sp_size=1, tp_size=1)
    monkeypatch.setattr(type(trainer.accelerator), "parallelism_config", asked)
    with pytest.raises(ArgumentError, match="`cp_size` and `sp_size`"):
        trainer._validate_args()


def test_label_smoothing_of_several_labels_is_refused(tiny_bert: Any, tmp_path: Path) -> None:
    args = finetune.TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, **COMMON)
    with pytest.raises(ArgumentError, match=r"`label_smoothing_factor`.*multi_label_classification"):
        finetune.Trainer(model=tiny_bert(problem_type="multi_label_classification"), args=args)


def test_folders_of_trials(trainer: finetune.Trainer, tmp_path: Path) -> None:
    trial = SimpleNamespace(number=3)
    assert trainer._get_output_dir(trial) == str(tmp_path), "outside a search there are no trials"
    trainer.hp_search_backend = "optuna"
    assert trainer._get_output_dir(trial) == str(tmp_path / "run-3")
    trainer.hp_name = lambda trial: f"mine-{trial.number}"
    assert trainer._get_output_dir(trial) == str(tmp_path / "mine-3")


def test_questions_about_an_optimizer_that_is_not_there(trainer: finetune.Trainer) -> None:
    with pytest.raises(ArgumentError, match="`create_optimizer`"):
        trainer.get_learning_rates()
    trainer.create_optimizer()
    assert trainer.get_learning_rates() == [5e-5, 5e-5]
    parameter = next(trainer.model.parameters())
    group = trainer.get_optimizer_group(parameter)
    assert any(member is parameter for member in group["params"])
    assert trainer.get_num_trainable_parameters() == sum(p.numel() for p in trainer.model.parameters())


def test_an_empty_batch_is_an_error(trainer: finetune.Trainer) -> None:
    trainer._set_signature_columns_if_needed()
    with pytest.raises(ArgumentError, match="columns it takes: input_ids"):
        trainer._prepare_inputs({})


def test_no_training_data(trainer: finetune.Trainer) -> None:
    with pytest.raises(ArgumentError, match="pass `train_dataset`"):
        trainer.train()
    assert trainer.is_in_train is False
    with pytest.raises(ArgumentError, match="pass `eval_dataset`"):
        trainer.evaluate()


def test_persistent_workers_keep_their_loader(tiny_bert: Any, tmp_path: Path) -> None:
    args = finetune.TrainingArguments(
        str(tmp_path), dataloader_persistent_workers=True, dataloader_num_workers=1, **COMMON
    )
    trainer = finetune.Trainer(model=tiny_bert(), args=args, eval_dataset={"a": rows(), "b": rows(4)})
    first = trainer.get_eval_dataloader("a")
    assert trainer.get_eval_dataloader("a") is first
    assert trainer.get_eval_dataloader("b") is not first
    trainer.eval_dataset = rows()
    own = trainer.get_eval_dataloader()
    assert trainer.get_eval_dataloader(trainer.eval_dataset) is own
    assert trainer.get_eval_dataloader(rows(4)) is not own, "other rows have a loader of their own"
    assert trainer.get_eval_dataloader() is own


def compiled_run(make_bert: Any, out: Path, **options: Any) -> tuple[finetune.Trainer, list[float]]:
    args = finetune.TrainingArguments(
        str(out), max_steps=2, logging_steps=1, gradient_accumulation_steps=2, save_strategy="no",
        per_device_train_batch_size=2, **COMMON, **options,
    )  # fmt: skip
    model = make_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    trainer = finetune.Trainer(model=model, args=args, train_dataset=rows(), eval_dataset=rows())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer, [*losses, trainer.evaluate()["eval_loss"]]


def test_compiled_models_train_and_evaluate_the_same(tiny_bert: Any, tmp_path: Path) -> None:
    trainer, losses = compiled_run(tiny_bert, tmp_path)
    torch._dynamo.reset()
    trainer, compiled = compiled_run(tiny_bert, tmp_path, torch_compile_backend="eager")
    assert trainer.state.log_history[0]["compiled_graphs"] >= 1
    assert not any("_compiled_call_impl" in module.__dict__ for module in trainer.model.modules())
    assert compiled == pytest.approx(losses, rel=1e-5)
    with pytest.raises(ArgumentError, match=r"`torch_compile_backend` is 'eagre'.*Did you mean `eager`"):
        compiled_run(tiny_bert, tmp_path, torch_compile_backend="eagre")


def test_ending_a_run_ends_the_trackers(trainer: finetune.Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[bool] = []
    monkeypatch.setattr(trainer.accelerator, "end_training", lambda: ended.append(True))
    trainer.end()
    assert ended == [True]


def test_idle_accelerators_are_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    for device, world_size in (("cpu", 1), ("cuda", 4)):
        checks.warn_of_idle_devices(SimpleNamespace(device=torch.device(device), world_size=world_size))  # pyright: ignore
    assert caplog.text == ""
    checks.warn_of_idle_devices(SimpleNamespace(device=torch.device("cuda"), world_size=1))  # pyright: ignore
    assert "4 accelerators are visible and one is used" in caplog.text and "--num_processes 4" in caplog.text


def test_slow_bfloat16_is_said(tiny_bert: Any, tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    for has_units, options in (
        (True, {"bf16": True}),
        (False, {}),
        (False, {"bf16": True}),
        (False, {"bf16_full_eval": True}),
    ):
        monkeypatch.setattr(checks, "cpu_has_bfloat16", lambda has_units=has_units: has_units)
        caplog.clear()
        finetune.Trainer(tiny_bert(), finetune.TrainingArguments(str(tmp_path), use_cpu=True, **options))
        assert ("no bfloat16 arithmetic" in caplog.text) == (not has_units and bool(options)), (has_units, options)


def test_starting_again_with_updated_weights_is_said(caplog: pytest.LogCaptureFixture) -> None:
    run = SimpleNamespace(initial_step=2, plan=SimpleNamespace(accumulation=3))
    checks.warn_of_second_start(run, 2, 4)
    checks.warn_of_second_start(None, 7, 4)
    assert caplog.text == ""
    checks.warn_of_second_start(run, 7, 4)
    assert "after 5 updates" in caplog.text and "`per_device_train_batch_size` 4" in caplog.text


def test_a_smaller_batch_size_is_said_with_what_it_makes_of_a_step(caplog: pytest.LogCaptureFixture) -> None:
    run = SimpleNamespace(initial_step=2, plan=SimpleNamespace(accumulation=3))
    checks.warn_of_second_start(run, 2, 8, tried=8)
    checks.warn_of_second_start(None, 2, 4, tried=8)
    assert caplog.text == ""
    checks.warn_of_second_start(run, 2, 4, tried=8)
    assert "now has 12 rows per process instead of 24" in caplog.text


@pytest.mark.parametrize(
    ("strategy", "warns"), [("group_by_length", True), ("batch_rebalance", True), ("random", False)]
)
def test_an_order_that_a_stream_cannot_have_is_said(
    strategy: str, warns: bool, tiny_llama: Any, padded_dataset: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = finetune.TrainingArguments(str(tmp_path), use_cpu=True, max_steps=1, train_sampling_strategy=strategy)
    trainer = finetune.Trainer(tiny_llama(), args, train_dataset=padded_dataset(4).to_iterable_dataset())
    trainer.get_train_dataloader()
    assert ("has no effect: the training data is a stream" in caplog.text) is warns


def test_the_overflow_debugger_reports_and_goes(tiny_bert: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_bert()
    with setup.underflow_debugger(model, []):
        assert not any(module._forward_hooks for module in model.modules())
    with setup.underflow_debugger(model, ["underflow_overflow"]):
        assert any(module._forward_hooks for module in model.modules())
        with torch.no_grad():
            model.classifier.weight.fill_(float("inf"))
        with pytest.raises(ValueError, match="inf/nan"):
            model(input_ids=torch.ones(1, 4, dtype=torch.long))
    assert "Detected inf/nan" in capsys.readouterr().out
    assert not any(module._forward_hooks for module in model.modules())


def test_information_is_shown_when_it_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = logging.getLogger("finetune")
    monkeypatch.setattr(ours, "handlers", [])
    monkeypatch.setattr(ours, "propagate", False)  # pytest's own handler would count
    level, theirs = ours.level, transformers.utils.logging.get_verbosity()
    try:
        setup.set_log_level(finetune.TrainingArguments(str(tmp_path), log_level="warning", **COMMON))
        assert ours.handlers == []
        setup.set_log_level(finetune.TrainingArguments(str(tmp_path), log_level="info", **COMMON))
        setup.set_log_level(finetune.TrainingArguments(str(tmp_path), log_level="info", **COMMON))
        assert len(ours.handlers) == 1
    finally:
        ours.setLevel(level)
        transformers.utils.logging.set_verbosity(theirs)


class Bomb(finetune.TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise KeyError("bomb")


@pytest.mark.parametrize("saves", [True, False])
def test_an_exception_saves_if_asked_and_goes_on_to_the_caller(saves: bool, tiny_bert: Any, tmp_path: Path) -> None:
    args = finetune.TrainingArguments(str(tmp_path), save_on_exception=saves, save_strategy="no", **COMMON)
    trainer = finetune.Trainer(model=tiny_bert(), args=args, train_dataset=rows(), callbacks=[Bomb()])
    with pytest.raises(KeyError, match="bomb"):
        trainer.train()
    assert (tmp_path / "checkpoint-1").is_dir() == saves


@pytest.mark.parametrize("during", ["train", "evaluate"])
def test_an_error_leaves_no_bar_open(during: str, tiny_bert: Any, tmp_path: Path) -> None:
    class Failing(finetune.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise RuntimeError("here")

        on_prediction_step = on_step_end

    args = finetune.TrainingArguments(str(tmp_path), **{**COMMON, "disable_tqdm": False})
    trainer = finetune.Trainer(
        model=tiny_bert(), args=args, train_dataset=rows(), eval_dataset=rows(), callbacks=[Failing]
    )
    progress = next(known for known in trainer.callback_handler.callbacks if isinstance(known, ProgressCallback))
    trainer.remove_callback(progress)
    trainer.callback_handler.callbacks.insert(0, progress)
    with pytest.raises(RuntimeError, match="here"):
        getattr(trainer, during)()
    assert progress.training_bar is progress.prediction_bar is None


def test_the_output_folder_is_there_from_the_start(tiny_bert: Any, tmp_path: Path) -> None:
    finetune.Trainer(tiny_bert(), finetune.TrainingArguments(str(tmp_path / "a" / "b"), **COMMON))
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    trainer = finetune.Trainer(
        tiny_bert(), finetune.TrainingArguments(str(tmp_path / "file" / "b"), **COMMON), eval_dataset=rows()
    )
    assert "eval_loss" in trainer.evaluate(), "evaluating needs no folder"


def test_the_process_that_does_not_save_makes_no_folder(tiny_bert: Any, tmp_path: Path, monkeypatch: Any) -> None:
    args = finetune.TrainingArguments(str(tmp_path / "out"), **COMMON)
    monkeypatch.setattr(type(args), "should_save", False)
    finetune.Trainer(tiny_bert(), args)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("devices", [{"": 0}, {"": "cpu"}, {"a": 0, "b": 1}, {}])
def test_a_model_with_a_device_map_is_not_moved(devices: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, moved = torch.nn.Linear(1, 1), []
    monkeypatch.setattr(model, "to", moved.append)
    setup.move_model(model, torch.device("cpu"))
    model.hf_device_map = devices  # pyright: ignore[reportArgumentType,reportAttributeAccessIssue]
    setup.move_model(model, torch.device("cpu"))
    assert moved == [torch.device("cpu")]


def test_arguments_set_later_are_the_ones_that_hold(trainer: finetune.Trainer, tmp_path: Path) -> None:
    seen: list[Any] = []

    class Sees(finetune.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(args)

    trainer.add_callback(Sees())
    trainer.train_dataset = rows()
    options = {"per_device_train_batch_size": 2, "max_steps": 3, "logging_steps": 1, "save_strategy": "no"}
    trainer.args = args = finetune.TrainingArguments(str(tmp_path / "new"), **options, **COMMON)
    assert trainer.train().global_step == 3 and trainer.args is args
    assert seen == [args] * 3 and trainer.state.train_batch_size == 2
    assert len([entry for entry in trainer.state.log_history if "loss" in entry]) == 3
    trainer.args = transformers.TrainingArguments(str(tmp_path), seed=5, **COMMON)  # pyright: ignore
    assert isinstance(trainer.args, finetune.TrainingArguments) and trainer.args.seed == 5


def test_the_precision_that_a_launcher_chose_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.hub.card import hyperparameters
    from finetune.reporting.header import _dtype_text
    from finetune.reporting.planned_step import mixed_dtype

    model = torch.nn.Linear(1, 1)
    plain = finetune.TrainingArguments(str(tmp_path), **COMMON)
    assert mixed_dtype(plain) is None and "mixed_precision_training" not in hyperparameters(plain)
    assert "no autocast" in _dtype_text(model, plain)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    args = finetune.TrainingArguments(str(tmp_path), **COMMON)
    assert args.bf16 is False and mixed_dtype(args) is torch.bfloat16
    assert hyperparameters(args)["mixed_precision_training"] == "bf16"
    assert "computed in bfloat16" in _dtype_text(model, args)


@pytest.mark.parametrize("optim", ["galore_adamw_layerwise", "apollo_adamw_layerwise", "lomo"])
def test_an_optimizer_that_works_in_backward_leaves_the_model_after_training(
    optim: str, tiny_bert: Any, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"max_steps": 1, "learning_rate": 0.01, "max_grad_norm": 0.0, "save_strategy": "no"}
    if optim == "lomo":
        pytest.importorskip("lomo_optim")
    else:
        options |= {"optim_target_modules": "all-linear", "optim_args": "rank=4"}
    model = tiny_bert()
    args = finetune.TrainingArguments(str(tmp_path), optim=optim, **options, **COMMON)
    trainer = finetune.Trainer(model=model, args=args, train_dataset=rows())
    trainer.train()
    weights = [p.detach().clone() for p in model.parameters()]
    model(input_ids=torch.arange(3, 9).unsqueeze(0), labels=torch.tensor([1])).loss.backward()
    assert all(map(torch.equal, model.parameters(), weights))
    assert all(p.grad is not None for p in model.parameters())
    trainer.train()
    assert not all(map(torch.equal, model.parameters(), weights)), "the next run trains again"
