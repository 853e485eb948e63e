"""The command itself: help, version, unknown commands, and the small commands."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import finetune
from finetune.cli import commands
from finetune.cli.main import COMMANDS, main


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], ["help"]):
        assert main(words) == 0
        shown = capsys.readouterr().out
        assert all(f"finetune {name}" in shown for name in COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == finetune.__version__


def test_an_unknown_command_brings_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stf"]) == 2
    assert "unknown command 'stf'. Did you mean `sft`? Commands: " in capsys.readouterr().err
    assert main(["sequence-classification"]) == 2
    assert "Commands: sft, classify, demo," in capsys.readouterr().err


def test_every_command_has_its_own_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        assert main([name, "--help"]) == 0, name
        shown = capsys.readouterr().out
        assert shown.startswith(f"usage: finetune {name} ")
        assert "--output-dir" not in shown, "each argument is listed once"


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_is_quick_because_it_imports_nothing_heavy(command: str) -> None:
    code = (
        f"import sys; from finetune.cli.main import main; main([{command!r}, '--help'])\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", ["sft", "classify"])
def test_the_help_of_a_program_begins_with_examples_that_work_once_installed(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"    finetune {name} \\\n        --model_name_or_path" in shown
    assert "python trainers/" not in shown
    assert " ".join(shown.split()).count(f"finetune {name} --accelerate_config ddp --num_processes 4") == 1


@pytest.mark.parametrize("name", ["preview", "plan"])
def test_the_help_of_preview_and_plan_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    before_the_arguments = capsys.readouterr().out.split("options:")[0]
    assert f"    finetune {name} --model" in before_the_arguments


def test_an_error_names_the_command_and_the_argument_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", "--learning-rate", "abc"]) == 2
    assert "finetune sft: error: argument --learning-rate: 'abc' is not a number" in capsys.readouterr().err


def test_env_names_the_versions(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    assert main(["env"]) == 0
    shown = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in shown and "cores" in shown


def test_doctor_is_content_here_and_reports_a_missing_package(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["doctor"]) == 0, capsys.readouterr()
    assert "torch computes gradients" in capsys.readouterr().out
    version = commands.version
    monkeypatch.setattr(commands, "version", lambda name: "" if name == "datasets" else version(name))
    assert main(["doctor"]) == 1
    assert "datasets is missing: pip install datasets" in capsys.readouterr().err


def test_a_report_of_no_run_is_an_error(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_report_with_its_curves_as_pictures(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    history = [{"step": step, "loss": 1.0 / step} for step in (1, 2, 3)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    assert main(["report", str(tmp_path), "--plots", "svg"]) == 0
    written = [Path(line) for line in capsys.readouterr().out.split()]
    assert written == [tmp_path / "report.html", tmp_path / "plots" / "loss.svg"]
    assert all(path.is_file() for path in written)


def test_a_report_says_when_there_is_no_curve_to_draw(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1, "loss": 1.0}]}))
    assert main(["report", str(tmp_path), "--plots", "png"]) == 0
    assert "No curve has two points yet; no pictures written." in capsys.readouterr().err
    assert not (tmp_path / "plots").exists()
