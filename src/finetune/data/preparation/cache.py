"""The key under which prepared rows are cached, the lock of who prepares them, and the reason why a cache missed.

`datasets` keys its cache by hashing the mapped function with all it holds; a changed attribute of a tokenizer then
costs hours, and a changed template may go unnoticed. Here the key is made of what decides the result: the data's
fingerprint, the tokenizer's content, the template, the settings and the version of this code.
"""

import functools
import glob
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType
from typing import Any

from finetune.compat import tokenizer_of
from finetune.data.preparation.settings import PIPELINE_VERSION, DataSettings
from finetune.files import write_atomically

KeyParts = dict[str, Any]

# Public attributes of a tokenizer that change no token (`chat_template` is a part of the key by itself).
_NO_SETTINGS = (
    "name_or_path", "vocab_file", "verbose", "padding_side", "truncation_side", "model_max_length", "chat_template",
    "response_template",
)  # fmt: skip


def tokenizer_digest(tokenizer: Any) -> str:
    """Returns a hash of what a tokenizer does: vocabulary, merges, normalisation, special tokens; not of its name."""
    parts = [type(tokenizer).__name__, json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)]
    if getattr(tokenizer, "is_fast", False):
        serialized = tokenizer.backend_tokenizer.to_str()
        # What stands before are the padding and truncation of the last call, which change from call to call.
        parts.append(serialized[serialized.find('"added_tokens"') :])
    else:
        parts.append(json.dumps(sorted(tokenizer.get_vocab().items())))
        parts.append(json.dumps(getattr(tokenizer, "init_kwargs", {}), sort_keys=True, default=str))
    # What the Python class around either of them is set to.
    plain = (str, int, float, type(None))
    state = {key: value for key, value in vars(tokenizer).items() if key[0] != "_" and isinstance(value, plain)}
    parts.append(json.dumps({key: value for key, value in state.items() if key not in _NO_SETTINGS}, sort_keys=True))
    return _hash("\n".join(parts))


def version() -> str:
    """Returns the versions of the code that turns text into tokens."""
    import tokenizers

    return f"{PIPELINE_VERSION}/{tokenizers.__version__}"


def key_parts(dataset: Any, processing_class: Any, settings: DataSettings, templates: Iterable[str]) -> KeyParts:
    """Returns what decides the prepared rows of a dataset, by name; `templates` are those that may render a row."""
    tokenizer = tokenizer_of(processing_class)
    return {
        "data": dataset._fingerprint,
        "tokenizer": tokenizer_digest(tokenizer),
        "template": _hash(json.dumps(list(templates))),
        "formatting_func": function_digest(settings.formatting_func),
        "settings": json.loads(json.dumps(settings.cache_key(), default=str)),
        "version": version(),
    }


def fingerprint(parts: KeyParts) -> str:
    """Returns the key as 32 hexadecimal digits, the form `datasets` wants for `new_fingerprint`."""
    return _hash(json.dumps(parts, sort_keys=True))[:32]


def cache_file(dataset: Any, key: str, cache_dir: str | None) -> tuple[str | None, str]:
    """Returns where the prepared rows are kept: in `cache_dir`, or beside the data's own files.

    None where they are kept nowhere, with the reason.
    """
    import datasets

    if not datasets.is_caching_enabled():
        return None, "caching is disabled"
    if cache_dir is None and dataset.cache_files:
        cache_dir = os.path.dirname(dataset.cache_files[0]["filename"])
    if cache_dir is None:
        return None, "the rows live in memory"
    try:
        os.makedirs(cache_dir, exist_ok=True)
    except OSError as error:
        return None, f"the folder `{cache_dir}` cannot be made: {error.strerror or error}"
    if not os.access(cache_dir, os.W_OK):
        return None, f"the folder `{cache_dir}` cannot be written to"
    return os.path.join(cache_dir, f"cache-{key}.arrow"), ""


def is_cached(path: str) -> bool:
    """Returns whether all rows are there: one file, or one for each of the processes that wrote them."""
    if os.path.exists(path):
        return True
    parts = glob.glob(glob.escape(path.removesuffix(".arrow")) + "_*_of_*.arrow")
    return any(len(parts) >= int(part.removesuffix(".arrow").rpartition("_of_")[2]) for part in parts)


def kept_nowhere(dataset: Any) -> str | None:
    """Returns a file for rows that are gone with this process; None if they are better kept in memory, as the data is.

    `datasets` writes beside the data's files if it is given none, which may be where nobody can write.
    """
    from datasets.fingerprint import generate_random_fingerprint, get_temporary_cache_files_directory

    if not dataset.cache_files:
        return None
    return os.path.join(get_temporary_cache_files_directory(), f"cache-{generate_random_fingerprint()}.arrow")


def shuffled(dataset: Any, seed: int) -> Any:
    """Returns the rows of a dataset or stream in random order, also where nothing can be written beside its files."""
    files = getattr(dataset, "cache_files", None)
    if files and not os.access(os.path.dirname(files[0]["filename"]), os.W_OK):
        return dataset.shuffle(seed=seed, keep_in_memory=True)
    return dataset.shuffle(seed=seed)


@contextmanager
def lock(path: str, say: Callable[[str], None]) -> Iterator[None]:
    """Lets one process at a time into the block, of those that prepare the rows of `path`; `say` is told of waiting."""
    from filelock import FileLock, Timeout

    lock = FileLock(path + ".lock")
    while True:
        try:
            lock.acquire(timeout=60)
            break
        except Timeout:
            say(f"another process is preparing the same rows; waiting for it ({path}.lock)")
    try:
        yield
    finally:
        lock.release()


def remember(path: str, parts: KeyParts) -> None:
    """Writes the parts of a key beside the rows, so that a later miss can be explained."""
    write_atomically(Path(path).with_suffix(".json"), json.dumps(parts, indent=1))


def explain_miss(path: str, parts: KeyParts) -> str:
    """Returns what changed since the same data were last prepared, for instance ``settings.max_length 512 -> 1024``."""
    newest: tuple[float, KeyParts] | None = None
    for other in Path(path).parent.glob("cache-*.json"):
        try:
            known = json.loads(other.read_text(encoding="utf-8"))
            changed = other.stat().st_mtime
        except (OSError, ValueError):
            continue
        if known.get("data") == parts["data"] and (newest is None or changed > newest[0]):
            newest = (changed, known)
    if newest is None:
        return "first preparation of these rows"
    changes = []
    for name, value in parts.items():
        old = newest[1].get(name)
        if name == "settings" and isinstance(old, dict):
            changes += [f"`{key}` {old.get(key)!r} -> {new!r}" for key, new in value.items() if old.get(key) != new]
        elif old != value:
            changes.append(f"the {name} changed")
    return "; ".join(changes) or "the cached rows are gone"


def function_digest(function: Any) -> str:
    """Returns a hash of what a function does: its code, what it closes over, and the file of its module.

    A function that can be imported is pickled by its name, so its file counts too. Functions that it takes from other
    modules count by their names. A random hash where the function cannot be pickled or has no source.
    """
    if function is None:
        return ""
    from datasets.fingerprint import Hasher

    try:
        parts = [Hasher.hash(function)]
        for part in _parts_of(function):
            if (module := getattr(part, "__module__", None)) != "__main__":
                parts.append(_hash(Path(str(sys.modules[str(module)].__file__)).read_text(encoding="utf-8")))
            if isinstance(code := getattr(part, "__code__", None), CodeType):
                parts.append(_code_digest(code))
    except Exception:  # what cannot be pickled or read cannot be compared either: never reuse its rows
        return os.urandom(8).hex()
    return _hash("\n".join(parts))


def _parts_of(function: Any) -> list[Any]:
    """Returns the functions and classes whose code runs when a function, `partial`, method or object is called."""
    if isinstance(function, functools.partial):
        return _parts_of(function.func)
    if (owner := getattr(function, "__self__", None)) is not None:
        return [function.__func__, owner if isinstance(owner, type) else type(owner)]
    return [function] if hasattr(function, "__code__") or isinstance(function, type) else [type(function)]


def _code_digest(code: CodeType) -> str:
    """Returns a hash of what was compiled: the file may have been changed since."""
    constants = [_code_digest(c) if isinstance(c, CodeType) else _constant(c) for c in code.co_consts]
    return _hash(f"{code.co_code!r}{code.co_names}{code.co_varnames}{constants}")


def _constant(value: Any) -> str:
    return repr(sorted(map(repr, value)) if isinstance(value, frozenset) else value)  # sets have no order of their own


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
