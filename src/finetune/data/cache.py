"""The key under which prepared rows are cached, the lock of who prepares them, and the reason why a cache missed.

`datasets` keys its cache by hashing the mapped function with all it holds; a changed attribute of a tokenizer then
costs hours, and a changed template may go unnoticed. Here the key is made of what decides the result: the data's
fingerprint, the tokenizer's content, the template, the settings and the version of this code.
"""

import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.compat import tokenizer_of
from finetune.data.settings import PIPELINE_VERSION, DataSettings
from finetune.files import write_atomically

KeyParts = dict[str, Any]


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
    return _hash("\n".join(parts))


def key_parts(dataset: Any, processing_class: Any, settings: DataSettings, template: str | None) -> KeyParts:
    """Returns what decides the prepared rows of a data set, by name."""
    import tokenizers

    tokenizer = tokenizer_of(processing_class)
    return {
        "data": dataset._fingerprint,
        "tokenizer": tokenizer_digest(tokenizer),
        "template": _hash(template or ""),
        "formatting_func": _function_digest(settings.formatting_func),
        "settings": json.loads(json.dumps(settings.cache_key(), default=str)),
        "version": f"{PIPELINE_VERSION}/{tokenizers.__version__}",
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


def _function_digest(function: Any) -> str:
    if function is None:
        return ""
    from datasets.fingerprint import Hasher

    try:
        return Hasher.hash(function)
    except Exception:  # what cannot be pickled cannot be compared either: never reuse its rows
        return os.urandom(8).hex()


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
