"""`TrainingArguments`: derived values, refused combinations, independence from what the caller passed."""

import inspect
import json
import logging
import warnings
from dataclasses import dataclass, field, fields, replace
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.arguments import REGISTERED_OPTIMIZERS, AcceleratorConfig, TrainingArguments, parse_arguments
from finetune.compat import DebugOption, IntervalStrategy, OptimizerNames
from finetune.errors import ArgumentError


def test_signature_has_output_dir_first_and_the_rest_by_keyword():
    first, *rest = inspect.signature(TrainingArguments).parameters.values()
    assert (first.name, first.kind) == ("output_dir", first.POSITIONAL_OR_KEYWORD)
    assert {parameter.kind for parameter in rest} == {first.KEYWORD_ONLY}


def test_every_field_has_a_help_text():
    assert [f.name for f in fields(TrainingArguments) if not f.metadata.get("help")] == []


def test_unknown_argument_names_the_nearest():
    message = r"TrainingArguments has no argument `learning_rte`\. Did you mean `learning_rate`\?"
    with pytest.raises(ArgumentError, match=message):
        TrainingArguments("out", learning_rte=1)


def test_derived_values():
    args = TrainingArguments(
        "~/out",
        eval_strategy="steps",
        logging_steps=20.0,
        load_best_model_at_end=True,
        save_steps=40,
        debug="underflow_overflow",
    )
    assert not args.output_dir.startswith("~")
    assert (args.do_eval, args.eval_steps, type(args.eval_steps)) == (True, 20, int)
    assert (args.metric_for_best_model, args.greater_is_better) == ("loss", False)
    assert args.debug == [DebugOption.UNDERFLOW_OVERFLOW]
    assert isinstance(args.eval_strategy, IntervalStrategy) and isinstance(args.optim, OptimizerNames)
    assert TrainingArguments("out", metric_for_best_model="accuracy").greater_is_better is True
    assert TrainingArguments().output_dir == "trainer_output"
    assert TrainingArguments("out", torch_compile_mode="default").torch_compile_backend == "inductor"
    assert TrainingArguments("out", use_cpu=True).dataloader_pin_memory is False


def test_containers_of_the_caller_are_copied():
    config, trackers = {"fsdp_version": 2, "cpu_offload": True}, ["tensorboard"]
    args = TrainingArguments("out", fsdp="full_shard", fsdp_config=config, report_to=trackers)
    args.report_to.append("wandb")
    assert config == {"fsdp_version": 2, "cpu_offload": True}
    assert trackers == ["tensorboard"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [("none", []), (None, []), ("wandb", ["wandb"]), (["wandb", "mlflow"], ["wandb", "mlflow"])],
)
def test_report_to(given, expected):
    assert TrainingArguments("out", report_to=given).report_to == expected


def test_kubeflow_is_added_inside_its_job(monkeypatch):
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", "http://localhost")
    assert TrainingArguments("out").report_to == ["kubeflow"]
    monkeypatch.setenv("DISABLE_KUBEFLOW_INTEGRATION", "TRUE")
    assert TrainingArguments("out").report_to == []


def test_texts_are_read_after_the_parser_of_transformers_changed_the_fields() -> None:
    from transformers import HfArgumentParser

    HfArgumentParser(TrainingArguments)  # type: ignore[arg-type]
    assert TrainingArguments("o", neftune_noise_alpha="none").neftune_noise_alpha is None  # pyright: ignore


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("learning_rate", "1e-4", 1e-4),
        ("num_train_epochs", "3", 3.0),
        ("max_steps", "10", 10),
        ("logging_steps", "0.1", 0.1),
        ("save_total_limit", "2", 2),
        ("neftune_noise_alpha", "none", None),
        ("bf16", "false", False),
        ("remove_unused_columns", "False", False),
        ("gradient_checkpointing", "yes", True),
    ],
)
def test_numbers_and_truth_values_in_texts_are_read_as_on_a_command_line(name, text, value):
    """YAML takes `1e-4` for a text, and every text but the empty one is true."""
    read = getattr(TrainingArguments("o", **{name: text}), name)
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("learning_rate", "fast", "`learning_rate`: 'fast' is not a number"),
        ("max_steps", "1.5", "`max_steps`: '1.5' is not a whole number"),
        ("bf16", "maybe", "`bf16`: 'maybe' is not true or false"),
    ],
)
def test_texts_that_say_no_number_are_refused(name, text, message):
    with pytest.raises(ArgumentError, match=message):
        TrainingArguments("o", **{name: text})


def test_json_texts_become_dicts():
    args = TrainingArguments("out", lr_scheduler_kwargs='{"num_cycles": "3", "flag": "true", "x": {"y": "0.5"}}')
    assert args.lr_scheduler_kwargs == {"num_cycles": 3, "flag": True, "x": {"y": 0.5}}
    with pytest.raises(ArgumentError, match=r"`lr_scheduler_kwargs=.*not valid JSON"):
        TrainingArguments("out", lr_scheduler_kwargs="{3")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bf16": True, "fp16": True}, "exclude each other"),
        ({"bf16_full_eval": True, "fp16_full_eval": True}, "exclude each other"),
        ({"fp16": True, "use_cpu": True}, "`fp16=True` needs an accelerator"),
        ({"tf32": True}, "`tf32=True` needs"),
        ({"load_best_model_at_end": True}, "`load_best_model_at_end=True` needs every checkpoint"),
        (
            {"load_best_model_at_end": True, "save_strategy": "no"},
            "`load_best_model_at_end=True` needs every checkpoint",
        ),
        (
            {"load_best_model_at_end": True, "eval_strategy": "epoch"},
            "save_strategy='steps'` and `eval_strategy='epoch'",
        ),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 300},
            "not a multiple of `eval_steps=300`",
        ),
        ({"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 0.1}, "one is a share"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 0.2, "save_steps": 0.3},
            "not a multiple",
        ),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "follows a metric: set `eval_strategy`"),
        ({"lr_scheduler_type": "greedy"}, "follows a metric: set `eval_strategy`"),
        ({"save_strategy": "best"}, "needs evaluation"),
        ({"lr_scheduler_type": "linaer"}, "Did you mean `linear`"),
        ({"optim": "adamw_torhc"}, "Did you mean `adamw_torch`"),
        ({"logging_steps": 0}, "`logging_steps=0` must be above 0"),
        ({"logging_steps": 2.5}, "whole number of steps"),
        ({"save_steps": -1}, "`save_steps=-1` must be above 0"),
        ({"eval_strategy": "steps", "eval_steps": 2.5}, "whole number of steps"),
        ({"warmup_steps": -1}, "`warmup_steps=-1` must be at least 0"),
        ({"dataloader_prefetch_factor": 2}, "set `dataloader_num_workers` above 0"),
        ({"dataloader_multiprocessing_context": "thread"}, "is not one of"),
        ({"train_sampling_strategy": "by_length"}, "Did you mean `group_by_length`"),
        ({"torch_empty_cache_steps": 0}, "whole number above 0"),
        ({"num_train_epochs": None}, "`num_train_epochs=None` must be at least 0 and finite, unless `max_steps` is"),
        ({"max_steps": None}, "`max_steps=None` must be a number of whole steps"),
        ({"max_steps": float("inf")}, "`max_steps=inf` must be a whole number"),
        ({"max_steps": "inf"}, "`max_steps`: 'inf' is not a whole number"),
        ({"num_train_epochs": float("inf")}, "`num_train_epochs=inf` must be at least 0 and finite"),
        ({"logging_steps": float("inf")}, "`logging_steps=inf` must be a whole number of steps"),
        ({"save_steps": float("inf")}, "`save_steps=inf` must be a whole number of steps"),
        ({"eval_strategy": "steps", "eval_steps": float("inf")}, "`eval_steps=inf` must be a whole number of steps"),
        ({"liger_kernel_config": "rope"}, "`liger_kernel_config='rope'` must be a dict"),
        ({"lr_scheduler_kwargs": ["a"]}, "`lr_scheduler_kwargs=.*must be a dict"),
        ({"gradient_checkpointing_kwargs": {"selective": True}}, "`gradient_checkpointing` is off"),
        (
            {
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"selective": True, "use_reentrant": True},
            },
            "exclude each other",
        ),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": '{"selective": true}'}, None),
        ({"gradient_checkpointing_kwargs": {"selective": False}}, None),
        ({"per_device_train_batch_size": 0}, "must be above 0"),
        ({"gradient_accumulation_steps": 0}, "must be above 0"),
        ({"label_smoothing_factor": 1.5}, "must be in"),
        ({"label_smoothing_factor": 1.0}, "must be in"),
        ({"adam_beta2": 1.0}, "must be in"),
        ({"include_for_metrics": ["input"]}, "Did you mean `inputs`"),
        ({"include_num_input_tokens_seen": "some"}, "is not one of"),
        ({"log_level": "loud"}, "is not one of"),
        ({"nonfinite_policy": "ignore"}, "is not one of"),
        ({"save_total_limit": 2, "keep_last": 1}, "one of the two policies"),
        ({"keep_best": 0}, "must be above 0"),
        ({"keep_best": 2}, "needs every checkpoint to be evaluated"),
        ({"keep_best": 2, "eval_strategy": "epoch"}, "needs every checkpoint to be evaluated"),
        (
            {"keep_best": 2, "eval_strategy": "steps", "eval_steps": 4, "save_steps": 6},
            "not a multiple of.*or drop `keep_best`",
        ),
        ({"keep_best": 2, "eval_strategy": "steps", "eval_steps": 3, "save_steps": 6}, None),
        ({"keep_best": 2, "eval_strategy": "epoch", "save_strategy": "epoch"}, None),
        ({"keep_best": 2, "eval_strategy": "epoch", "save_strategy": "best"}, None),
        ({"keep_best": 2, "save_strategy": "no"}, None),
        ({"fsdp": True, "deepspeed": {}}, None),
        ({"fsdp": True, "deepspeed": "ds.json"}, "exclude each other"),
        ({"fsdp": "full_shrad"}, "Did you mean `full_shard`"),
        ({"fsdp": "hybrid_shard"}, "exists only in FSDP1"),
        ({"fsdp": True, "fsdp_config": "missing.json"}, "there is no such file"),
        ({"fsdp": True, "fsdp_config": {"auto_wrap_policy": "ALL"}}, "is not one of"),
        ({"ddp_backend": "ncl"}, "Did you mean `nccl`"),
        ({"accelerator_config": {"split_batch": True}}, "Did you mean `split_batches`"),
        ({"accelerator_config": AcceleratorConfig}, "pass an instance"),
        ({"accelerator_config": {"use_configured_state": True}}, "needs an `Accelerator`"),
        ({"output_dir": ""}, "`output_dir` is empty"),
    ],
)
def test_what_cannot_be_honoured_is_refused(given, message):
    given = {"output_dir": "out", **given}
    if message is None:
        TrainingArguments(**given)
        return
    with pytest.raises(ArgumentError, match=message):
        TrainingArguments(**given)


@pytest.mark.parametrize("shares", [(0.3, 0.1), (0.1, 0.1), (1000, 500)])
def test_multiples_of_eval_steps_are_accepted(shares):
    save, evaluate = shares
    TrainingArguments("o", load_best_model_at_end=True, eval_strategy="steps", save_steps=save, eval_steps=evaluate)


def test_registered_optimizers_are_accepted(monkeypatch):
    monkeypatch.setattr("finetune.arguments.optimization.REGISTERED_OPTIMIZERS", REGISTERED_OPTIMIZERS | {"mine"})
    assert TrainingArguments("out", optim="mine").optim == "mine"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, False),
        ({"gradient_checkpointing": True}, True),
        ({"activation_checkpointing": True}, True),
        ({"activation_checkpointing": True, "gradient_checkpointing": True}, True),
    ],
)
def test_the_two_names_of_checkpointing_agree(given, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        args = TrainingArguments("out", **given)
    assert (args.gradient_checkpointing, args.activation_checkpointing) == (expected, expected)


def test_disagreeing_names_of_checkpointing_are_said():
    with pytest.warns(UserWarning, match="`gradient_checkpointing=True` is ignored"):
        args = TrainingArguments("out", activation_checkpointing=False, gradient_checkpointing=True)
    assert args.gradient_checkpointing is False


def test_launcher_that_disagrees_is_named(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ArgumentError, match="`bf16=True` disagrees with ACCELERATE_MIXED_PRECISION=fp16"):
        TrainingArguments("out", bf16=True)
    assert TrainingArguments("out").mixed_precision == "fp16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert TrainingArguments("out", bf16=True).mixed_precision == "bf16"
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ArgumentError, match="`gradient_accumulation_steps=1` disagrees with ACCELERATE_GRADIENT"):
        TrainingArguments("out")
    TrainingArguments("out", gradient_accumulation_steps=4)


def test_tokens_are_not_shown_and_a_rebuild_has_none():
    args = TrainingArguments("out", hub_token="hf_secret")
    assert args.hub_token == "hf_secret"
    for text in (repr(args), str(args), args.to_json_string(), str(args.to_sanitized_dict())):
        assert "hf_secret" not in text
        assert "<HUB_TOKEN>" in text
    assert TrainingArguments(**json.loads(args.to_json_string())).hub_token is None


def test_a_users_subclass_keeps_everything():
    @dataclass
    class MyArguments(TrainingArguments):
        flavour: str = field(default="plain", metadata={"help": "taste"})
        hub_secret_token: str = "x"

    args = MyArguments("out", flavour="hot", hub_token="hf_secret", hub_secret_token="hush")
    assert (args.output_dir, args.flavour, replace(args, flavour="mild").flavour) == ("out", "hot", "mild")
    assert "hf_secret" not in repr(args)
    assert args.to_dict()["hub_secret_token"] == "<HUB_SECRET_TOKEN>"
    with pytest.raises(ArgumentError, match="Did you mean `flavour`"):
        MyArguments("out", flavor="hot")


@pytest.mark.parametrize(
    ("warmup", "total", "expected"), [(0, 10, 0), (0.05, 50, 3), (0.5, 3, 2), (1, 50, 1), (7, 50, 7), (7.9, 50, 7)]
)
def test_warmup_steps(warmup, total, expected):
    assert TrainingArguments("out", warmup_steps=warmup).get_warmup_steps(total) == expected


def test_log_level_of_main_and_other_processes(monkeypatch):
    args = TrainingArguments("out", log_level="info", log_level_replica="error")
    assert args.get_process_log_level() == logging.INFO
    monkeypatch.setitem(args.__dict__, "_distributed_state", type("State", (), {"local_process_index": 1})())
    assert args.get_process_log_level() == logging.ERROR
    assert args.should_log is False


def test_a_new_accelerator_can_be_made_for_other_arguments_but_a_copy_disturbs_none():
    from accelerate import Accelerator

    args = TrainingArguments("out", use_cpu=True)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    replace(args, seed=1)
    assert accelerator.state.mixed_precision == "no"
    other = TrainingArguments("out", use_cpu=True, bf16=True)
    assert Accelerator(mixed_precision=other.mixed_precision).state.mixed_precision == "bf16"


def test_processes_that_would_train_alone_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("accelerate.state.PartialState._prepare_backend", lambda *_: (None, __no_distribution()))
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr("torch.distributed.init_process_group", lambda **_: None)
    with pytest.raises(ArgumentError, match="started 2 processes, but no process group"):
        TrainingArguments("out")


def __no_distribution():
    from accelerate.utils import DistributedType

    return DistributedType.NO


def test_devices_that_stay_unused_are_left_to_the_trainer_to_say(monkeypatch, recwarn):
    import torch

    from finetune.arguments import processes

    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    state = SimpleNamespace(device=torch.device("cuda"), num_processes=1)
    assert processes._pick_device(state) == torch.device("cuda", 0)
    assert not recwarn.list


@pytest.mark.parametrize("name", ["eval_strategy", "logging_strategy", "save_strategy"])
def test_the_word_no_of_yaml_is_no_strategy(name, tmp_path):
    """YAML reads the bare word `no` as False."""
    assert getattr(TrainingArguments("out", **{name: False}), name) == "no"
    file = tmp_path / "run.yaml"
    file.write_text(f"output_dir: out\n{name}: no\n")
    (args,) = parse_arguments(TrainingArguments, ["--config", str(file)])
    assert getattr(args, name) == "no"


def test_no_norm_is_no_clipping() -> None:
    assert TrainingArguments("out", max_grad_norm=None, use_cpu=True).max_grad_norm == 0.0  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"eval_strategy": "step"},
            r"`eval_strategy='step'` is not one of \['no', 'steps', 'epoch'\]. Did you mean `steps`",
        ),
        ({"save_strategy": True}, "`save_strategy=True` is not one of"),
        ({"lr_scheduler_type": "cosin"}, "`lr_scheduler_type='cosin'` is not one of .* Did you mean `cosine`"),
        ({"hub_strategy": "never"}, "`hub_strategy='never'` is not one of"),
        ({"debug": "underflow"}, "`debug='underflow'` is not one of"),
    ],
)
def test_a_wrong_member_of_an_enumeration_is_named_with_its_argument(given, message):
    with pytest.raises(ArgumentError, match=message):
        TrainingArguments("out", **given)


def test_two_strategies_of_no_are_told_apart_from_unequal_ones():
    with pytest.raises(ArgumentError, match="Set both to 'steps' or both to 'epoch'"):
        TrainingArguments("out", load_best_model_at_end=True, save_strategy="no")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"liger_kernel_config": {"rope": True}}, "`liger_kernel_config` has no effect without"),
        ({"optim_target_modules": "all-linear"}, "`optim_target_modules` has no effect with `optim=adamw"),
        ({"optim_target_modules": "all-linear", "optim": "muon"}, "`optim_target_modules` has no effect with"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": False}}, "`gradient_checkpointing_kwargs` has no effect"),
    ],
)
def test_what_has_no_effect_is_said(given: dict[str, Any], message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        TrainingArguments("out", use_cpu=True, **given)


@pytest.mark.parametrize(
    "given",
    [
        {"liger_kernel_config": {"rope": True}, "use_liger_kernel": True},
        {"optim_target_modules": "all-linear", "optim": "galore_adamw"},
        {"gradient_checkpointing_kwargs": {"use_reentrant": False}, "gradient_checkpointing": True},
    ],
)
def test_what_has_an_effect_is_not(given: dict[str, Any], recwarn: Any) -> None:
    TrainingArguments("out", use_cpu=True, **given)
    assert not [w for w in recwarn if "no effect" in str(w.message)]
