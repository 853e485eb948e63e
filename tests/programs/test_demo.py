"""`finetune demo` learns what it says it learns, on the files that are shipped."""

import json
from pathlib import Path

import pytest

from finetune.cli import demo
from finetune.cli.main import main


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_shipped_files_are_small_and_the_test_rows_are_new() -> None:
    assert sum(path.stat().st_size for path in demo.DEMO.rglob("*") if path.is_file()) < 20 * 2**20
    prompts = {row["prompt"][0]["content"] for row in rows(demo.TRAIN)}
    test = [row["prompt"][0]["content"] for row in rows(demo.TEST)]
    assert len(set(test)) == len(test) == 200
    assert not prompts & set(test)
    for row in rows(demo.TRAIN) + rows(demo.TEST):
        record = json.loads(row["completion"][0]["content"])
        assert all(str(value) in row["prompt"][0]["content"] for value in record.values())


def test_the_demonstration_teaches_the_skill(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 0
    output = tmp_path / "runs" / "demo"
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["exact_match_before"] < 0.1
    assert metrics["exact_match_after"] > 0.8
    assert metrics["eval_loss_after"] < metrics["eval_loss_before"]
    shown = capsys.readouterr().out
    for expected in ("Before:", "After:", "exact match", "report.html", "runs/demo/model"):
        assert expected in shown
    assert "<svg" in (output / "report.html").read_text()
    # The saved model is the one that was measured.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(output / "model")
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    some = rows(demo.TEST)[:20]
    assert demo.exact_match(demo.answers(model, tokenizer, some), some) > 0.5


def test_another_run_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.safetensors").touch()
    assert main(["demo", "--output_dir", str(tmp_path)]) == 2
    assert "holds another run" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_exact_match_counts_equal_answers_only() -> None:
    wanted = [{"completion": [{"content": "a"}]}, {"completion": [{"content": "b"}]}]
    assert demo.exact_match(["a", "b "], wanted) == 0.5
