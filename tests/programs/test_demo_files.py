"""`examples/make_demo_model.py` makes the files that are shipped in `src/finetune/demo`."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
import transformers

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "make_demo_model.py"
SHIPPED = SCRIPT.parents[1] / "src" / "finetune" / "demo"


def make(out: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> Path:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--output_dir", str(out), *flags])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()


def test_rows_and_tokenizer_are_the_shipped_ones_and_the_weights_repeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make(tmp_path / "first", monkeypatch, "--steps", "2")
    for name in ("train.jsonl", "test.jsonl", "model/tokenizer.json"):
        assert (first / name).read_bytes() == (SHIPPED / name).read_bytes(), name
    one = weights(first)
    two = weights(make(tmp_path / "second", monkeypatch, "--steps", "2"))
    other = weights(make(tmp_path / "other", monkeypatch, "--steps", "2", "--seed", "1"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert not all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_no_test_row_is_a_training_row() -> None:
    """`finetune demo` says so. Names occur in both."""
    train, test = (
        {json.dumps(json.loads(line)["prompt"]) for line in (SHIPPED / f"{name}.jsonl").read_text().splitlines()}
        for name in ("train", "test")
    )
    assert len(test) == 200 and not train & test


@pytest.mark.slow
def test_the_shipped_weights_are_what_the_script_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All 4,000 steps: a quarter of an hour. Holds on x86-64 with the pinned versions, where it was made."""
    made, shipped = weights(make(tmp_path, monkeypatch)), weights(SHIPPED)
    assert all(torch.equal(tensor, made[name]) for name, tensor in shipped.items())
