"""Turning arguments into text and back into objects: dicts, JSON, pickles, old attribute names."""

import contextlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from typing import TYPE_CHECKING, Any, cast

from finetune.arguments.base import old_names_of
from finetune.arguments.distributed import AcceleratorConfig
from finetune.arguments.old_names import READABLE_OLD_NAMES, assign_old_name
from finetune.errors import nearest

# Belong to the running process; a copy in another process must set up its own.
_PROCESS_STATE = ("_device", "_distributed_state")

# Fields that end in `_token` but name a token of the vocabulary.
_VOCABULARY = ("eos_token", "pad_token")


class Serialization:
    """How `TrainingArguments` prints, pickles and answers to old attribute names."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as values that JSON knows; tokens become `<HUB_TOKEN>`."""
        return {field.name: plain(field.name, getattr(self, field.name)) for field in fields(self) if field.init}  # type: ignore[arg-type]

    def to_json_string(self) -> str:
        """Returns `to_dict()` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def to_sanitized_dict(self) -> dict[str, Any]:
        """Returns `to_dict()` and the batch sizes with every other type turned into text, as trackers need it."""
        values = self.to_dict()
        values["train_batch_size"] = self.train_batch_size  # type: ignore[attr-defined]
        values["eval_batch_size"] = self.eval_batch_size  # type: ignore[attr-defined]
        return {key: value if type(value) in (bool, int, float, str) else str(value) for key, value in values.items()}

    def __repr__(self) -> str:
        lines = [f"{name}={value!r},\n" for name, value in sorted(self.to_dict().items())]
        return f"{type(self).__name__}(\n{''.join(lines)})"

    __str__ = __repr__

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in _PROCESS_STATE}

    if not TYPE_CHECKING:  # a checker is to see misspelt fields

        def __getattr__(self, name: str) -> Any:
            if name in READABLE_OLD_NAMES:
                return READABLE_OLD_NAMES[name](self)
            raise _UnknownAttribute(name=name, obj=self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in READABLE_OLD_NAMES:
            given, advice = assign_old_name(self, name, value, old_names_of(type(self))[name])
            warnings.warn(f"`{name}` is an old argument: {advice}", FutureWarning, stacklevel=2)
            for new, translated in given.items():
                object.__setattr__(self, new, translated)
            return
        object.__setattr__(self, name, value)


class _UnknownAttribute(AttributeError):
    """Names the nearest field, but only once it is shown: the loop asks for optional attributes in every step."""

    def __str__(self) -> str:
        name, args = str(self.name), cast(Any, self.obj)
        hint = "" if name.startswith("_") else nearest(name, [field.name for field in fields(args)])
        return f"{type(args).__name__} has no attribute {name!r}.{hint}"


def plain(name: str, value: Any) -> Any:
    """Returns a field as data that JSON and YAML know: enumerations by value, NumPy's numbers and arrays as Python's,
    configuration objects as dicts, functions and classes by name, everything else as text."""
    if name.endswith("_token") and name not in _VOCABULARY:
        return f"<{name.upper()}>"
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Enum):
        return plain("", value.value)
    if isinstance(value, AcceleratorConfig):
        return value.to_dict()
    if isinstance(value, (list, tuple)):
        return [plain("", item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain("", item) for item in value), key=str)
    if isinstance(value, Mapping):
        return {_plain_key(key): plain("", item) for key, item in value.items()}
    module, kind = type(value).__module__.split(".")[0], type(value).__name__
    if module == "torch" and kind == "dtype":
        return str(value).removeprefix("torch.")
    if module == "numpy" and hasattr(value, "tolist"):
        return plain("", value.tolist())
    return _plain_object(value)


def _plain_key(key: Any) -> Any:
    key = plain("", key)
    return key if key is None or isinstance(key, (bool, int, float, str)) else str(key)


def _plain_object(value: Any) -> Any:
    """Returns what a configuration object says of itself, the name of a function or class, else the object as text."""
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if hasattr(value, "__qualname__"):
        return f"{getattr(value, '__module__', '')}.{value.__qualname__}".lstrip(".")
    for method in ("to_dict", "to_json"):
        if hasattr(value, method):
            with contextlib.suppress(Exception):  # one that wants arguments, for instance
                said = getattr(value, method)()
                return str(value) if said is value else plain("", said)
    return str(value)
