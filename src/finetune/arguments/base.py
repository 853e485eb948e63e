"""How an argument field is declared, and how a constructor call with current and old names is read."""

import dataclasses
import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from finetune.arguments.document import with_fields
from finetune.arguments.given import read_given
from finetune.errors import ArgumentError, nearest

# Takes the value given under the old name and the keyword arguments of the call, which it may extend. Returns what
# the warning says the user should write instead.
Translation = Callable[[Any, dict[str, Any]], str]


def arg(default: Any = dataclasses.MISSING, help: str = "", *, factory: Any = None, **metadata: Any) -> Any:
    """Returns a dataclass field with a help text; further metadata goes to argparse (`choices`, `nargs`, `aliases`).

    `old` names the spellings that former releases used for the very same value. They become command-line aliases, and
    keyword arguments accepted with a warning.
    """
    old = metadata.pop("old", ())
    if old:
        spellings = [f"--{name}" for name in old]
        spellings += [f"--{name.replace('_', '-')}" for name in old if "_" in name]
        metadata["aliases"] = spellings
    show = metadata.pop("repr", True)
    if factory is not None:
        return dataclasses.field(default_factory=factory, repr=show, metadata={"help": help, **metadata})
    return dataclasses.field(default=default, repr=show, metadata={"help": help, **metadata})


class ArgumentGroup:
    """Base of the groups that make up `TrainingArguments`; a group checks its own fields."""

    def _validate(self) -> None:
        """Raises ArgumentError if the fields of this group cannot be honoured together."""


def require(condition: bool, message: str) -> None:
    """Raises ArgumentError with `message` unless `condition` holds."""
    if not condition:
        raise ArgumentError(message)


def require_choice(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raises ArgumentError unless `value` is one of `allowed`, naming the nearest."""
    choices = list(allowed)
    if value not in choices:
        raise ArgumentError(f"`{name}={value!r}` is not one of {choices}.{nearest(str(value), map(str, choices))}")


def require_positive(name: str, value: Any, *, zero: bool = False) -> None:
    """Raises ArgumentError unless `value` is None or a number above zero (or zero, if allowed)."""
    if value is None:
        return
    bound = "at least 0" if zero else "above 0"
    if not isinstance(value, (int, float)):
        raise ArgumentError(f"`{name}={value!r}` must be a number {bound}.")
    if value < 0 or (value == 0 and not zero):
        raise ArgumentError(f"`{name}={value!r}` must be {bound}.")


class ArgumentsMeta(type):
    """Reads a constructor call: translates old names with one warning each, refuses unknown names, reads texts.

    A number or a truth value given as text, as a YAML file may (`1e-4` is a text there), is read as on a command line.

    It is a metaclass because a dataclass writes its own `__init__`: only the call itself sees every keyword, also for
    subclasses that users declare with a plain `@dataclass`. The signature stays that of `__init__`.
    """

    @property
    def __doc__(cls) -> str | None:
        """The docstring that was written, and a section with all fields: what `help` shows."""
        written = vars(cls).get("__doc__")
        # `@dataclass` reads the docstring as well, just before it sets this: too early, and nobody wants it yet.
        return with_fields(cls, written) if written and "__match_args__" in vars(cls) else written

    @__doc__.setter
    def __doc__(cls, value: str | None) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        # A dataclass without a docstring gets one.
        type.__dict__["__doc__"].__set__(cls, value)

    @property
    def __signature__(cls) -> inspect.Signature:
        signature = inspect.signature(cls.__init__)
        parameters = list(signature.parameters.values())[1:]
        return signature.replace(parameters=parameters, return_annotation=signature.empty)

    if not TYPE_CHECKING:  # a checker is to see the fields, not `Any`

        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            return _construct(cls, args, kwargs)


def _construct(cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Returns the instance that the call `cls(*args, **kwargs)` makes, with the sources of its values recorded."""
    parameters = inspect.signature(cls).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    by_position = dict(zip(parameters, args, strict=False))
    given = {**by_position, **kwargs}
    old_names = old_names_of(cls)
    for name, value in kwargs.items():
        if name in parameters:
            continue
        if name in old_names:
            given.pop(name, None)
            advice = old_names[name](value, given)
            warnings.warn(f"`{name}` is an old argument of {cls.__name__}: {advice}", FutureWarning, stacklevel=3)
        elif not open_ended:
            raise unknown_argument(cls.__name__, name, [*parameters, *old_names])
    sources = {name: "code" for name, value in given.items() if _chosen(cls, name, value)}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name in given:
            given[field.name] = read_given(cls, field, given[field.name])
    for name in set(by_position) - set(kwargs):
        del given[name]
    instance: Any = cls.__new__(cls, *args, **given)  # pyright: ignore[reportCallIssue, reportArgumentType]
    instance.__dict__["_sources"] = sources
    instance.__init__(*args, **given)
    return instance


def _chosen(cls: type, name: str, value: Any) -> bool:
    """Returns whether a given value is not the default; `dataclasses.replace` and parsers pass every field."""
    field = getattr(cls, "__dataclass_fields__", {}).get(name)
    if field is None:
        return False
    factory = field.default_factory
    default = field.default if factory is dataclasses.MISSING else factory()
    return default is dataclasses.MISSING or bool(default != value)


def unknown_argument(owner: str, name: str, allowed: Iterable[str]) -> ArgumentError:
    """Returns the error for a name that is neither current nor old."""
    return ArgumentError(
        f"{owner} has no argument `{name}`.{nearest(name, allowed)} `help({owner})` or `--help` lists all of them."
    )


def old_names_of(cls: type) -> dict[str, Translation]:
    """Returns every old name `cls` understands: the `_OLD_NAMES` along its MRO and the `old=` of its fields."""
    table: dict[str, Translation] = {}
    for base in reversed(cls.__mro__):
        table.update(vars(base).get("_OLD_NAMES", {}))
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        for spelling in field.metadata.get("aliases", ()):
            if "-" not in spelling[2:]:
                table[spelling[2:]] = renamed(field.name)
    return table


def renamed(new: str) -> Translation:
    """Returns the translation of a plain renaming; a value given under the new name as well must agree."""

    def translate(value: Any, given: dict[str, Any]) -> str:
        if new in given and given[new] != value:
            raise ArgumentError(
                f"`{new}={given[new]!r}` and its old spelling, set to {value!r}, disagree. Keep only `{new}`."
            )
        if value is not None:
            given[new] = value
        return f"use `{new}={value!r}`."

    return translate
