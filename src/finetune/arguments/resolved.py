"""Where each argument came from, and the file that says so."""

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any, TypeVar

from finetune import environment
from finetune.arguments.serialize import plain
from finetune.errors import ArgumentError
from finetune.files import write_atomically

ArgumentsT = TypeVar("ArgumentsT")

logger = logging.getLogger(__name__)


def sources_of(args: Any) -> dict[str, str]:
    """Returns where each field of a dataclass instance got its value.

    `"default"`; `"flag --name"` or `"file path"` from `parse_arguments`; `"code"` for a keyword argument other than
    the default; `"derived"` for a value that was filled in from other fields, the device or the environment.
    """
    recorded = vars(args).get("_sources", {})
    sources: dict[str, str] = {}
    for field in dataclasses.fields(args):
        if not field.init:
            continue
        if field.name in recorded:
            sources[field.name] = recorded[field.name]
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        unchanged = plain("", default) == plain("", getattr(args, field.name))
        sources[field.name] = "default" if unchanged else "derived"
    return sources


def record_sources(args: Any, sources: dict[str, str]) -> None:
    """Remembers where the values of `args` came from; fields set through an old name inherit its source."""
    names = {field.name for field in dataclasses.fields(args)}
    through_old = sorted({source for name, source in sources.items() if name not in names})
    recorded = dict(vars(args).get("_sources", {}))
    for name, source in recorded.items():
        if source == "code" and name not in sources and through_old:
            recorded[name] = ", ".join(through_old)
    recorded.update({name: source for name, source in sources.items() if name in names})
    vars(args)["_sources"] = recorded


def replace_arguments(args: ArgumentsT, **changes: Any) -> ArgumentsT:
    """Returns a copy of `args` with `changes`, checked anew; unlike `dataclasses.replace` it keeps the sources.

    Attributes that were set beside the fields are kept, and may be among the changes.
    """
    fields = {field.name for field in dataclasses.fields(args)}  # type: ignore[arg-type]
    beside = {name: value for name, value in vars(args).items() if name not in fields}
    set_beside = {name: changes.pop(name) for name in list(changes) if name in beside}
    copy = dataclasses.replace(args, **changes)  # type: ignore[type-var]
    made = {"hf_deepspeed_config", *vars(copy)}  # what `__post_init__` derives from the fields
    vars(copy).update({name: value for name, value in beside.items() if name not in made} | set_beside)
    vars(copy)["_sources"] = {**vars(args).get("_sources", {}), **dict.fromkeys(changes, "code")}
    return copy


def require_no_conflict(values: dict[str, Any], sources: dict[str, str]) -> None:
    """Raises ArgumentError if a flag or a file contradicts what `accelerate launch` put into the environment.

    Only values that a user wrote are compared: the launcher exports its own defaults too, so `no` and `1` there are
    no statement. Construction of the arguments compares the rest.
    """
    precision = environment.launched_precision()
    for name in ("bf16", "fp16"):
        if values.get(name) is False and precision == name:
            _refuse(name, values[name], sources[name], f"ACCELERATE_MIXED_PRECISION={precision}")
    if values.get("use_cpu") is False and environment.launched_on_cpu():
        _refuse("use_cpu", False, sources["use_cpu"], f"ACCELERATE_USE_CPU={os.environ['ACCELERATE_USE_CPU']}")
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    chosen = values.get("torch_compile_backend")
    if chosen is not None and backend != "no" and str(chosen).lower() != backend:
        source = sources["torch_compile_backend"]
        _refuse("torch_compile_backend", chosen, source, f"ACCELERATE_DYNAMO_BACKEND={backend}")


def _refuse(name: str, value: Any, source: str, variable: str) -> None:
    raise ArgumentError(
        f"`{name}={value}` ({source}) disagrees with {variable}, which `accelerate launch` took from its flags or"
        " its config file. Set both to the same, or one of them only."
    )


def resolved_config(*args: Any) -> dict[str, Any]:
    """Returns, for each dataclass instance, every field with its value and source; tokens are not in it."""
    config: dict[str, Any] = {}
    for group in args:
        sources = sources_of(group)
        config[type(group).__name__] = {
            name: {"value": plain(name, getattr(group, name)), "source": source} for name, source in sources.items()
        }
    variables = {name: value for name, value in sorted(os.environ.items()) if name.startswith(("ACCELERATE_", "FSDP_"))}
    if variables:
        config["environment"] = {name: {"value": value, "source": "environment"} for name, value in variables.items()}
    return config


def write_resolved_config(path: str | os.PathLike[str], *args: Any) -> Path:
    """Writes `resolved_config(*args)` as YAML and returns the path; the file is complete or absent."""
    import yaml

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(resolved_config(*args), sort_keys=False, default_flow_style=None, width=120)
    write_atomically(path, text)
    return path


def note_arguments(folder: str | os.PathLike[str], *args: Any) -> None:
    """Writes `resolved_config.yaml` into `folder`. No run ends because of it: a failure is a warning."""
    try:
        write_resolved_config(Path(folder) / "resolved_config.yaml", *args)
    except Exception as error:
        logger.warning("`resolved_config.yaml` was not written into `%s`: %s", folder, error)
