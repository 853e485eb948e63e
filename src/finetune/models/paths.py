"""What `model` may be as a path or Hub id: the checks that read no weights."""

from __future__ import annotations

import json
import os
from pathlib import Path

from finetune.errors import ModelLoadError, nearest

_ADAPTER = "adapter_config.json"
_CONFIG_FILES = ("config.json", _ADAPTER)


def check_model_path(name: str) -> None:
    """Raises `ModelLoadError` when `name` is meant as a folder and cannot be a model's. Hub ids pass unread."""
    path = Path(name).expanduser()
    if not name.strip():
        raise ModelLoadError("`model` is empty. Give a folder written by `save_pretrained`, or a Hub id `owner/name`.")
    if path.is_file():
        raise ModelLoadError(f"`model` is the file {name!r}. Give the folder that holds it ({str(path.parent)!r}).")
    if path.is_dir():
        _check_folder(path)
    elif name.startswith((os.sep, ".", "~")) or name.count("/") > 1:
        siblings = [str(each) for each in path.parent.glob("*")] if path.parent.is_dir() else []
        raise ModelLoadError(
            f"`model` names the folder {name!r}, which does not exist.{nearest(str(path), siblings)} Give a folder "
            "written by `save_pretrained`, or a Hub id `owner/name`."
        )


def refuse_adapter_folder(name: str) -> None:
    """Raises `ModelLoadError` for a folder that holds an adapter alone: loaded as a model it would be frozen."""
    path = Path(name).expanduser()
    if not (path / _ADAPTER).is_file() or (path / "config.json").is_file():
        return
    try:
        base = json.loads((path / _ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    of = f" (from {base!r})" if base else ""
    raise ModelLoadError(
        f"`model` is the folder {name!r}, which holds an adapter ({_ADAPTER}) and no whole model. To train the adapter "
        f"further, load its model{of} and pass `model=peft.PeftModel.from_pretrained(base, {name!r}, "
        "is_trainable=True)`, where `base` is the loaded model. To train on top of it, merge it "
        "(`merge_and_unload()`), save the result with `save_pretrained`, and give that folder."
    )


def _check_folder(path: Path) -> None:
    if not os.access(path, os.R_OK | os.X_OK):
        raise ModelLoadError(f"`model` is the folder {str(path)!r}, which cannot be read: permission denied.")
    names = sorted(each.name for each in path.iterdir())
    if any(name in names for name in _CONFIG_FILES):
        return
    if any(name.endswith(".gguf") for name in names):
        return
    nested = [name for name in names if (path / name / "config.json").is_file()]
    hint = f" {str(path / nested[-1])!r} has one; is that the folder you mean?" if nested else ""
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"
    raise ModelLoadError(
        f"`model` is the folder {str(path)!r}, which holds {shown} and no config.json, so it is not a saved model."
        f"{hint} Expected is a folder written by `save_pretrained` or `trainer.save_model`."
    )
