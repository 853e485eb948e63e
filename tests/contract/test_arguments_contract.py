"""Our argument classes against the installed transformers and TRL: fields, defaults, resolved values, properties.

The tables below list every difference with its reason. A test fails both when a difference is missing from them and
when one listed there no longer exists.
"""

import copy
import dataclasses
import inspect
import pickle
import warnings

import pytest
import transformers
import trl
from transformers.training_args import ParallelMode as TransformersParallelMode

from finetune.arguments import TrainingArguments
from finetune.arguments.coerce import coerce_training_arguments
from finetune.compat import ParallelMode
from finetune.sft.config import SFTConfig

# Fields that only we have.
OURS = {
    "keep_last": "checkpoint retention as two policies instead of one number",
    "keep_best": "checkpoint retention as two policies instead of one number",
    "async_save": "checkpoints written in the background",
    "on_save_failure": "whether training goes on when a checkpoint cannot be written",
    "save_on_exception": "a checkpoint when training stops with an error",
    "offload_optimizer_state": "room for activations on the device, at the price of two copies per step",
    "nonfinite_policy": "non-finite losses are never replaced, so there has to be a policy",
    "overwrite_output_dir": "removed from transformers 5; programs still read it",
    "logging_dir": "removed from transformers 5.15; still sets the TensorBoard folder",
}
SFT_OURS = {"data_audit": "rows that never teach to stop are an error, and this makes it a warning"}

# Declared defaults that differ from TRL's SFTConfig.
SFT_DEFAULTS = {
    "padding_free": "None: on wherever packing is proved not to leak; False, TRL's default, means never",
    "gradient_checkpointing": "None: activations are recomputed where they need much memory; True means always",
}

# Values after construction that differ from TRL's on a CPU.
SFT_RESOLVED = {
    "bf16": "chosen from the device; TRL says True, which slows most CPUs down",
    **SFT_DEFAULTS,
    "activation_checkpointing": SFT_DEFAULTS["gradient_checkpointing"],
}

# Values after construction, in `to_dict()`, that differ from transformers'.
RESOLVED = {
    "accelerator_config": "keeps `use_configured_state`, which transformers removes, so that a rebuild has it too",
}

# Annotations that differ from transformers'. The command line accepts at least the same words.
ANNOTATIONS = {
    "parallelism_config": "a dict or JSON is accepted too; naming the class would import accelerate",
    "liger_kernel_config": "JSON is accepted, so the command line can set it",
    "include_num_input_tokens_seen": "transformers' union parses as a bool, so 'all' cannot be given as a flag",
}


def defaults_of(cls):
    return {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(cls)
    }


def differing(ours, theirs):
    return {name for name in theirs if ours.get(name, "missing") != theirs[name]}


def quietly(cls, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls(*args, **kwargs)


def test_fields_are_those_of_transformers_and_ours():
    theirs = set(defaults_of(transformers.TrainingArguments))
    assert set(defaults_of(TrainingArguments)) - theirs == set(OURS)
    assert theirs - set(defaults_of(TrainingArguments)) == set()


def test_declared_defaults_are_those_of_transformers():
    assert differing(defaults_of(TrainingArguments), defaults_of(transformers.TrainingArguments)) == set()


def test_resolved_values_are_those_of_transformers():
    given = {"eval_strategy": "steps", "warmup_steps": 0.1, "report_to": "tensorboard", "load_best_model_at_end": True}
    ours = TrainingArguments("out", **given).to_dict()
    assert differing(ours, transformers.TrainingArguments("out", **given).to_dict()) == set(RESOLVED)


def test_sft_fields_are_those_of_trl_and_ours():
    theirs = set(defaults_of(trl.SFTConfig))
    assert set(defaults_of(SFTConfig)) - theirs == {*OURS, *SFT_OURS}
    assert theirs - set(defaults_of(SFTConfig)) == set()


def test_sft_declared_defaults_are_those_of_trl():
    assert differing(defaults_of(SFTConfig), defaults_of(trl.SFTConfig)) == set(SFT_DEFAULTS)


def test_sft_resolved_values_are_those_of_trl():
    ours = SFTConfig("out", use_cpu=True).to_dict()
    theirs = quietly(trl.SFTConfig, "out", use_cpu=True).to_dict()
    assert differing(ours, theirs) == {*SFT_RESOLVED, *RESOLVED, *TOKENS_IN_TRL}


# TRL writes `<EOS_TOKEN>` for what is no secret but a token of the vocabulary; ours writes the token.
TOKENS_IN_TRL = {"eos_token", "pad_token"}


def shape(annotation):
    """The members of an annotation as text, with our enumerations and transformers' under the same name."""
    text = str(annotation).replace("transformers.trainer_utils.", "").replace("transformers.training_args.", "")
    text = text.replace("transformers.debug_utils.", "").replace("finetune.compat.", "").replace("typing.", "")
    return {part.strip().replace("[str, Any]", "") for part in text.split("|")}


def test_annotations_are_those_of_transformers():
    ours = inspect.get_annotations(TrainingArguments) | {
        name: hint for base in TrainingArguments.__mro__ for name, hint in inspect.get_annotations(base).items()
    }
    theirs = {field.name: field.type for field in dataclasses.fields(transformers.TrainingArguments)}
    assert {name for name in theirs if shape(ours[name]) != shape(theirs[name])} == set(ANNOTATIONS)


PROPERTIES = [
    "train_batch_size",
    "eval_batch_size",
    "ddp_timeout_delta",
    "device",
    "n_gpu",
    "world_size",
    "process_index",
    "local_process_index",
    "should_log",
    "should_save",
    "parallel_mode",
    "place_model_on_device",
    "mixed_precision",
    "deepspeed_plugin",
    "fsdp_plugin_args",
    "_no_sync_in_gradient_accumulation",
]


@pytest.mark.parametrize("name", PROPERTIES)
def test_properties_have_the_values_of_transformers(name):
    ours, theirs = TrainingArguments("out", use_cpu=True), transformers.TrainingArguments("out", use_cpu=True)
    assert getattr(ours, name) == getattr(theirs, name)


def test_every_public_member_of_transformers_exists():
    ours, theirs = TrainingArguments("out"), transformers.TrainingArguments("out")
    # Left over in transformers' class body by the code that picks the default optimizer.
    leftovers = {"default_optim", "is_torch_greater_or_equal_than_2_8"}
    assert {name for name in dir(theirs) if not name.startswith("_") and not hasattr(ours, name)} == leftovers


@pytest.mark.parametrize(
    "name", [name for name in dir(transformers.TrainingArguments) if name.startswith("set_")], ids=str
)
def test_setters_have_the_signature_and_the_effect_of_transformers(name):
    ours, theirs = TrainingArguments("out"), transformers.TrainingArguments("out")
    parameters = inspect.signature(getattr(theirs, name)).parameters
    assert {key: p.default for key, p in inspect.signature(getattr(ours, name)).parameters.items()} == {
        key: p.default for key, p in parameters.items()
    }
    given = {"model_id": "me/model"} if "model_id" in parameters else {}
    before = ours.to_dict()
    assert getattr(ours, name)(**given) is ours
    getattr(theirs, name)(**given)
    # transformers leaves `report_to="none"` and `eval_delay=None` unresolved here, values its constructor never leaves.
    expected = {"report_to", "eval_delay"} if name in ("set_logging", "set_evaluate") else set()
    assert differing(ours.to_dict(), theirs.to_dict()) - set(RESOLVED) <= expected
    assert ours.to_dict() != before or name in ("set_dataloader", "set_lr_scheduler", "set_optimizer", "set_save")


def test_parallel_mode_equals_transformers_from_both_sides():
    for mode in TransformersParallelMode:
        assert ParallelMode(mode.value) == mode
        assert mode == ParallelMode(mode.value)
    assert TransformersParallelMode.TPU != ParallelMode.DISTRIBUTED


def test_hf_argument_parser_reads_our_class():
    parser = transformers.HfArgumentParser(TrainingArguments)
    words = [
        "--output_dir",
        "out",
        "--evaluation_strategy",
        "epoch",
        "--no_cuda",
        "--fsdp_config",
        "{}",
        "--optim",
        "sgd",
        "--bf16",
    ]
    words += ["--report_to", "tensorboard", "--lr_scheduler_kwargs", '{"num_cycles": 2}', "--gradient_checkpointing"]
    (args,) = parser.parse_args_into_dataclasses(
        [*words, "--include_num_input_tokens_seen", "all", "--no_dataloader_pin_memory"]
    )
    assert (args.output_dir, args.eval_strategy, args.use_cpu, args.optim) == ("out", "epoch", True, "sgd")
    assert (args.report_to, args.lr_scheduler_kwargs, args.bf16) == (["tensorboard"], {"num_cycles": 2}, True)
    assert (args.gradient_checkpointing, args.include_num_input_tokens_seen) == (True, "all")
    assert args.dataloader_pin_memory is False


def test_hf_argument_parser_prints_help(capsys):
    with pytest.raises(SystemExit):
        transformers.HfArgumentParser([SFTConfig]).parse_args(["--help"])
    assert "--packing_strategy" in capsys.readouterr().out


@pytest.mark.parametrize("cls", [TrainingArguments, SFTConfig])
def test_pickle_copy_and_replace(cls):
    args = cls("out", eval_strategy="steps", fsdp_config={"version": 2}, lr_scheduler_kwargs={"num_cycles": 1})
    assert args.device.type == "cpu"
    for twin in (pickle.loads(pickle.dumps(args)), copy.copy(args), copy.deepcopy(args), dataclasses.replace(args)):
        assert twin == args
        assert twin.device == args.device
    changed = dataclasses.replace(args, seed=7)
    assert (changed.seed, args.seed, changed.eval_steps) == (7, 42, args.eval_steps)
    assert cls(**args.to_dict()) == args


def test_transformers_and_trl_arguments_are_carried_over_and_left_alone():
    given = transformers.TrainingArguments("out", eval_strategy="epoch", fsdp_config={"version": 1}, hub_token="secret")
    before = copy.deepcopy(vars(given))
    ours = coerce_training_arguments(given, TrainingArguments)
    assert differing(ours.to_dict(), given.to_dict()) == set(RESOLVED)
    assert ours.hub_token == "secret"
    ours.fsdp_config["version"] = 2
    assert {k: v for k, v in vars(given).items() if k != "distributed_state"} == {
        k: v for k, v in before.items() if k != "distributed_state"
    }

    config = quietly(trl.SFTConfig, "out", use_cpu=True, max_length=77, packing=True)
    ours = coerce_training_arguments(config, SFTConfig)
    assert differing(ours.to_dict(), config.to_dict()) == {*RESOLVED, *TOKENS_IN_TRL}
    plain = coerce_training_arguments(config, TrainingArguments)
    assert (type(plain), plain.max_length, plain.packing) == (TrainingArguments, 77, True)
