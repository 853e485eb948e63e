"""The exceptions a user can meet. Each message says what was given, what is allowed and what to change."""

import difflib
from collections.abc import Iterable


class FinetuneError(Exception):
    """Base of every error raised on purpose by this package."""


class ArgumentError(FinetuneError, ValueError):
    """An argument, or a combination of arguments, that cannot be honoured."""


class DataFormatError(FinetuneError, ValueError):
    """A dataset, a row or a chat template that cannot be trained on as it is."""


class ModelLoadError(FinetuneError, OSError):
    """A model, tokenizer or adapter that cannot be read."""


class CheckpointError(FinetuneError, RuntimeError):
    """A checkpoint that cannot be written, or cannot be resumed from."""


class NonFiniteLossError(FinetuneError, FloatingPointError):
    """A loss or gradient norm that is NaN or infinite while the policy says to stop."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Returns `" Did you mean `x`?"` for the allowed name closest to `name`, or an empty string.

    >>> nearest("learning_rte", ["learning_rate", "seed"])
    ' Did you mean `learning_rate`?'
    """
    matches = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.6)
    return f" Did you mean `{matches[0]}`?" if matches else ""


def first_nearest(wanted: Iterable[str], allowed: Iterable[str]) -> str:
    """Returns `nearest` of the first of `wanted` that is close to one of `allowed`, or an empty string."""
    names = list(allowed)
    return next(filter(None, (nearest(name, names) for name in wanted)), "")


def ticked(names: Iterable[str]) -> str:
    """Returns names for a message.

    >>> ticked(["prompt", "completion"])
    '`prompt`, `completion`'
    """
    return ", ".join(f"`{name}`" for name in names)


def one_line(error: BaseException, limit: int = 300) -> str:
    """Returns all that an error says on one line, cut at `limit` characters.

    >>> one_line(ValueError("two\\n  lines"))
    'two lines'
    """
    said = " ".join(str(error).split())
    return said if len(said) <= limit else said[: limit - 3] + "..."


def first_line(error: BaseException, limit: int = 300) -> str:
    """Returns the first line of what an error says, or the name of its class if it says nothing.

    >>> first_line(RuntimeError("full disk\\nfile.cc:12")), first_line(KeyError())
    ('full disk', 'KeyError')
    """
    lines = str(error).strip().splitlines()
    return lines[0][:limit] if lines else type(error).__name__
