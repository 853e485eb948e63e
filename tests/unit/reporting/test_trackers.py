import importlib.util
import sys

import pytest

from finetune import TrainingArguments
from finetune.errors import ArgumentError
from finetune.reporting import trackers


@pytest.fixture
def installed(monkeypatch):
    """Returns a set of module names; exactly those are importable as far as the trackers can see."""
    names = set()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: name if name in names else None)
    monkeypatch.delenv("KUBEFLOW_TRAINER_SERVER_URL", raising=False)
    return names


@pytest.mark.parametrize("nothing", [None, "none", [], ["none"]])
def test_nothing(nothing):
    assert trackers.callbacks(nothing) == []


def test_names_are_those_of_transformers():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(trackers._TRACKERS) == set(INTEGRATION_TO_CALLBACK)


def test_callbacks_are_those_of_transformers():
    from transformers.integrations import TensorBoardCallback

    pytest.importorskip("tensorboard")
    assert trackers.callbacks("tensorboard") == trackers.callbacks(["tensorboard"] * 2) == [TensorBoardCallback]


def test_logging_dir_reaches_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    (writer,) = trackers.callbacks(["tensorboard"], logging_dir=str(tmp_path))
    assert writer.logging_dir == str(tmp_path)


def test_unknown_name_names_the_nearest():
    with pytest.raises(ArgumentError, match=r"'tensorbord'.*Did you mean `tensorboard`"):
        trackers.callbacks("tensorbord")


@pytest.mark.parametrize("name", ["wandb", "mlflow", "comet_ml", "dagshub", "tensorboard"])
def test_missing_package_says_how_to_install_it(installed, name):
    package = trackers._TRACKERS[name].package
    with pytest.raises(ArgumentError, match=rf"`{name}`.*`pip install {package}`.*`report_to`"):
        trackers.resolve([name])


def test_kubeflow_needs_its_job(installed, monkeypatch):
    with pytest.raises(ArgumentError, match="KUBEFLOW_TRAINER_SERVER_URL"):
        trackers.resolve("kubeflow")
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", "http://x")
    assert trackers.resolve("kubeflow") == ["kubeflow"]


def test_none_stands_alone():
    with pytest.raises(ArgumentError, match="`none` cannot be combined"):
        trackers.resolve(["none", "wandb"])


def test_all_means_the_same_as_in_the_constructor(monkeypatch, tmp_path):
    found = ["mlflow", "tensorboard"]
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: list(found))
    monkeypatch.delenv("KUBEFLOW_TRAINER_SERVER_URL", raising=False)
    args = TrainingArguments(str(tmp_path), report_to="all")
    assert trackers.resolve("all") == args.report_to == found
    monkeypatch.setattr(trackers, "_is_installed", lambda name: True)
    assert trackers.resolve(["wandb", "all"]) == ["wandb", *found]


def test_a_child_module_is_not_looked_up_below_a_missing_parent(monkeypatch):
    asked = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: asked.append(name))
    with pytest.raises(ArgumentError, match="azureml"):
        trackers.resolve("azure_ml")
    assert asked == ["azureml"]


def test_none_imports_nothing_heavy():
    import subprocess

    code = (
        "import sys; from finetune.reporting.trackers import callbacks; callbacks('none'); "
        "print('transformers' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
