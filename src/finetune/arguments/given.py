"""Values given in code, read by the declared type of their field; what does not fit it is refused by name."""

import dataclasses
import functools
import inspect
import math
import typing
from collections.abc import Mapping
from enum import Enum
from numbers import Real
from types import NoneType
from typing import Any

from finetune.arguments.readers import members_of, no_is_false, read_text, type_name, written_types
from finetune.errors import ArgumentError

_NUMBERS = (bool, int, float)
# Their types are those of transformers, which takes None for these as well.
_MAY_BE_NONE = ("num_train_epochs", "max_steps", "max_grad_norm", "eval_delay", "logging_steps", "save_steps")


def read_given(cls: type, field: dataclasses.Field[Any], value: Any) -> Any:
    """Returns what `value` means for a field of `cls`, by the type that was written for it.

    Texts of numbers are read as on a command line, because YAML takes `1e-4` for a text; False means the member `no` of
    an enumeration, because YAML reads the word `no` as False. In the fields that this package declares, numbers become
    Python's, and 2.0 becomes 2 where whole numbers are wanted.

    Raises:
        ArgumentError: a number where none is possible, or something else where only a number is. Other types are left
            to the checks of the fields, and those of fields that a user's class declares are not checked.
    """
    hint = written_types(cls)[field.name]
    if isinstance(value, str) and not isinstance(value, Enum):
        return read_text(field, hint, value)
    if value is False and no_is_false(hint):
        return "no"
    if value is field.default or field.name not in _own_fields(cls):
        return value
    members = members_of(hint)
    known = all(member in (*_NUMBERS, NoneType, str) or _is_container(member) or _is_enum(member) for member in members)
    if not known or (value is None and (NoneType in members or field.name in _MAY_BE_NONE)):
        return value
    if isinstance(value, Real) and not isinstance(value, bool):
        return _number(field.name, members, value)
    if set(members) <= {*_NUMBERS, NoneType} and not _fits(members, value):
        raise _refused(field.name, members, value)
    return value


@functools.cache
def _own_fields(cls: type) -> frozenset[str]:
    """Returns the fields whose types are written in this package, not in a class of the user."""
    owners = {name: base.__module__ for base in reversed(cls.__mro__) for name in inspect.get_annotations(base)}
    return frozenset(name for name, module in owners.items() if module.split(".")[0] == __name__.split(".")[0])


def _number(name: str, members: tuple[Any, ...], value: Real) -> Any:
    number = value if isinstance(value, (int, float)) or not hasattr(value, "item") else value.item()  # pyright: ignore
    if float in members:
        return number
    if int in members and isinstance(number, float) and math.isfinite(number) and number == int(number):
        return int(number)
    if int in members and not isinstance(number, float):
        return number
    if bool in members and number in (0, 1):
        return bool(number)
    raise _refused(name, members, value)


def _fits(members: tuple[Any, ...], value: Any) -> bool:
    """Whether something that is not a number may stand for one: a truth value, also NumPy's, or None for False."""
    return isinstance(value, bool) or type(value).__name__ in ("bool", "bool_") or (bool in members and value is None)


def _refused(name: str, members: tuple[Any, ...], value: Any) -> ArgumentError:
    plain = [member for member in members if member is not NoneType and not (_is_enum(member) and str in members)]
    kinds = ["a dict" if _is_mapping(member) else type_name(member) for member in plain]
    kinds += ["None"] if NoneType in members else []
    *first, last = dict.fromkeys(kinds)
    return ArgumentError(f"`{name}={value!r}` must be {', '.join(first)}{' or ' if first else ''}{last}.")


def _is_mapping(member: Any) -> bool:
    origin = typing.get_origin(member) or member
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _is_container(member: Any) -> bool:
    origin = typing.get_origin(member) or member
    return isinstance(origin, type) and issubclass(origin, (list, tuple, Mapping))


def _is_enum(member: Any) -> bool:
    return isinstance(member, type) and issubclass(member, Enum)
