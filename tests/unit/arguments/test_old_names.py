"""Names that transformers and TRL removed: accepted with one warning each, and acting."""

import warnings

import pytest

from finetune.arguments import TrainingArguments
from finetune.arguments.base import old_names_of
from finetune.arguments.old_names import READABLE_OLD_NAMES
from finetune.errors import ArgumentError
from finetune.sft.config import SFTConfig

# What is written, the field that changes, and its value.
ACTING = [
    ({"evaluation_strategy": "epoch"}, "eval_strategy", "epoch"),
    ({"evaluate_during_training": True}, "eval_strategy", "steps"),
    ({"per_gpu_train_batch_size": 3}, "per_device_train_batch_size", 3),
    ({"per_gpu_eval_batch_size": 3}, "per_device_eval_batch_size", 3),
    ({"no_cuda": True}, "use_cpu", True),
    ({"warmup_ratio": 0.1}, "warmup_steps", 0.1),
    ({"warmup_ratio": 0.1, "warmup_steps": 5}, "warmup_steps", 5),
    ({"group_by_length": True}, "train_sampling_strategy", "group_by_length"),
    ({"group_by_length": False}, "train_sampling_strategy", "random"),
    ({"adafactor": True}, "optim", "adafactor"),
    ({"label_smoothing": 0.1}, "label_smoothing_factor", 0.1),
    ({"include_inputs_for_metrics": True}, "include_for_metrics", ["inputs"]),
    ({"include_inputs_for_metrics": True, "include_for_metrics": ["loss"]}, "include_for_metrics", ["loss", "inputs"]),
    ({"include_tokens_per_second": True}, "include_num_input_tokens_seen", "all"),
    ({"push_to_hub_model_id": "m"}, "hub_model_id", "m"),
    ({"push_to_hub_organization": "org", "push_to_hub_model_id": "m"}, "hub_model_id", "org/m"),
    ({"push_to_hub_model_id": "m", "push_to_hub_organization": "org"}, "hub_model_id", "org/m"),
    ({"push_to_hub_organization": "org"}, "hub_model_id", "org/out"),
    ({"push_to_hub_token": "t"}, "hub_token", "t"),
    ({"torchdynamo": "eager"}, "torch_compile_backend", "eager"),
    ({"tpu_metrics_debug": True}, "debug", ["tpu_metrics_debug"]),
    ({"xpu_backend": "gloo"}, "ddp_backend", "gloo"),
    ({"use_liger": True}, "use_liger_kernel", True),
    ({"sharded_ddp": ""}, "fsdp", None),
    ({"past_index": -1}, "optim", "adamw_torch_fused"),
]

WITHOUT_EFFECT = [
    {"save_safetensors": False},
    {"half_precision_backend": "cuda_amp"},
    {"fp16_backend": "auto"},
    {"fp16_opt_level": "O2"},
    {"use_mps_device": True},
    {"use_ipex": True},
    {"jit_mode_eval": True},
    {"use_legacy_prediction_loop": True},
    {"tpu_num_cores": 8},
    {"ray_scope": "all"},
    {"mp_parameters": ""},
]


def make(cls, **given):
    """Returns the object and the messages of its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        args = cls("out", **given)
    return args, [str(item.message) for item in caught if item.category is FutureWarning]


@pytest.mark.parametrize(("given", "name", "value"), ACTING)
def test_old_names_act(given, name, value):
    args, messages = make(TrainingArguments, **given)
    assert getattr(args, name) == value
    old = [key for key in given if key in old_names_of(TrainingArguments)]
    assert len(messages) == len(old)
    assert all(any(f"`{key}`" in message for message in messages) for key in old)


@pytest.mark.parametrize("given", WITHOUT_EFFECT)
def test_names_without_effect_say_so(given):
    args, messages = make(TrainingArguments, **given)
    assert len(messages) == 1 and "drop it" in messages[0]
    assert args == TrainingArguments("out")


def test_all_old_names_are_in_these_tables():
    tested = {key for given, *_ in ACTING for key in given} | {key for given in WITHOUT_EFFECT for key in given}
    tested |= {
        "fsdp_min_num_params",
        "fsdp_transformer_layer_cls_to_wrap",
        "dispatch_batches",
        "split_batches",
        "_n_gpu",
    }
    assert set(old_names_of(TrainingArguments)) <= tested


def test_keys_that_moved_into_a_configuration():
    args, messages = make(
        TrainingArguments, split_batches=True, dispatch_batches=False, fsdp=True, fsdp_min_num_params=9
    )
    assert (args.accelerator_config.split_batches, args.accelerator_config.dispatch_batches) == (True, False)
    assert args.fsdp_config["min_num_params"] == 9
    assert len(messages) == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sharded_ddp": "simple"}, "use `fsdp=True`"),
        ({"past_index": 0}, "cannot be honoured"),
        ({"mp_parameters": "x"}, "SageMaker"),
        ({"warmup_ratio": 3}, "must be in"),
        ({"half_precision_backend": "fast"}, "not a mixed-precision backend"),
        ({"evaluation_strategy": "steps", "eval_strategy": "epoch"}, "disagree"),
    ],
)
def test_old_names_that_cannot_act_are_refused(given, message):
    with pytest.raises(ArgumentError, match=message), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        TrainingArguments("out", **given)


def test_a_warmup_ratio_of_one_is_the_whole_run():
    args, _ = make(TrainingArguments, warmup_ratio=1.0)
    assert args.get_warmup_steps(1000) == 1000


def test_the_warning_points_at_the_callers_line():
    with pytest.warns(FutureWarning, match="`evaluation_strategy` is an old argument of TrainingArguments") as caught:
        TrainingArguments("out", evaluation_strategy="no")
    assert caught[0].filename == __file__


def test_old_names_can_be_read_and_set():
    args = TrainingArguments("out", eval_strategy="epoch", warmup_steps=0.25)
    assert (args.evaluation_strategy, args.no_cuda, args.warmup_ratio, args.per_gpu_train_batch_size) == (
        "epoch",
        False,
        0.25,
        8,
    )
    with pytest.warns(FutureWarning, match="`group_by_length` is an old argument"):
        args.group_by_length = True
    assert args.train_sampling_strategy == "group_by_length"
    assert all(hasattr(args, name) for name in READABLE_OLD_NAMES)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = args.nonsense


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        ({"max_seq_length": 77}, "max_length", 77),
        ({"packing_strategy": "bfd-requeue"}, "packing_strategy", "bfd_split"),
        ({"packing_strategy": "ffd"}, "packing_strategy", "bfd"),
        ({"loss_type": "chunked_nll"}, "loss_type", "nll"),
        ({"use_liger": True}, "use_liger_kernel", True),
        ({"dataset_batch_size": 10}, "max_length", 1024),
        ({"num_of_sequences": 10}, "max_length", 1024),
        ({"chars_per_token": 3.6}, "max_length", 1024),
        ({"evaluation_strategy": "epoch"}, "eval_strategy", "epoch"),
    ],
)
def test_old_names_of_sft_act(given, name, value):
    args, messages = make(SFTConfig, **given)
    assert getattr(args, name) == value
    assert len(messages) == 1


@pytest.mark.parametrize(
    ("given", "assigned", "name", "value"),
    [
        ({"train_sampling_strategy": "group_by_length"}, {"group_by_length": False},
         "train_sampling_strategy", "random"),
        ({"train_sampling_strategy": "sequential"}, {"group_by_length": False},
         "train_sampling_strategy", "sequential"),
        ({"optim": "adafactor"}, {"adafactor": False}, "optim", "adamw_torch_fused"),
        ({"optim": "sgd"}, {"adafactor": False}, "optim", "sgd"),
        ({"include_num_input_tokens_seen": "all"}, {"include_tokens_per_second": False},
         "include_num_input_tokens_seen", "no"),
        ({"warmup_steps": 0.1}, {"warmup_ratio": 0.0}, "warmup_steps", 0),
        ({"warmup_steps": 5}, {"warmup_ratio": 0.0}, "warmup_steps", 5),
        ({"include_for_metrics": ["loss"]}, {"include_inputs_for_metrics": True},
         "include_for_metrics", ["loss", "inputs"]),
        ({"include_for_metrics": ["loss", "inputs"]}, {"include_inputs_for_metrics": False},
         "include_for_metrics", ["loss"]),
    ],
)  # fmt: skip
def test_old_attributes_can_be_turned_off(given, assigned, name, value):
    args = TrainingArguments("out", **given)
    for old, wanted in assigned.items():
        with pytest.warns(FutureWarning, match=f"`{old}` is an old argument"):
            setattr(args, old, wanted)
    assert getattr(args, name) == value


def test_an_old_name_of_the_repository_beside_none():
    args, _ = make(TrainingArguments, push_to_hub_model_id="m", hub_model_id=None)
    assert args.hub_model_id == "m"


@pytest.mark.parametrize(
    "name", ["sharded_ddp", "past_index", "mp_parameters", "fp16_backend", "half_precision_backend"]
)
def test_a_refused_old_name_is_named(name):
    with pytest.raises(ArgumentError, match=f"`{name}='strange'`"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        TrainingArguments("out", **{name: "strange"})


def test_a_misspelt_field_is_named_when_it_is_read():
    with pytest.raises(AttributeError, match="Did you mean `learning_rate`"):
        TrainingArguments("out").lerning_rate  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_asking_for_an_optional_attribute_searches_for_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop asks in every step, and a search costs more than the rest of the loop."""
    monkeypatch.setattr("finetune.arguments.serialize.nearest", lambda *given: pytest.fail("searched"))
    assert getattr(TrainingArguments("out"), "not_there", None) is None
