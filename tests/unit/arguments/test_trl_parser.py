"""`TrlParser`: what TRL's scripts call, and one clear error for what it does not take."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from finetune import ArgumentError, TrlParser


@dataclasses.dataclass
class First:
    """The first."""

    number: int
    name: str = "alpha"


@dataclasses.dataclass
class Second:
    """The second."""

    name: str = "alpha"
    flag: bool = False


@dataclasses.dataclass
class Reserved:
    """Has a field with the name of the file's flag."""

    config: str = "x"


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "run.yaml").write_text("number: 3\nflag: true\nother-key: [1]\n")
    return str(tmp_path / "run.yaml")


def test_one_dataclass_or_several(file: str) -> None:
    assert TrlParser(First).parse_args_and_config(["--number", "5", "--name", "beta"]) == (First(5, "beta"),)
    first, second = TrlParser([First, Second], prog="p").parse_args_and_config(
        ["--config", file, "--name", "b"], fail_with_unknown_args=False
    )
    assert (first, second) == (First(3, "b"), Second("b", True))


def test_words_that_belong_to_nobody_are_returned_on_request(file: str) -> None:
    parser, words = TrlParser((First, Second)), ["--config", file, "--what", "7", "--name", "b"]
    expected: tuple[Any, ...] = (First(3, "b"), Second("b", True))
    both = parser.parse_args_and_config(words, return_remaining_strings=True)
    assert both == (*expected, ["--other-key", "[1]", "--what", "7"])
    apart = parser.parse_args_and_config(words, return_remaining_strings=True, separate_remaining_strings=True)
    assert apart == (*expected, ["--other-key", "[1]"], ["--what", "7"])
    trl = pytest.importorskip("trl")
    assert trl.TrlParser([First]).parse_args_and_config(words, return_remaining_strings=True)[1][-2:] == ["--what", "7"]


def test_unknown_words_are_errors_or_said(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = TrlParser((First, Second))
    for words, name in ((["--config", file], "`other-key`"), (["--number", "1", "--nam", "b"], "`--nam`")):
        with pytest.raises(SystemExit) as end:
            parser.parse_args_and_config(words)
        assert end.value.code == 2 and name in capsys.readouterr().err
    with pytest.warns(UserWarning, match=r"--other-key \[1\].*no effect"):
        parser.parse_args_and_config(["--config", file], fail_with_unknown_args=False)
    with pytest.raises(SystemExit):  # as in TRL, it is about the file alone
        parser.parse_args_and_config(["--number", "1", "--nam", "b"], fail_with_unknown_args=False)


@pytest.mark.parametrize(
    ("types", "options", "said"),
    [
        (None, {}, "`dataclass_types` is None"),
        (int, {}, "allowed are dataclasses"),
        (Reserved, {}, "`Reserved` has a field `config`"),
        (First, {"conflict_handler": "resolve"}, "not 'conflict_handler'"),
    ],
)
def test_what_it_does_not_take_is_named(types: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        TrlParser(types, **options)


def test_two_lists_need_one_asked_for() -> None:
    with pytest.raises(ArgumentError, match="return_remaining_strings=True"):
        TrlParser(Second).parse_args_and_config([], separate_remaining_strings=True)
