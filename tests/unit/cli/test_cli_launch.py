"""What goes to the launcher, what to the program, and what the shipped configurations say."""

from pathlib import Path

import pytest
import yaml

from finetune.cli import launch
from finetune.errors import ArgumentError

NAMES = [
    "cpu", "ddp", "ddp_multi_node", "fsdp1", "fsdp2", "fsdp2_offload", "single_gpu", "zero1", "zero2", "zero3",
    "zero3_offload",
]  # fmt: skip


def test_arguments_are_split_between_launcher_and_program() -> None:
    launcher, program = launch.split_arguments(
        ["--accelerate_config", "ddp", "--seed", "1", "--num_processes=2", "--packing", "--output_dir", "x"]
    )
    assert launcher == {"accelerate_config": "ddp", "num_processes": "2"}
    assert program == ["--seed", "1", "--packing", "--output_dir", "x"]


@pytest.mark.parametrize("words", [["--num_processes"], ["--num_processes", "--seed"], ["--accelerate_config="]])
def test_a_launcher_argument_without_value_is_an_error(words: list[str]) -> None:
    with pytest.raises(ArgumentError, match="needs a value"):
        launch.split_arguments(words)


def test_the_configurations_are_those_announced() -> None:
    assert launch.config_names() == NAMES


def test_a_configuration_is_found_by_name_by_trls_name_and_by_path(tmp_path: Path) -> None:
    assert launch.config_path("fsdp2").name == "fsdp2.yaml"
    assert launch.config_path("zero3.yaml").name == "zero3.yaml"
    assert launch.config_path("multi_gpu").name == "ddp.yaml"
    own = tmp_path / "own.yaml"
    own.touch()
    assert launch.config_path(str(own)) == own
    with pytest.raises(ArgumentError, match="Did you mean `fsdp2`"):
        launch.config_path("fsdp3")
    with pytest.raises(ArgumentError, match="does not exist"):
        launch.config_path("somewhere/own.yaml")
    with pytest.raises(ArgumentError, match=r"'\./own.yaml', which does not exist"):
        launch.config_path("./own.yaml")


@pytest.mark.parametrize("number", ["0", "-1", "two"])
@pytest.mark.parametrize("others", [[], ["--accelerate_config", "cpu"]])
def test_a_number_of_processes_that_cannot_be_is_one_line(
    number: str, others: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch.run("sft", [f"--num_processes={number}", *others]) == 2
    assert f"`--num_processes` is {number!r}" in capsys.readouterr().err


def test_trls_own_names_are_accepted() -> None:
    trl = pytest.importorskip("trl")
    names = [path.stem for path in (Path(trl.__file__).parent / "accelerate_configs").glob("*.yaml")]
    assert names
    for name in names:
        assert launch.config_path(name).is_file()


@pytest.mark.parametrize("name", NAMES)
def test_each_configuration_is_read_by_accelerate_and_says_when_to_use_it(name: str) -> None:
    from accelerate.commands.config import load_config_from_file

    text = launch.config_path(name).read_text()
    assert ("When:" in text and "Needs:" in text and "Change:" in text) or name == "ddp_multi_node"
    values = yaml.safe_load(text)
    config = load_config_from_file(str(launch.config_path(name)))
    assert config.num_processes == values["num_processes"]
    kind = "MULTI_GPU" if name in ("cpu", "ddp", "ddp_multi_node") else "NO" if name == "single_gpu" else None
    kind = kind or ("FSDP" if name.startswith("fsdp") else "DEEPSPEED")
    assert str(config.distributed_type).rsplit(".", 1)[-1] == kind
    # A configuration with `use_cpu` makes accelerate start one process, whatever it says.
    assert values["use_cpu"] is False
    if kind == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == int(name[4])
        assert (config.deepspeed_config.get("offload_optimizer_device") == "cpu") == name.endswith("offload")
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == int(name[4])
        assert config.fsdp_config["fsdp_offload_params"] == name.endswith("offload")


def test_a_wrong_configuration_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.run("sft", ["--accelerate_config", "ddpp", "--output_dir", "x"]) == 2
    error = capsys.readouterr().err
    assert "Did you mean `ddp`" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("ddp", {}, "2"),
        ("fsdp2", {}, "2"),
        ("zero3", {"gpu_ids": "1"}, "1"),
        ("ddp", {"num_processes": "2"}, "2"),
        ("single_gpu", {}, None),
        ("cpu", {}, None),
        ("cpu", {"num_processes": "8"}, "8"),
        ("ddp_multi_node", {"num_processes": "16"}, "16"),
    ],
)
def test_there_are_as_many_processes_as_accelerators(
    name: str, given: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_accelerators(monkeypatch, 2)
    launcher = dict(given)
    launch.fit_devices(launcher, launch.config_path(name))
    assert launcher.get("num_processes") == expected


def test_more_processes_than_accelerators_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_accelerators(monkeypatch, 2)
    with pytest.raises(ArgumentError, match=r"`--num_processes` is 4, but 2 accelerators are available\. Set"):
        launch.fit_devices({"num_processes": "4"}, launch.config_path("ddp"))
    own = tmp_path / "own.yaml"
    own.write_text("distributed_type: MULTI_GPU\nnum_processes: 8\n")
    with pytest.raises(ArgumentError, match=r"`num_processes` in '.*own\.yaml' is 8.*Set `--num_processes 2`"):
        launch.fit_devices({}, own)
    with_accelerators(monkeypatch, 1)
    with pytest.raises(ArgumentError, match=r"'ddp', which needs at least 2 processes.*1 accelerator is available"):
        launch.fit_devices({}, launch.config_path("ddp"))


def test_without_accelerators_the_configuration_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    with_accelerators(monkeypatch, 0)
    launcher: dict[str, str] = {}
    launch.fit_devices(launcher, launch.config_path("ddp"))
    assert launcher == {}


def test_the_number_reaches_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    with_accelerators(monkeypatch, 2)
    launched: list[dict[str, str]] = []
    monkeypatch.setattr(launch, "_launch", lambda name, launcher, program: launched.append(launcher) or 0)
    assert launch.run("sft", ["--accelerate_config", "ddp", "--output_dir", "x"]) == 0
    assert launch.run("sft", ["--accelerate_config", "ddp", "--use_cpu"]) == 0
    assert [each.get("num_processes") for each in launched] == ["2", None]


def with_accelerators(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: number > 0)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: number)
