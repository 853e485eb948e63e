"""Arguments of another class as one of ours: transformers', TRL's, a user's subclass of either, or of ours."""

import copy
import dataclasses
import functools
import inspect
import logging
from typing import Any, TypeVar, cast

from finetune.errors import ArgumentError

ArgumentsT = TypeVar("ArgumentsT")

logger = logging.getLogger(__name__)

# Whose classes are known here; all others are the user's.
_LIBRARIES = ("finetune", "transformers", "trl", "builtins", "typing", "abc")
# What transformers sets on its arguments for itself.
_INTERNAL = ("_n_gpu", "mixed_precision", "distributed_state", "deepspeed_plugin", "hf_deepspeed_config")


def coerce_training_arguments(args: Any, cls: type[ArgumentsT]) -> ArgumentsT:
    """Returns `args` as an instance of `cls`, one of our argument classes.

    Accepts None, a dict of fields, an instance of one of our classes, and instances of transformers'
    `TrainingArguments` or a subclass (TRL's `SFTConfig` too). A `cls` is returned as it is; everything else is copied
    and never changed. Fields that `cls` does not have, such as those a user's subclass added, and attributes that were
    set on `args`, become plain attributes of the result. Properties and methods of a user's subclass are there too,
    except those that call `super()`: a warning names them.

    Raises `ArgumentError` for another type, or a dict with an unknown key.
    """
    if isinstance(args, cls):
        return args
    if args is None:
        return cls(output_dir="tmp_trainer")  # type: ignore[call-arg]
    if isinstance(args, dict):
        return cls(**args)
    homes = {base.__module__.split(".")[0] for base in type(args).__mro__ if base.__name__ == "TrainingArguments"}
    if not homes & {"finetune", "transformers"}:
        raise ArgumentError(
            f"`args` is a {type(args).__name__}; it must be a finetune.{cls.__name__}, a"
            " transformers.TrainingArguments, a trl.SFTConfig, a dict or None."
        )
    known = {field.name for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    given = {field.name: _detached(getattr(args, field.name)) for field in dataclasses.fields(args) if field.init}
    made = _with_members_of(type(args), cast(type, cls))
    result: Any = made(**{name: value for name, value in given.items() if name in known})
    for name, value in given.items():
        if name not in known:
            setattr(result, name, value)
    for name, value in vars(args).items():
        derived = isinstance(inspect.getattr_static(made, name, None), property)
        internal = derived or name in _INTERNAL or name.startswith("__cached_")
        if name not in given and name not in vars(result) and not internal:
            setattr(result, name, _detached(value))
    if "finetune" in homes:
        vars(result)["_sources"] = dict(vars(args).get("_sources", {}))
    return result


def _detached(value: Any) -> Any:
    """Returns a copy of a container or of an `AcceleratorConfig`, so that two argument objects share no state."""
    if isinstance(value, (dict, list)) or type(value).__name__ == "AcceleratorConfig":
        return copy.deepcopy(value)
    return value


@functools.cache
def _with_members_of(theirs: type, ours: type) -> type:
    """Returns a subclass of `ours` that has what a user's class `theirs` adds; `ours` where it adds nothing."""
    fields = {*getattr(theirs, "__dataclass_fields__", ()), *getattr(ours, "__dataclass_fields__", ())}
    members: dict[str, Any] = {}
    for base in reversed(theirs.__mro__):
        if base.__module__.split(".")[0] not in _LIBRARIES:
            members |= {name: value for name, value in vars(base).items() if name not in fields}
    # What begins with an underscore is ours where both have it: another way to check arguments, for instance.
    private = {name for name in members if name.startswith(("__", "_abc_")) or (name[0] == "_" and hasattr(ours, name))}
    members = {name: value for name, value in members.items() if name not in private}
    lost = sorted(name for name, value in members.items() if _calls_super(value))
    if lost:
        logger.warning(
            "`%s` is used as a `%s`, where its %s has no effect: it calls `super()` of another class. Derive `%s` from "
            "`finetune.%s`.",
            theirs.__name__,
            ours.__name__,
            ", ".join(f"`{name}`" for name in lost),
            theirs.__name__,
            ours.__name__,
        )
    members = {name: value for name, value in members.items() if name not in lost}
    if not members:
        return ours

    def reduce(self: Any) -> Any:
        return _rebuilt, (theirs, ours, self.__getstate__())

    return type(ours)(theirs.__name__, (ours,), {"__module__": theirs.__module__, "__reduce__": reduce, **members})


def _calls_super(member: Any) -> bool:
    """Whether a function, property or method uses `super()` or `__class__`, which belong to the class it is from."""
    parts = [member, *(getattr(member, name, None) for name in ("fget", "fset", "func", "__func__"))]
    functions = [part for part in parts if inspect.isfunction(part)]
    return any("__class__" in function.__code__.co_freevars for function in functions)


def _rebuilt(theirs: type, ours: type, state: dict[str, Any]) -> Any:
    """Returns pickled arguments in the process that unpickles them."""
    cls = _with_members_of(theirs, ours)
    instance: Any = object.__new__(cls)
    instance.__dict__.update(state)
    return instance
