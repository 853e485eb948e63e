"""One process with accumulation 4 and two processes with accumulation 2 train the same, however the two share the work.

Both are started as a user starts them, through `accelerate launch` with the configurations of this repository; the two
processes of each backend run all cases one after the other. What is compared, and how, says `measure_equality.py`;
`equality.json` holds what it measured.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("measure_equality", HERE / "measure_equality.py")
assert spec is not None and spec.loader is not None
measure: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(measure)

MAIN = ["padded", "padding_free", "packed", "tied", "classification", "lora"]
# Models loaded by name may be sharded while they are; and `save_model` has to gather what checkpoints hold in shards.
SHARDED = [*MAIN, "lora_by_name", "classification_by_name"]
FSDP = [*SHARDED, "sharded_checkpoints"]
FEW = ["padded", "classification", "lora"]
REST = [case for case in measure.CASES if case not in SHARDED]


def reference(cases: list[str], factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of the runs on one process, which the parallel test processes share."""
    base = factory.getbasetemp()
    shared = base.parent if base.name.startswith("popen-") else base
    out = shared / f"equality-{'-'.join(cases)}"
    with FileLock(f"{out}.lock"):
        if not (out / cases[-1] / "report.json").is_file():
            measure.launch("one", cases, out)
    return out


def check(backend: str, cases: list[str], known: list[str], tmp_path: Path, factory: pytest.TempPathFactory) -> None:
    if backend.startswith("zero"):
        pytest.importorskip("deepspeed")
    one = reference(known, factory)
    measure.launch(backend, cases, tmp_path)
    found = {case: measure.compare(one / case, tmp_path / case, backend) for case in cases}
    too_far = {case: numbers for case, numbers in found.items() if max(numbers.values()) > 1e-5}
    assert not too_far, json.dumps(too_far, indent=1)


@pytest.mark.parametrize(
    ("backend", "cases"), [("ddp", MAIN), ("fsdp2", FSDP), ("zero1", FEW), ("zero2", FEW), ("zero3", SHARDED)]
)
def test_two_processes_train_as_one(
    backend: str, cases: list[str], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    check(backend, cases, FSDP, tmp_path, tmp_path_factory)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_with_checkpointed_activations_and_adapters_of_classifiers(
    backend: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    check(backend, REST, REST, tmp_path, tmp_path_factory)


def test_the_model_that_was_saved_loads(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    one = reference(FSDP, tmp_path_factory)
    AutoModelForCausalLM.from_pretrained(one / "padded" / "train" / "model")
    loaded = AutoModelForSequenceClassification.from_pretrained(one / "classification" / "train" / "model")
    assert loaded.config.id2label == {0: "bad", 1: "good"}
