"""`optim_args`: "key=value, key=value" read with types, and an error for every key that would have no effect."""

import inspect
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from finetune.errors import ArgumentError, nearest

T = TypeVar("T")

_LEARNING_RATE_PREFIX = "lr@"
_OWNED_ELSEWHERE = {"lr": "learning_rate", "weight_decay": "weight_decay"}
_TRUE, _FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}


class OptimOptions:
    """The parsed `optim_args` of one run.

    Builders take the keys they know; `finish` then refuses the rest. A key `lr@PATTERN=RATE` gives the parameters
    whose name contains the regular expression PATTERN their own learning rate, with any optimizer.

    >>> options = OptimOptions("rank=64, scale=0.1, lr@lm_head=1e-5")
    >>> options.take("rank", int, 128), options.learning_rates
    (64, {'lm_head': 1e-05})
    """

    def __init__(self, text: str | Mapping[str, Any] | None, optim: str = ""):
        self.optim = optim
        self._values = _parse(text)
        self._known: list[str] = []
        self.learning_rates: dict[str, float] = {}
        for key in [k for k in self._values if k.startswith(_LEARNING_RATE_PREFIX)]:
            rate = self._convert(key, self._values.pop(key), float)
            self.learning_rates[key[len(_LEARNING_RATE_PREFIX) :]] = rate

    def take(self, key: str, kind: type[T], default: T) -> T:
        """Returns the value of `key` as a `kind`, or `default`; the key counts as used. Raises `ArgumentError`."""
        self._known.append(key)
        return self._convert(key, self._values.pop(key), kind) if key in self._values else default

    def choice(self, key: str, allowed: tuple[str, ...], default: str) -> str:
        """Returns the value of `key`, which must be one of `allowed`. Raises `ArgumentError`."""
        value = self.take(key, str, default)
        if value not in allowed:
            raise ArgumentError(
                f"`optim_args`: `{key}={value}` is not possible.{nearest(value, allowed)} "
                f"Allowed: {', '.join(allowed)}."
            )
        return value

    def for_signature(self, cls: type, *, except_for: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Returns the remaining keys that `cls(...)` takes by name, converted to the type of their default.

        Keys in `except_for` are set by the builder and cannot be given.
        """
        taken: dict[str, Any] = {}
        for name, parameter in inspect.signature(cls).parameters.items():
            if name in {"params", "model", "self", *_OWNED_ELSEWHERE, *(except_for or {})}:
                continue
            if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                continue
            self._known.append(name)
            if name in self._values:
                kind = _kind(parameter)
                raw = self._values.pop(name)
                taken[name] = self._convert(name, raw, kind) if kind else _literal(raw)
        return taken

    def finish(self) -> None:
        """Raises `ArgumentError` for the first key nobody took."""
        for key in self._values:
            if key in _OWNED_ELSEWHERE:
                hint = f" Set it with `{_OWNED_ELSEWHERE[key]}`."
            else:
                hint = f"{nearest(key, self._known)} Allowed: {', '.join(sorted(set(self._known))) or 'none'}."
            raise ArgumentError(f"`optim_args` has `{key}`, which `optim={self.optim}` does not take.{hint}")

    def _convert(self, key: str, raw: Any, kind: type[T]) -> T:
        text = str(raw).strip()
        try:
            if kind is bool:
                if text.lower() not in _TRUE | _FALSE:
                    raise ValueError
                return text.lower() in _TRUE  # pyright: ignore[reportReturnType]
            return kind(text)  # pyright: ignore[reportCallIssue]
        except ValueError as problem:
            wanted = {bool: "true or false", int: "an integer", float: "a number"}.get(kind, kind.__name__)
            raise ArgumentError(f"`optim_args`: `{key}={text}` must be {wanted}.") from problem


def _parse(text: str | Mapping[str, Any] | None) -> dict[str, Any]:
    if text is None or isinstance(text, str):
        pairs: dict[str, Any] = {}
        for part in (text or "").split(","):
            key, equals, value = (piece.strip() for piece in part.rpartition("="))
            if equals and key and value:
                pairs[key] = value
            elif part.strip():
                raise ArgumentError(
                    f'`optim_args`: `{part.strip()}` is not `key=value`. Write `optim_args="rank=64, scale=0.1"`.'
                )
        return pairs
    return dict(text)


def _kind(parameter: inspect.Parameter) -> type | None:
    """Returns the type an option must have, or None where the class does not say (`momentum=0` means a number)."""
    if isinstance(parameter.default, bool):
        return bool
    if isinstance(parameter.default, float) or "float" in str(parameter.annotation):
        return float if parameter.default is not None else None
    return str if isinstance(parameter.default, str) else None


def _literal(raw: Any) -> Any:
    """Returns the bool, None, int, float or else string that `raw` spells."""
    text = str(raw).strip()
    words: dict[str, Any] = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    if re.fullmatch(r"[-+]?\d+", text):
        return int(text)
    try:
        return float(text)
    except ValueError:
        return text
