"""The command line of programs: flags, a YAML file, and where each value came from.

Flags are named as in transformers and TRL (`--learning_rate` or `--learning-rate`), `--config file.yaml` gives
defaults, flags win. An unknown flag or key ends the program with exit code 2 and the nearest name. Neither torch nor
transformers is imported, so `--help` is quick.
"""

import argparse
import dataclasses
import os
import sys
import typing
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.arguments.base import old_names_of
from finetune.arguments.readers import Option, guess, option_of
from finetune.arguments.resolved import record_sources, require_no_conflict
from finetune.errors import ArgumentError, nearest


def parse_arguments(
    dataclass_types: type | Sequence[type],
    argv: Sequence[str] | None = None,
    config_key: str = "--config",
    *,
    prog: str | None = None,
    description: str | None = None,
) -> tuple[Any, ...]:
    """Returns one instance per dataclass, filled from the command line and the YAML file that `config_key` names.

    A field that several dataclasses share is one flag and goes to all of them. The YAML file holds a flat mapping of
    field names; its `env` mapping is put into the environment. `sources_of(instance)` tells where each value came
    from. Old names are accepted in both places.

    Exits with code 2 and one message for an unknown flag or key, a value that cannot be read, or arguments that
    cannot be honoured.
    """
    types = [dataclass_types] if isinstance(dataclass_types, type) else list(dataclass_types)
    return parse_known(types, argv, config_key, prog=prog, description=description).instances


@dataclass(frozen=True)
class Parsed:
    """What a command line and its YAML file said: an instance per dataclass, and the words that belong to none.

    `unknown_keys` are those of the file, written as flags: `["--key", "value", ...]`.
    """

    instances: tuple[Any, ...]
    unknown_flags: list[str]
    unknown_keys: list[str]


def parse_known(
    types: Sequence[type],
    argv: Sequence[str] | None = None,
    config_key: str = "--config",
    *,
    prog: str | None = None,
    description: str | None = None,
    keep_flags: bool = False,
    keep_keys: bool = False,
) -> Parsed:
    """As `parse_arguments`, but unknown flags are returned with `keep_flags`, unknown keys with `keep_keys`."""
    parser, options, old_names = make_parser(types, config_key, prog=prog, description=description)
    namespace, unknown = parser.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    flags = vars(namespace)
    known = [*options, *old_names, config_key.lstrip("-")]
    for word in [] if keep_flags else unknown:
        name = word.split("=")[0]
        hint = nearest(name.lstrip("-").replace("-", "_"), known).replace("`", "`--", 1) if name.startswith("-") else ""
        parser.error(f"unrecognized argument `{name}`.{hint} `--help` lists all of them.")
    config = flags.pop("_config_file", None)
    sources = {name: f"flag --{name}" for name in flags}
    keys: list[str] = []
    try:
        read = _read_config(config, options, old_names, keys if keep_keys else None) if config else {}
        values = {**read, **flags}
        sources = {**dict.fromkeys(values, f"file {config}"), **sources}
        _use_new_names(types, values, sources)
        return Parsed(tuple(_build(cls, values, sources) for cls in types), unknown, keys)
    except (ArgumentError, OSError) as error:
        parser.error(str(error))


def make_parser(
    types: Sequence[type], config_key: str = "--config", *, prog: str | None = None, description: str | None = None
) -> tuple[argparse.ArgumentParser, dict[str, Option], set[str]]:
    """Returns the argparse parser of the dataclasses, its options by field name, and the old names it accepts."""
    usage = f"%(prog)s [{config_key} FILE] [--argument VALUE ...]"
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog=prog, description=description, usage=usage, allow_abbrev=False, formatter_class=layout
    )
    parser.add_argument(
        config_key, dest="_config_file", metavar="FILE", default=argparse.SUPPRESS, help="YAML file of arguments."
    )
    options: dict[str, Option] = {}
    old_names: set[str] = set()
    for cls in types:
        hints = typing.get_type_hints(cls)
        groups: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            if not field.init or field.name in options:
                continue
            title = _group_title(cls, field.name)
            if title not in groups:
                groups[title] = parser.add_argument_group(title)
            options[field.name] = _add_option(groups[title], field, hints[field.name])
        old_names |= set(old_names_of(cls)) - set(options)
    for name in sorted(old_names):
        spellings = {f"--{name}", f"--{name.replace('_', '-')}"}
        parser.add_argument(
            *sorted(spellings),
            dest=name,
            nargs="?",
            const=True,
            type=guess,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )
    return parser, options, old_names


def _group_title(cls: type, name: str) -> str:
    """Returns the first docstring line of the class that declares a field."""
    owner = next(base for base in reversed(cls.__mro__) if name in vars(base).get("__annotations__", {}))
    return (owner.__doc__ or owner.__name__).strip().split("\n")[0].rstrip(".")


def _add_option(group: Any, field: dataclasses.Field[Any], hint: Any) -> Option:
    """Adds one field to the parser and returns its option."""
    option = option_of(field, hint)
    settings: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "type": option.read}
    settings["help"] = _help(field).replace("%", "%%")
    if option.choices:
        settings["choices"] = option.choices
    elif not option.boolean:
        settings["metavar"] = "VALUE"
    if option.boolean or field.metadata.get("nargs") == "?":
        settings |= {"nargs": "?", "const": True, "metavar": "BOOL"}
    elif option.many:
        settings |= {"nargs": "+", "action": _CollapseOne}
    group.add_argument(f"--{field.name}", **settings)
    if "_" in field.name:  # hidden: the help would name everything twice
        group.add_argument(f"--{field.name.replace('_', '-')}", **{**settings, "help": argparse.SUPPRESS})
    if option.boolean and field.default is True:
        negations = [f"--no_{field.name}", f"--no-{field.name.replace('_', '-')}"]
        group.add_argument(
            *negations, dest=field.name, action="store_false", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    return option


class _CollapseOne(argparse.Action):
    """Stores several words as a list; a single word of a field that may be a plain text stays a text."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        single = len(values) == 1 and getattr(self.type, "single", False)
        setattr(namespace, self.dest, values[0] if single else values)


def _help(field: dataclasses.Field[Any]) -> str:
    """Returns the help text with the default."""
    text = field.metadata.get("help", "")
    if field.default is dataclasses.MISSING:
        return text if field.default_factory is not dataclasses.MISSING else f"{text} Required."
    return f"{text} [{'unset' if field.default is None else field.default}]"


def _read_config(
    path: str, options: dict[str, Option], old_names: set[str], unknown: list[str] | None
) -> dict[str, Any]:
    """Returns the values of a YAML file, converted as flags are, after exporting its `env` mapping.

    Unknown keys go to `unknown`, written as flags; without it they are errors.

    Raises:
        ArgumentError: no such file, not a mapping, an unknown key, or a value that cannot be read.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise ArgumentError(f"`--config {path}`: there is no such file.") from None
    except yaml.YAMLError as error:
        raise ArgumentError(f"`--config {path}` is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ArgumentError(f"`--config {path}` must hold a mapping of argument names to values.")
    environment = content.pop("env", None) or {}
    if not isinstance(environment, dict):
        raise ArgumentError(f"`env` in {path} must be a mapping of variable names to values.")
    os.environ.update({str(key): str(value) for key, value in environment.items()})
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name in options:
            try:
                values[name] = options[name].read_value(value)
            except (ValueError, argparse.ArgumentTypeError) as error:
                raise ArgumentError(f"`{key}: {value}` in {path}: {error}") from None
        elif name in old_names:
            values[name] = value
        elif unknown is not None:
            unknown += [f"--{key}", str(value)]
        else:
            raise ArgumentError(f"`{key}` in {path} is not an argument.{nearest(name, [*options, *old_names])}")
    return values


def _use_new_names(types: Sequence[type], values: dict[str, Any], sources: dict[str, str]) -> None:
    """Moves plainly renamed arguments to their new names, in place; a flag beats the file whatever its spelling."""
    for cls in types:
        for field in dataclasses.fields(cls):
            for spelling in field.metadata.get("aliases", ()):
                old = spelling[2:].replace("-", "_")
                if old not in values or old == field.name:
                    continue
                value, source = values.pop(old), sources.pop(old)
                warnings.warn(f"`{old}` is an old argument: use `{field.name}`.", FutureWarning, stacklevel=4)
                if field.name not in values or source.startswith("flag"):
                    values[field.name], sources[field.name] = value, source


def _build(cls: type, values: dict[str, Any], sources: dict[str, str]) -> Any:
    """Returns an instance of `cls` from the values that belong to it, with their sources recorded."""
    names = {field.name for field in dataclasses.fields(cls) if field.init} | set(old_names_of(cls))
    given = {name: value for name, value in values.items() if name in names}
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if field.init
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
        and field.name not in given
    ]
    if missing:
        raise ArgumentError(f"missing arguments: {', '.join(f'`--{name}`' for name in missing)}.")
    require_no_conflict(given, sources)
    instance = cls(**given)
    record_sources(instance, {name: sources[name] for name in given})
    return instance
