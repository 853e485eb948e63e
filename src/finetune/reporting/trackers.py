"""Experiment trackers: `report_to` names resolved to the integration callbacks of transformers."""

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune.compat import available_trackers
from finetune.errors import ArgumentError, nearest


@dataclass(frozen=True)
class _Tracker:
    """`modules`: any of these groups of modules must be importable. `package`: what to pass to pip."""

    package: str
    modules: tuple[tuple[str, ...], ...]


_TRACKERS: dict[str, _Tracker] = {
    "azure_ml": _Tracker("azureml-core", (("azureml", "azureml.core", "azureml.core.run"),)),
    "clearml": _Tracker("clearml", (("clearml",),)),
    "codecarbon": _Tracker("codecarbon", (("codecarbon",),)),
    "comet_ml": _Tracker("comet-ml", (("comet_ml",),)),
    "dagshub": _Tracker("dagshub mlflow", (("dagshub", "mlflow"),)),
    "dvclive": _Tracker("dvclive", (("dvclive",),)),
    "flyte": _Tracker("flytekit", (("flytekit",),)),
    "kubeflow": _Tracker("", ()),
    "mlflow": _Tracker("mlflow", (("mlflow",),)),
    "neptune": _Tracker("neptune", (("neptune",),)),
    "swanlab": _Tracker("swanlab", (("swanlab",),)),
    "tensorboard": _Tracker("tensorboard", (("tensorboard",), ("tensorboardX",))),
    "trackio": _Tracker("trackio", (("trackio",),)),
    "wandb": _Tracker("wandb", (("wandb",),)),
}


def resolve(report_to: str | Sequence[str] | None) -> list[str]:
    """Returns the names `report_to` asks for: `none` gives none, `all` the installed ones, as in the constructor.

    The constructor of the arguments has resolved what it was given; a value assigned later is resolved here alone.
    transformers is imported for `all` only.

    Raises:
        ArgumentError: a name is unknown, or its package is not installed.
    """
    asked = [report_to] if isinstance(report_to, str) else list(report_to or [])
    if "none" in asked:
        if len(asked) > 1:
            raise ArgumentError(f"`report_to` is {asked}; `none` cannot be combined with other trackers.")
        return []
    names: list[str] = []
    for name in asked:
        if name == "all":
            names += available_trackers()
        elif name not in _TRACKERS:
            raise ArgumentError(
                f"`report_to` names {name!r}; choose from {', '.join(_TRACKERS)}, `all` or `none`."
                f"{nearest(str(name), _TRACKERS)}"
            )
        elif not _is_installed(name):
            raise ArgumentError(f"`report_to` asks for `{name}`, {_remedy(name)}, or set `report_to` to `none`.")
        else:
            names.append(name)
    return list(dict.fromkeys(names))


def callbacks(report_to: str | Sequence[str] | None, logging_dir: str | None = None) -> list[Any]:
    """Returns transformers' callbacks (classes or instances) for the trackers in `report_to`.

    `logging_dir` is the folder for TensorBoard, instead of `TENSORBOARD_LOGGING_DIR` or `output_dir`/runs/....

    Raises:
        ArgumentError: as `resolve`.
    """
    names = resolve(report_to)
    if not names:
        return []
    from transformers.integrations import get_reporting_integration_callbacks

    found: list[Any] = get_reporting_integration_callbacks(names)
    if logging_dir is not None and "tensorboard" in names:
        writer = found[names.index("tensorboard")]()
        writer.logging_dir = os.path.expanduser(logging_dir)
        found[names.index("tensorboard")] = writer
    return found


def _is_installed(name: str) -> bool:
    if name == "kubeflow":
        return "KUBEFLOW_TRAINER_SERVER_URL" in os.environ
    # Groups name a parent package before its child: looking up the child of a missing parent raises.
    groups = _TRACKERS[name].modules
    return any(all(importlib.util.find_spec(module) is not None for module in group) for group in groups)


def _remedy(name: str) -> str:
    if name == "kubeflow":
        return "which runs only inside a Kubeflow TrainJob (`KUBEFLOW_TRAINER_SERVER_URL` is not set). Run it there"
    return f"which is not installed. Run `pip install {_TRACKERS[name].package}`"
