"""Finding programs, running them, and what is checked before anything is loaded."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from finetune.cli import programs
from finetune.errors import ArgumentError, CheckpointError, DataFormatError, ModelLoadError


def arguments(folder: Path, **changes: object) -> SimpleNamespace:
    return SimpleNamespace(
        **{"output_dir": str(folder), "resume_from_checkpoint": None, "overwrite_output_dir": False, **changes}
    )


def test_the_checkouts_programs_come_before_the_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "src" / "finetune"
    (package / "_programs").mkdir(parents=True)
    monkeypatch.setattr(programs, "PACKAGE", package)
    (tmp_path / "trainers").mkdir()
    assert programs.shipped_folder("trainers") == package / "_programs"
    (tmp_path / "pyproject.toml").touch()
    assert programs.shipped_folder("trainers") == tmp_path / "trainers"


def test_every_program_exists_and_has_both_functions() -> None:
    for name in programs.PROGRAMS:
        module = programs.load_program(name)
        assert callable(module.parse) and callable(module.main)


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (ArgumentError("`seed` is\n  wrong"), 2, "error: `seed` is wrong\n"),
        (DataFormatError("no rows"), 1, "error: no rows\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
        (SystemExit(2), 2, ""),
        (SystemExit(), 0, ""),
    ],
)
def test_an_error_for_the_user_is_one_line_and_an_exit_code(
    raised: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(argv: object) -> None:
        raise raised

    assert programs.run_program(main, []) == code
    assert capsys.readouterr().err == line


def test_a_defect_keeps_its_traceback() -> None:
    def main(argv: object) -> None:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError):
        programs.run_program(main)


def test_a_checkpoint_that_is_not_there_is_an_error_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-20").mkdir()
    for value in (True, "auto", str(tmp_path / "checkpoint-20")):
        programs.check_before_start(arguments(tmp_path, resume_from_checkpoint=value), "owner/name")
    wanted = str(tmp_path / "checkpoint-2")
    with pytest.raises(CheckpointError, match=r"Did you mean `.*checkpoint-20`"):
        programs.check_before_start(arguments(tmp_path, resume_from_checkpoint=wanted), "owner/name")


def test_an_output_folder_that_cannot_be_made_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArgumentError, match="output_dir"):
        programs.check_output_dir(arguments(tmp_path / "file" / "run"))
    with pytest.raises(ArgumentError, match="output_dir"):
        programs.check_output_dir(arguments(tmp_path / "file"))
    programs.check_output_dir(arguments(tmp_path / "a" / "b"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("content", ["checkpoint-5/", "model.safetensors", "adapter_model.safetensors"])
def test_an_earlier_run_is_not_overwritten_unless_asked(tmp_path: Path, content: str) -> None:
    (tmp_path / "notes.txt").touch()
    programs.check_output_dir(arguments(tmp_path))
    path = tmp_path / content
    path.mkdir() if content.endswith("/") else path.touch()
    with pytest.raises(ArgumentError, match="overwrite_output_dir"):
        programs.check_output_dir(arguments(tmp_path))
    programs.check_output_dir(arguments(tmp_path, resume_from_checkpoint="auto"))
    programs.check_output_dir(arguments(tmp_path, overwrite_output_dir=True))


def test_no_model_and_no_such_model_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="--model_name_or_path"):
        programs.check_before_start(arguments(tmp_path), None)
    with pytest.raises(OSError, match="does not exist"):
        programs.check_before_start(arguments(tmp_path), str(tmp_path / "no-model"))


def test_a_folder_with_an_adapter_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    with pytest.raises(
        ModelLoadError, match=r"holds an adapter.*from 'owner/base'.*is_trainable=True.*merge_and_unload"
    ):
        programs.check_before_start(arguments(tmp_path), str(tmp_path / "adapter"))


@pytest.mark.parametrize("program", ["sft", "classify"])
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--load_in_4bit"], "`load_in_4bit` freezes the weights"),
        (["--load_in_8bit"], "Add `--use_peft`"),
        (["--dataset_name", "rows", "--config", "{config}"], "both name the data"),
        ([], "`--dataset_name`"),
    ],
)
def test_a_program_refuses_early_what_it_knows_early(tmp_path: Path, program: str, words: list[str], said: str) -> None:
    (tmp_path / "run.yaml").write_text("datasets:\n  - path: x\n")
    words = [word.format(config=tmp_path / "run.yaml") for word in words]
    with pytest.raises(ArgumentError, match=said):
        programs.load_program(program).parse(
            ["--model_name_or_path", "owner/name", "--output_dir", str(tmp_path / "out"), "--use_cpu", *words]
        )


def test_boolean_buffers_and_no_others_are_left_out_of_what_ddp_sends() -> None:
    model = torch.nn.Linear(2, 2)
    for name, value in (("mask", torch.ones(2) > 0), ("counts", torch.ones(2).long()), ("mean", torch.ones(2))):
        model.register_buffer(name, value)
    programs.ignore_bias_buffers(model)
    assert model._ddp_params_and_buffers_to_ignore == ["mask"]


def test_a_wrong_name_brings_the_nearest() -> None:
    assert programs.choose("ddp", ["ddp", "zero1"], "launch configuration") == "ddp"
    with pytest.raises(ArgumentError, match="Did you mean `zero1`"):
        programs.choose("zero", ["ddp", "zero1"], "launch configuration")
