"""What the README shows works as printed: its Python, its commands, its links."""

import json
import re
import shlex
from pathlib import Path

import pytest

from finetune.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
DEMO = ROOT / "src" / "finetune" / "demo"
TRAINS = ["--max_steps", "1", "--use_cpu", "--report_to", "none"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Returns the words of each `finetune` command, but for the demonstration, which has its own test."""
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("finetune ")]
    return [words for line in lines if (words := shlex.split(line, comments=True))[1] != "demo"]


@pytest.fixture(scope="module")
def demo_rows() -> list[dict[str, list[dict[str, str]]]]:
    return [json.loads(line) for line in (DEMO / "train.jsonl").read_text().splitlines()[:16]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, on a machine that trains on its CPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return tmp_path


def test_links_lead_somewhere() -> None:
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", README) if "://" not in target]
    headings = {re.sub(r"[^a-z -]", "", line.lower()).strip().replace(" ", "-") for line in README.splitlines()
                if line.startswith("#")}  # fmt: skip
    assert targets
    for target in targets:
        assert target[1:] in headings if target.startswith("#") else (ROOT / target).exists(), target


def test_the_python_trains(here: Path, demo_rows: list[dict[str, list[dict[str, str]]]]) -> None:
    from datasets import Dataset

    one_line, usual = (each.replace("path-or-hub-id", str(DEMO / "model")) for each in blocks("python"))
    exec(one_line, {"dataset": Dataset.from_list(demo_rows)})
    chats = Dataset.from_list([{"messages": [*row["prompt"], *row["completion"]]} for row in demo_rows])
    names = {"chats": chats.train_test_split(4, seed=0)}
    exec(usual, names)
    assert names["trainer"].state.log_history and (here / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("words", [pytest.param(words, id=words[1]) for words in commands()])
def test_a_command_runs(
    words: list[str],
    here: Path,
    demo_rows: list[dict[str, list[dict[str, str]]]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in demo_rows))
    (here / "rows.csv").write_text("text,label\n" + "good,1\nbad,0\n" * 8)
    given = [str(DEMO / "model") if word == "MODEL" else word for word in words[1:]]
    if words[1] == "report":
        trained = ["--model_name_or_path", str(DEMO / "model"), "--dataset_name", "rows.jsonl", "--output_dir", "out"]
        assert main(["sft", *trained, *TRAINS]) == 0
    assert main([*given, *(TRAINS if words[1] in ("sft", "classify") else [])]) == 0
    produced = {"sft": "out/model.safetensors", "classify": "out/model.safetensors", "report": "out/report.html"}
    if words[1] in produced:
        assert (here / produced[words[1]]).is_file()
    else:
        assert capsys.readouterr().out
