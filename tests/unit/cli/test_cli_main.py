"""The command itself: help, version, unknown commands, and the small commands."""

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
    assert "Did you mean `sft`" in capsys.readouterr().err


def test_every_command_has_its_own_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        assert main([name, "--help"]) == 0, name
        assert "usage" in capsys.readouterr().out


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
