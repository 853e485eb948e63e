"""The docstring of an argument class with its fields, written from the help texts that `--help` shows."""

import dataclasses
import functools
import textwrap
from typing import Any

from finetune.arguments.readers import written_types

_WIDTH = 100


@functools.cache
def with_fields(cls: type, doc: str) -> str:
    """Returns `doc` with a section `Args:`, before `Raises:`: type, default and help text of each field of `cls`.

    >>> @dataclasses.dataclass
    ... class Settings:
    ...     rate: float = dataclasses.field(default=0.1, metadata={"help": "Step size."})
    >>> print(with_fields(Settings, "Settings of a run."))
    Settings of a run.
    <BLANKLINE>
    Args:
        rate (float, default 0.1): Step size.
    """
    lines = ["Args:"]
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.init:
            lines += _entry(field, written_types(cls)[field.name])
    before, raises, after = _dedented(doc).partition("\nRaises:")
    return "\n".join([before.rstrip(), "", *lines]) + (f"\n{raises}{after}" if raises else "")


def _dedented(doc: str) -> str:
    """Returns a docstring without the indentation of the lines after the first."""
    first, _, rest = doc.partition("\n")
    return f"{first}\n{textwrap.dedent(rest)}".rstrip()


def _entry(field: dataclasses.Field[Any], hint: Any) -> list[str]:
    kind = getattr(hint, "__name__", None) if isinstance(hint, type) else None
    kind = kind or str(hint).replace("typing.", "").replace("finetune.compat.", "")
    if field.default_factory is not dataclasses.MISSING:
        kind += ", default empty"
    elif field.default is not dataclasses.MISSING:
        kind += f", default {getattr(field.default, 'value', field.default)!r}"
    text = f"{field.name} ({kind}): {field.metadata.get('help', '')}".rstrip()
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=" " * 4,
        subsequent_indent=" " * 8,
        break_long_words=False,
        break_on_hyphens=False,
    )
