"""One process with accumulation 4 and two processes with accumulation 2 train the same, however the two share the work.

Both are started as a user starts them, through `accelerate launch` with the configurations of this repository; the two
processes of each backend run all cases one after the other. What is compared, and how, says `measure_equality.py`;
`equality.json` holds what it measured.
"""

import json
from pathlib import Path

import measure_equality as measure
import pytest
from launching import made_once

MAIN = ["padded", "padding_free", "packed", "tied", "classification", "lora"]
# Models loaded by name may be sharded while they are; and `save_model` has to gather what checkpoints hold in shards.
SHARDED = [*MAIN, "lora_by_name", "classification_by_name", "packed_by_name"]
FSDP = [*SHARDED, "sharded_checkpoints"]
KNOWN = [*FSDP, "lora_classification"]
FEW = ["padded", "classification", "lora"]


def reference(cases: list[str], factory: pytest.TempPathFactory, precision: str = "no") -> Path:
    """Returns the folder of the runs on one process, which the parallel test processes share."""
    name = f"equality-{precision}-{'-'.join(cases)}"
    return made_once(factory, name, lambda out: measure.launch("one", cases, out, precision))


def check(backend: str, cases: list[str], known: list[str], tmp_path: Path, factory: pytest.TempPathFactory) -> None:
    if backend.startswith("zero"):
        pytest.importorskip("deepspeed")
    one = reference(known, factory)
    measure.launch(backend, cases, tmp_path)
    found = {case: measure.compare(one / case, tmp_path / case, backend) for case in cases}
    too_far = {case: numbers for case, numbers in found.items() if max(numbers.values()) > 1e-5}
    assert not too_far, json.dumps(too_far, indent=1)


QUICK = {"ddp": MAIN, "fsdp2": FSDP, "zero1": FEW, "zero2": FEW, "zero3": SHARDED}


@pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.slow) if name == "zero1" else name for name in QUICK]
)
def test_two_processes_train_as_one(backend: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    check(backend, QUICK[backend], KNOWN, tmp_path, tmp_path_factory)


@pytest.mark.parametrize(
    ("backend", "cases"),
    [
        pytest.param("cpu", ["padded"], marks=pytest.mark.slow),
        pytest.param("ddp_multi_node", ["padded"], marks=pytest.mark.slow),
        ("fsdp1", ["padded", "lora_classification", "sharded_checkpoints"]),
        pytest.param("fsdp2_offload", ["padded", "lora_by_name"], marks=pytest.mark.slow),
        pytest.param("zero3_offload", ["padded", "lora_by_name"], marks=pytest.mark.slow),
        ("single_gpu", ["padded"]),
    ],
)
def test_the_other_configurations(
    backend: str, cases: list[str], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Those that are slow: `cpu` is `ddp` with another name, others differ little from one that is tested always, and
    DeepSpeed compiles its CPU optimizer at the first run.
    """
    check(backend, cases, KNOWN, tmp_path, tmp_path_factory)


@pytest.mark.parametrize(
    "backend",
    ["fsdp2", *(pytest.param(each, marks=pytest.mark.slow) for each in ("ddp", "fsdp1", "zero1", "zero2", "zero3"))],
)
def test_bf16(backend: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """FSDP and ZeRO compute in bfloat16 throughout, DDP where autocast says; all save the float32 weights they step.

    Losses are 6.2, of which bfloat16 resolves 0.03: what is logged and scored must not be rounded to it.
    """
    if backend.startswith("zero"):
        pytest.importorskip("deepspeed")
    cases = ["padded", "lora"]
    one = reference(cases, tmp_path_factory, "bf16")
    measure.launch(backend, cases, tmp_path, "bf16")
    for case in cases:
        found = measure.compare(one / case, tmp_path / case, backend)
        assert max(found["losses"], found["evaluation"]) < (1e-5 if backend == "ddp" else 1e-3), found
        assert found["grad_norms"] < (1e-5 if backend == "ddp" else 5e-3), found
        saved = measure.read_weights(tmp_path / case / "train" / "model")
        assert {str(tensor.dtype) for tensor in saved.values()} == {"torch.float32"}
        assert any((tensor != tensor.bfloat16()).any() for tensor in saved.values()), "rounded before it was saved"
        report = json.loads((tmp_path / case / "report.json").read_text())
        assert report["resume"]["losses"] == report["train"]["losses"]
    config = json.loads((tmp_path / "padded" / "train" / "model" / "config.json").read_text())
    assert config["dtype"] == "float32"


def test_every_configuration_is_tested() -> None:
    files = {path.stem for path in (Path(__file__).parents[2] / "accelerate_configs").glob("*.yaml")}
    assert files == {*measure.BACKENDS, "single_gpu"}


def test_the_readmes_say_what_was_measured() -> None:
    result = json.loads((Path(__file__).with_name("equality.json")).read_text())["two processes"]
    assert set(result) == set(measure.BACKENDS)
    for path, text in measure.written(result).items():
        assert path.read_text() == text, path
    assert max(number for cases in result.values() for case in cases.values() for number in case.values()) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("backend", measure.BACKENDS)
def test_all_cases(backend: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    check(backend, measure.CASES, measure.CASES, tmp_path, tmp_path_factory)


def test_the_model_that_was_saved_loads(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    one = reference(KNOWN, tmp_path_factory)
    AutoModelForCausalLM.from_pretrained(one / "padded" / "train" / "model")
    loaded = AutoModelForSequenceClassification.from_pretrained(one / "classification" / "train" / "model")
    assert loaded.config.id2label == {0: "bad", 1: "good"}
