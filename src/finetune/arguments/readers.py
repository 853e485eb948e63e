"""How the words of a command line, and the values of a YAML file, become values of a declared type."""

import argparse
import dataclasses
import functools
import inspect
import json
import typing
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union

from finetune.environment import parse_bool
from finetune.errors import ArgumentError

Read = Callable[[str], Any]


@dataclasses.dataclass(frozen=True)
class Option:
    """One flag: the field it fills, how a word becomes a value, and whether it takes several words."""

    name: str
    read: Read
    field: dataclasses.Field[Any]
    many: bool = False
    boolean: bool = False
    choices: Sequence[str] | None = None
    no_is_false: bool = False

    def read_value(self, value: Any) -> Any:
        """Returns the value for something that stood in a YAML file, where `2e-5` is a text and `on` a bool."""
        if value is None or isinstance(value, dict):
            return value
        if value is False and self.no_is_false:
            return "no"
        if self.many:
            if not isinstance(value, list):
                return self.read(str(value))
            return [item if isinstance(item, dict) else self.read(str(item)) for item in value]
        result = self.read(str(value))
        if self.choices and result not in self.choices:
            raise ValueError(f"choose from {list(self.choices)}")
        return result


def option_of(field: dataclasses.Field[Any], hint: Any) -> Option:
    """Returns how a field of type `hint` is read from text."""
    members = [member for member in members_of(hint) if member is not NoneType]
    optional = NoneType in members_of(hint)
    choices = field.metadata.get("choices")
    choices = list(choices) if choices is not None else None
    lists = [member for member in members if member is list or typing.get_origin(member) is list]
    plain = [member for member in members if member not in lists]
    if lists:
        item = (typing.get_args(lists[0]) or (str,))[0]
        read = _reader(plain or [item], False, field.name)
        read.single = bool(plain)  # type: ignore[attr-defined]
        return Option(field.name, read, field, many=True)
    read = _reader(members, optional, field.name)
    return Option(field.name, read, field, boolean=members == [bool], choices=choices, no_is_false=no_is_false(hint))


@functools.cache
def written_types(cls: type) -> dict[str, Any]:
    """Returns the types of a class's fields as they were written.

    Not those in `dataclasses.fields`: transformers' `HfArgumentParser` takes the None out of them, for good.
    """
    return {name: hint for base in reversed(cls.__mro__) for name, hint in inspect.get_annotations(base).items()}


def read_text(field: dataclasses.Field[Any], hint: Any, text: str) -> Any:
    """Returns the number or truth value that `text` says, for a field that takes nothing else; else `text` itself.

    Raises `ArgumentError` when it says neither.
    """
    members = [member for member in members_of(hint) if member is not NoneType]
    if not members or not set(members) <= {bool, int, float}:
        return text
    try:
        return option_of(field, hint).read(text)
    except argparse.ArgumentTypeError as error:
        raise ArgumentError(f"`{field.name}`: {error}.") from None


def members_of(hint: Any) -> tuple[Any, ...]:
    """Returns the types of a union, or the one type."""
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, UnionType) else (hint,)


def no_is_false(hint: Any) -> bool:
    """Returns whether `hint` names an enumeration with the member `no`, a word that YAML reads as False."""
    enumerations = [member for member in members_of(hint) if isinstance(member, type) and issubclass(member, Enum)]
    return any(member.value == "no" for enumeration in enumerations for member in enumeration)


def _reader(members: list[Any], optional: bool, name: str) -> Any:
    """Returns a function that turns a word into the first of `members` that takes it."""

    def read(text: str) -> Any:
        if optional and str not in members and text.lower() in ("none", "null"):
            return None
        for member in members:
            value = _as(member, text, name)
            if value is not _NOT_THIS:
                return value
        if str in members:
            return text
        raise argparse.ArgumentTypeError(f"{text!r} is not {' or '.join(type_name(member) for member in members)}")

    return read


_NOT_THIS = object()


def _as(member: Any, text: str, name: str) -> Any:
    """Returns `text` as one type of a union, or `_NOT_THIS`."""
    if member is bool:
        try:
            return parse_bool(name, text)
        except ArgumentError:
            return _NOT_THIS
    if member in (int, float):
        try:
            number = float(text)
            return number if member is float else int(text) if text.lstrip("+-").isdigit() else int(_whole(number))
        except (ValueError, OverflowError):  # an infinite number of steps
            return _NOT_THIS
    if member is dict or typing.get_origin(member) is dict:
        try:
            return json.loads(text) if text.lstrip().startswith("{") else _NOT_THIS
        except json.JSONDecodeError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not valid JSON: {error}") from None
    if typing.get_origin(member) is Literal:
        spelled = {str(value).lower(): value for value in typing.get_args(member)}
        return spelled.get(text.lower(), _NOT_THIS)
    if isinstance(member, type) and issubclass(member, Enum):
        return text if text in [item.value for item in member] else _NOT_THIS
    return text if member in (str, Any) or member is Path else _NOT_THIS


def _whole(number: float) -> float:
    if number != int(number):
        raise ValueError
    return number


def type_name(member: Any) -> str:
    """Returns what a message calls a type: "a whole number", "one of [...]"."""
    if typing.get_origin(member) is Literal:
        return f"one of {list(typing.get_args(member))}"
    if isinstance(member, type) and issubclass(member, Enum):
        return f"one of {[item.value for item in member]}"
    origin = typing.get_origin(member) or member
    return _TYPE_NAMES.get(origin, "JSON")


_TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", list: "a list"}


def guess(text: str) -> Any:
    """Returns the value of an old flag, whose type is no longer declared."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError:
        return text
