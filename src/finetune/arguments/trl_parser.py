"""`TrlParser`: the parser that scripts written for TRL make, on `parse_arguments`."""

import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from finetune.arguments.parse import parse_known
from finetune.errors import ArgumentError


class TrlParser:
    """Reads flags and a YAML file (`--config`) into one instance per dataclass, with the interface of TRL's parser.

    `TrlParser((ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig)).parse_args_and_config()` is what the
    scripts of TRL call. A field that several dataclasses share is one flag and goes to all of them, where TRL has an
    error.
    """

    def __init__(
        self,
        dataclass_types: type | Iterable[type] | None = None,
        *,
        prog: str | None = None,
        description: str | None = None,
        **others: Any,
    ) -> None:
        """Takes dataclasses, the name of the program and a text for `--help`.

        Raises:
            ArgumentError: no dataclass, one with a field `config`, or an option of argparse that is not read here.
        """
        if others:
            raise ArgumentError(
                f"`TrlParser` takes `dataclass_types`, `prog` and `description`, not {', '.join(map(repr, others))}. "
                "Drop what it does not take."
            )
        types = [dataclass_types] if isinstance(dataclass_types, type) else list(dataclass_types or ())
        if not types or not all(dataclasses.is_dataclass(each) for each in types):
            raise ArgumentError(
                f"`dataclass_types` is {dataclass_types!r}; allowed are dataclasses, at least one, such as "
                "`(ScriptArguments, SFTConfig, ModelConfig)`."
            )
        for each in types:
            if "config" in {field.name for field in dataclasses.fields(each)}:
                raise ArgumentError(
                    f"`{each.__name__}` has a field `config`, but `--config` names the file. Rename it."
                )
        self.dataclass_types: list[type] = types
        self.prog, self.description = prog, description

    def parse_args_and_config(
        self,
        args: Sequence[str] | None = None,
        return_remaining_strings: bool = False,
        fail_with_unknown_args: bool = True,
        separate_remaining_strings: bool = False,
    ) -> tuple[Any, ...]:
        """Returns an instance per dataclass; with `return_remaining_strings` a list of the words that none has, too.

        These are unknown keys of the file, written as flags, then unknown flags; `separate_remaining_strings` makes two
        lists of them. Otherwise an unknown flag ends the program, as does an unknown key, which
        `fail_with_unknown_args=False` leaves at a warning. All other errors are those of `parse_arguments`.

        Raises:
            ArgumentError: `separate_remaining_strings` without `return_remaining_strings`.
        """
        if separate_remaining_strings and not return_remaining_strings:
            raise ArgumentError(
                "`separate_remaining_strings` says how the remaining words are returned, which they are not. Set "
                "`return_remaining_strings=True` too."
            )
        keeps_keys = return_remaining_strings or not fail_with_unknown_args
        parsed = parse_known(
            self.dataclass_types,
            args,
            prog=self.prog,
            description=self.description,
            keep_flags=return_remaining_strings,
            keep_keys=keeps_keys,
        )
        if separate_remaining_strings:
            return (*parsed.instances, parsed.unknown_keys, parsed.unknown_flags)
        if return_remaining_strings:
            return (*parsed.instances, parsed.unknown_keys + parsed.unknown_flags)
        if parsed.unknown_keys:
            warnings.warn(
                f"the file has keys that no argument is called: {' '.join(parsed.unknown_keys)}. They have no effect.",
                stacklevel=2,
            )
        return parsed.instances
