"""Every method of transformers.Trainer exists with the same parameters, or its absence has a reason given here."""

import inspect
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers

import finetune
from finetune.engine.checks import DEAD_OVERRIDES

THEIRS, OURS = transformers.Trainer, finetune.Trainer

# Private parts of transformers' loop that have no counterpart. README.md, "Cut names", says the same.
ABSENT = {
    "_build_accelerator_args": "`distributed/accelerator.py` builds the accelerator",
    "_defer_fsdp_gradient_reduction": "only for models sharded by `DistributedConfig`",
    "_has_mixed_mesh_grads": "`step.clip_gradients` decides",
    "_issue_warnings_after_load": "loading is strict: keys that do not match are an error",
    "_mixed_mesh_grad_norm": "`step.clip_gradients` decides",
    "_prepare_context_parallel_inputs": "no context parallelism in this release",
    "_run_epoch": "`engine/loop.py` is the loop",
    "_sync_replicated_trainable_parameters": "`distributed/prepare.py`",
    "_track_num_input_tokens": "tokens are counted on the device, without a gather per batch",
    "_tune_save_checkpoint": "searches use optuna, not Ray",
    "_update_auto_batch_size": "`_inner_training_loop` sets the batch size",
    "_wrap_model": "`distributed/prepare.py` wraps; there is no DataParallel",
}
# Same name, other parameters.
OTHER_PARAMETERS = {
    "__init__": "`**old_names` takes `tokenizer=`, and names the nearest argument for anything else",
    "_finalize_training": "takes the run",
    "_init_training_state": "takes the plan and returns where to resume",
    "metrics_format": "transformers' has no `self`, so it cannot be called on a trainer",
}


def methods(cls: type) -> dict[str, Any]:
    names = [name for name in dir(cls) if not name.startswith("__") or name == "__init__"]
    return {name: getattr(cls, name) for name in names if inspect.isroutine(inspect.getattr_static(cls, name, None))}


def parameters(method: Any) -> list[tuple[str, Any, Any]]:
    return [(name, p.kind, p.default) for name, p in inspect.signature(method).parameters.items()]


@pytest.mark.parametrize("name", [name for name in methods(THEIRS) if name not in ABSENT | OTHER_PARAMETERS.keys()])
def test_same_parameters(name: str) -> None:
    mine, theirs = parameters(getattr(OURS, name)), parameters(getattr(THEIRS, name))
    assert [(n, kind) for n, kind, _ in mine] == [(n, kind) for n, kind, _ in theirs]
    for (parameter, _, default), (_, _, expected) in zip(mine, theirs, strict=True):
        # A required parameter may have gained a default; a default is the same.
        assert default == expected or expected is inspect.Parameter.empty, parameter
    static = isinstance(inspect.getattr_static(OURS, name), staticmethod)
    assert static == isinstance(inspect.getattr_static(THEIRS, name), staticmethod)


def test_the_constructor_takes_the_same_arguments_and_only_those() -> None:
    mine, theirs = parameters(OURS.__init__), parameters(THEIRS.__init__)
    assert mine[-1][1] is inspect.Parameter.VAR_KEYWORD
    assert [(name, default) for name, _, default in mine[:-1]] == [(name, default) for name, _, default in theirs]
    with pytest.raises(finetune.ArgumentError, match=r"`compute_metric`.*`compute_metrics`"):
        OURS(compute_metric=len)


def test_the_lists_above_are_up_to_date() -> None:
    theirs, ours = methods(THEIRS), methods(OURS)
    assert set(theirs) - set(ours) == set(ABSENT)
    assert set(OTHER_PARAMETERS) <= set(theirs)
    for name in OTHER_PARAMETERS:
        assert parameters(theirs[name]) != parameters(ours[name]), name


def test_public_methods_are_all_there() -> None:
    public = {name for name in methods(THEIRS) if not name.startswith("_")}
    assert public <= set(methods(OURS))


def test_attributes_after_construction(tiny_bert: Any, tmp_path: Any) -> None:
    def public_attributes(library: Any) -> set[str]:
        args = library.TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
        trainer = library.Trainer(model=tiny_bert(), args=args)
        return {name for name in vars(trainer) if not name.startswith("_")}

    def readable(name: str) -> bool:
        args = finetune.TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
        return hasattr(finetune.Trainer(model=tiny_bert(), args=args), name)

    missing = {name for name in public_attributes(transformers) - public_attributes(finetune) if not readable(name)}
    assert missing == {
        "current_flos",  # `_run.flos` until `store_flos`
        "is_distributed_loading_by_transformers",  # read from the model
        "is_fsdp_xla_enabled", "is_fsdp_xla_v1_enabled", "is_fsdp_xla_v2_enabled",  # no XLA
    }  # fmt: skip


@pytest.mark.parametrize("name", DEAD_OVERRIDES)
def test_overriding_what_nobody_calls_is_said(name: str) -> None:
    with pytest.warns(UserWarning, match=rf"`Mine\.{name}` is never called here"):
        type("Mine", (OURS,), {name: lambda self: None})


def test_overriding_what_is_called_is_not_remarked() -> None:
    body = {name: (lambda self, *args, **kwargs: None) for name in methods(OURS) if name != "__init__"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        type("Mine", (OURS,), body)


def test_the_old_name_of_the_tokenizer_reads_and_sets(tiny_bert: Any, tmp_path: Any) -> None:
    args = finetune.TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = finetune.Trainer(model=tiny_bert(), args=args)
    with pytest.warns(FutureWarning, match="processing_class"):
        trainer.tokenizer = "mine"
    with pytest.warns(FutureWarning, match="processing_class"):
        assert trainer.tokenizer == "mine"
    assert trainer.processing_class == "mine"


def test_the_tests_that_the_table_names_exist() -> None:
    root = Path(__file__).parents[1]
    table = (root / "contract" / "README.md").read_text()
    named = set(re.findall(r"test_[a-z_0-9]+(?:\.py)?…?", table))
    sources = "\n".join(path.read_text() for path in root.rglob("test_*.py"))
    files = {path.name for path in root.rglob("test_*.py")}
    assert len(named) > 20
    for name in named:
        known = name in files if name.endswith(".py") else f"def {name.rstrip('…')}" in sources
        assert known, f"README.md names {name}"
    for name in ABSENT:
        assert f"`{name}`" in table, f"README.md does not name {name}"
