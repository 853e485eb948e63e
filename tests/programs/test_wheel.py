"""The wheel holds all that the command needs, and runs without a checkout."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content in a folder, as pip would put it into site-packages."""
    folder = tmp_path_factory.mktemp("wheel")
    build = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(folder)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def test_programs_configurations_and_demonstration_are_inside(unpacked: Path) -> None:
    package = unpacked / "finetune"
    for ours, shipped in (("trainers", "_programs"), ("accelerate_configs", "_accelerate_configs")):
        assert sorted(path.name for path in (ROOT / ours).glob("*.*")) == sorted(
            path.name for path in (package / shipped).iterdir()
        )
    for name in ("py.typed", "demo/train.jsonl", "demo/test.jsonl", "demo/model/model.safetensors"):
        assert (package / name).is_file(), name
    assert list(unpacked.glob("finetune-*.dist-info/licenses/LICENSE"))
    assert not list(unpacked.rglob("*.pyc"))


def test_the_command_finds_its_programs_without_the_checkout(unpacked: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from finetune.cli import launch, programs; from finetune.cli.main import main\n"
        "print(programs.program_path('sft')); print(launch.config_path('ddp'))\n"
        "sys.exit(main(['sft', '--help']))"
    )
    # -I and an explicit path: neither the checkout nor an editable install is found first.
    start = f"import sys; sys.path.insert(0, {str(unpacked)!r})\n"
    done = subprocess.run(
        [sys.executable, "-I", "-c", start + code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines[0] == str(unpacked / "finetune" / "_programs" / "sft.py")
    assert lines[1] == str(unpacked / "finetune" / "_accelerate_configs" / "ddp.yaml")
    assert "--model_name_or_path" in done.stdout


def test_the_extras_are_those_announced() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optimizers = {"galore", "8bit", "optimizers", "torchao"}
    extras = optimizers | {"liger", "deepspeed", "peft", "plots", "tracking", "glue", "dev", "bench", "all"}
    assert set(project["optional-dependencies"]) == extras
