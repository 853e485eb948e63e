"""`SFTConfig`: the rule that chooses the precision, derived values and refused combinations."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from finetune.errors import ArgumentError
from finetune.sft import config as sft_config
from finetune.sft.config import SFTConfig


@pytest.mark.parametrize(
    ("given", "launched", "device", "expected"),
    [
        ({}, "no", "bf16", (True, False)),
        ({}, "no", "fp16", (False, True)),
        ({}, "no", "no", (False, False)),
        ({}, "bf16", "no", (True, False)),
        ({}, "fp16", "bf16", (False, False)),
        ({"fp16": True}, "no", "bf16", (False, True)),
        ({"bf16": False}, "no", "bf16", (False, False)),
        ({"bf16": True}, "no", "no", (True, False)),
    ],
)
def test_precision_is_chosen_from_what_was_given_the_launcher_and_the_device(
    monkeypatch, given, launched, device, expected
):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    monkeypatch.setattr(sft_config, "best_precision", lambda use_cpu: device)
    monkeypatch.setattr("finetune.arguments.training.accelerator_present", lambda: True)
    monkeypatch.setattr("finetune.arguments.training.bf16_supported", lambda: True)
    args = SFTConfig("out", **given)
    assert (args.bf16, args.fp16) == expected
    assert dataclasses.replace(args, seed=1).mixed_precision == args.mixed_precision
    assert args.mixed_precision == (
        "fp16" if launched == "fp16" else "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
    )


def test_fp16_under_a_bf16_launcher_is_told_so(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ArgumentError, match="`fp16=True` disagrees with ACCELERATE_MIXED_PRECISION=bf16"):
        SFTConfig("out", fp16=True)


def test_on_this_cpu_the_run_is_in_float32():
    args = SFTConfig("out", use_cpu=True)
    assert (args.bf16, args.fp16, args.mixed_precision) == (False, False, "no")


def test_changed_defaults():
    args = SFTConfig("out")
    assert (args.learning_rate, args.logging_steps, args.gradient_checkpointing) == (2e-5, 10, None)
    assert args.activation_checkpointing is None, "decided when training starts"
    assert SFTConfig("out", gradient_checkpointing=True).activation_checkpointing is True
    assert SFTConfig("out", activation_checkpointing=False).gradient_checkpointing is False
    assert SFTConfig("out", gradient_checkpointing=False).activation_checkpointing is False


@pytest.mark.parametrize(("given", "expected"), [("auto", None), (None, None), ("none", None), (8, 8), ("64", 64)])
def test_pad_to_multiple_of(given, expected):
    assert SFTConfig("out", pad_to_multiple_of=given).pad_to_multiple_of == expected


def test_vocabulary_tokens_survive_a_rebuild():
    args = SFTConfig("out", eos_token="<|im_end|>")
    assert SFTConfig(**args.to_dict()).eos_token == "<|im_end|>"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"packing_strategy": "bdf"}, "Did you mean `bfd`"),
        ({"loss_type": "nnl"}, "Did you mean `nll`"),
        ({"truncation_mode": "keep"}, "is not one of"),
        ({"max_length": 0}, "`max_length=0` must be at least 2"),
        ({"max_length": 1}, "must be at least 2"),
        ({"data_audit": "wran"}, "Did you mean `warn`"),
        ({"loss_type": "dft", "label_smoothing_factor": 0.1}, "`loss_type='dft'`.*`label_smoothing_factor=0.1`"),
        ({"packing": True, "max_length": None}, "set `max_length`"),
        ({"eval_packing": True, "max_length": None}, "set `max_length`"),
        ({"dataset_kwargs": {"add_special_tokens": "no"}}, "allowed are True and False"),
        ({"dataset_kwargs": {"skip_prepare": True}}, "Did you mean `skip_prepare_dataset`"),
        ({"pad_to_multiple_of": -8}, "must be above 0"),
        ({"pad_to_multiple_of": "eight"}, "`pad_to_multiple_of='eight'`"),
        ({"max_lenght": 3}, "Did you mean `max_length`"),
        ({"model_init_kwargs": "x"}, "`model_init_kwargs='x'` must be a dict"),
        ({"bf16": True, "fp16": True}, "exclude each other"),
    ],
)
def test_what_cannot_be_honoured_is_refused(given, message):
    with pytest.raises(ArgumentError, match=message):
        SFTConfig("out", **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"per_device_train_batch_size": 2.5}, "`per_device_train_batch_size=2.5` must be a whole number."),
        ({"per_device_train_batch_size": None}, "`per_device_train_batch_size=None` must be a whole number."),
        ({"max_length": 12.5}, "`max_length=12.5` must be a whole number or None."),
        ({"dataset_num_proc": 0.5}, "`dataset_num_proc=0.5` must be a whole number or None."),
        ({"seed": 1.5}, "`seed=1.5` must be a whole number."),
        ({"learning_rate": None}, "`learning_rate=None` must be a number."),
        ({"learning_rate": [1e-4]}, "`learning_rate=[0.0001]` must be a number."),
        ({"report_to": 5}, "`report_to=5` must be a string, a list or None."),
        ({"output_dir": 5}, "`output_dir=5` must be a string or None."),
        ({"model_init_kwargs": 5}, "`model_init_kwargs=5` must be a dict, a string or None."),
        ({"packing": [True]}, "`packing=[True]` must be true or false."),
    ],
)
def test_values_of_a_wrong_type_are_refused_by_name(given, message):
    with pytest.raises(ArgumentError) as caught:
        SFTConfig(**{"output_dir": "out", **given})
    assert str(caught.value) == message


def test_a_wrong_output_dir_by_position_is_refused():
    with pytest.raises(ArgumentError, match="`output_dir=5` must be a string or None"):
        SFTConfig(5)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("per_device_train_batch_size", 2.0, 2),
        ("per_device_train_batch_size", np.int64(4), 4),
        ("learning_rate", np.float32(0.5), 0.5),
        ("max_grad_norm", None, 0.0),
        ("eval_steps", 0.1, 0.1),
        ("packing", 1, True),
        ("packing", np.bool_(True), True),
        ("resume_from_checkpoint", True, True),
    ],
)
def test_numbers_become_those_of_python(name, given, expected):
    read = getattr(SFTConfig("out", **{name: given}), name)
    assert read == expected
    assert isinstance(read, (type(expected), np.bool_))


def test_fields_of_a_users_class_are_not_checked():
    @dataclasses.dataclass
    class Mine(SFTConfig):
        learning_rate: float = None  # type: ignore[assignment]  # pyright: ignore
        ratio: int = 1

    args = Mine("out", ratio=0.5)  # pyright: ignore[reportArgumentType]
    assert (args.ratio, dataclasses.replace(args, seed=1).learning_rate) == (0.5, None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"activation_offloading": True}, "`activation_offloading=True` has no effect on a CPU"),
        ({"activation_offloading": True, "torch_compile": True}, "no effect on compiled layers"),
        ({"use_cache": True}, "`use_cache=True` has no effect in `SFTTrainer`"),
        ({"gradient_checkpointing": False, "gradient_checkpointing_kwargs": {"every_n_layers": 2}}, "has no effect"),
    ],
)
def test_what_has_no_effect_is_said(given: dict[str, Any], message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        SFTConfig("out", use_cpu=True, **given)


def test_settings_of_an_unset_recomputation_have_an_effect(recwarn: Any) -> None:
    SFTConfig("out", use_cpu=True, gradient_checkpointing_kwargs={"every_n_layers": 2})
    assert not [w for w in recwarn if "no effect" in str(w.message)]
