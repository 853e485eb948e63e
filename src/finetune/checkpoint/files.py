"""Writing and reading single files: only tensors and plain values, on disk when said so, hashed, never unpickled."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.errors import CheckpointError, FinetuneError, first_line
from finetune.files import format_bytes

HASH = "sha256"  # With the processor's SHA instructions faster than blake2b: 1.9 against 1.3 GB/s measured.
_CHUNK = 4 << 20
_PLAIN = (bool, int, str, bytes, type(None))


def to_plain(value: Any, where: str) -> Any:
    """Returns `value` with containers rebuilt and NumPy scalars as Python numbers.

    Args:
        value: tensors, numbers, strings, None, dtypes and devices, in dictionaries, lists and tuples.
        where: the name of `value` in messages.

    Raises:
        CheckpointError: an object of any other class, named by its place.

    >>> to_plain({"step": np.int64(3), "betas": (0.9, 0.999)}, "optimizer")
    {'step': 3, 'betas': (0.9, 0.999)}
    """
    if isinstance(value, Tensor) or type(value) in _PLAIN:
        return value
    if isinstance(value, float):
        return float(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (torch.dtype, torch.device, torch.Size)):
        return value
    if isinstance(value, dict):
        pairs = {to_plain(k, f"{where} key"): to_plain(v, f"{where}.{k}") for k, v in value.items()}
        return type(value)(pairs) if type(value) in (OrderedDict, Counter) else pairs
    if isinstance(value, (list, tuple, set)):
        items = [to_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
        return items if isinstance(value, list) else set(items) if isinstance(value, set) else tuple(items)
    if isinstance(value, str):
        return str.__str__(value)  # string enumerations
    if isinstance(value, int):
        return int.__int__(value)
    raise CheckpointError(
        f"`{where}` is a `{type(value).__module__}.{type(value).__qualname__}`. A checkpoint holds tensors, numbers, "
        "strings, and dictionaries, lists and tuples of them; let its owner's `state_dict()` return only these."
    )


def save_plain(value: Any, path: str | os.PathLike[str]) -> None:
    """Writes `value` to `path` so that `torch.load(weights_only=True)` reads it.

    Raises:
        CheckpointError: `value` holds something else than tensors and plain values, or it cannot be written.
    """
    path = Path(path)
    plain = to_plain(value, path.name)
    try:
        torch.save(plain, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as any of many `RuntimeError`
        raise write_error(path, error) from error
    # Tensor subclasses pass `to_plain`; whether a safe load knows them only the file can tell.
    unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    if unknown:
        raise CheckpointError(
            f"`{path.name}` would need the classes {', '.join(sorted(unknown))} to be loaded, and a checkpoint is "
            "loaded without running code. Use an optimizer whose `state_dict()` holds plain tensors."
        )


def load_plain(path: str | os.PathLike[str], allow: Iterable[Any] = ()) -> Any:
    """Returns the content of a `torch.save` file, on the CPU. No code in the file is ever run.

    Args:
        allow: classes and functions beyond tensors and plain values that the file may name.

    Raises:
        CheckpointError: the file is missing, damaged, or names anything else.
    """
    path = Path(path)
    try:
        with torch.serialization.safe_globals(list(allow)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"`{path}` does not exist; pass another `resume_from_checkpoint`.") from None
    except Exception as error:
        raise CheckpointError(
            f"`{path}` cannot be loaded ({type(error).__name__}: {first_line(error)}). It is damaged, or holds more "
            "than tensors and plain values, which is refused because loading it could run code. Pass another "
            "`resume_from_checkpoint`."
        ) from error


def numpy_array_globals() -> list[Any]:
    """Returns what a safe load must know to read the NumPy array in transformers' files, and nothing else."""
    kinds = (np.ndarray, np.dtype, type(np.dtype(np.uint32)))
    return [*_numpy_function("_reconstruct"), *kinds]


def numpy_scalar_globals() -> list[Any]:
    """Returns the same for NumPy numbers: transformers' plateau schedule has them in its `scheduler.pt`."""
    kinds = {type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int64)}
    return [*_numpy_function("scalar"), np.dtype, *kinds]


def _numpy_function(name: str) -> list[Any]:
    # NumPy 2 moved it, and files have either name.
    core: Any = np._core if hasattr(np, "_core") else np.core  # pyright: ignore[reportAttributeAccessIssue]
    function = getattr(core.multiarray, name)
    return [(function, f"numpy.{package}.multiarray.{name}") for package in ("_core", "core")]


def save_tensors(state_dict: dict[str, Tensor], path: Path) -> None:
    """Writes a safetensors file, which holds each tensor once and no views of another.

    Other names of one tensor go into the metadata, `{left out name: name of the same tensor}`; different views of one
    memory are copied apart.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[Any, str] = {}
    memories: set[int] = set()
    for name, tensor in state_dict.items():
        tensor = tensor.detach()
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in first:
            aliases[name] = first[key]
            continue
        first[key] = name
        memory = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.contiguous().clone() if memory in memories else tensor.contiguous()
        memories.add(memory)
    save_file(tensors, path, metadata={"format": "pt", **aliases})


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Returns the tensors in a weights file, on the CPU.

    Raises:
        CheckpointError: the file is missing or damaged, or is a pickle of more than tensors.
    """
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            return load_file(path, device="cpu")
        except Exception as error:
            raise CheckpointError(
                f"`{path}` cannot be loaded ({error}); it is missing or damaged. Pass another `resume_from_checkpoint`."
            ) from error
    content = load_plain(path)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"`{path}` is not a file of weights: a dictionary of tensors was expected.")
    return content


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failed write in the block, whoever reports it, into a `CheckpointError` about `path`."""
    try:
        yield
    except Exception as error:
        if is_write_failure(error):
            raise write_error(path, error) from error
        raise


def is_write_failure(error: BaseException) -> bool:
    """Returns whether `error` says that the file system refused a write.

    torch reports a full disk as `RuntimeError`, safetensors as `SafetensorError`; only their texts tell. Networks fail
    with `OSError` too: as Python's own classes for that, without a file, or as a class of a library.
    """
    if isinstance(error, FinetuneError):
        return False
    if isinstance(error, OSError):
        network = isinstance(error, (ConnectionError, TimeoutError)) and error.filename is None
        return type(error).__module__ in ("builtins", "shutil") and not network
    text = str(error)
    marks = ("StreamWriter", "inline_container", "Parent directory", "write failed", "iostream error", "os error")
    return (isinstance(error, RuntimeError) and any(mark in text for mark in marks)) or (
        type(error).__name__ == "SafetensorError" and "error" in text.lower()
    )


def write_error(path: Path, error: BaseException) -> CheckpointError:
    """Returns the error to raise when `path` could not be written, with the free space of its disk."""
    reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else first_line(error)
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(nearest_existing(path)).free
        # What torch says about a full disk ("unexpected pos 576 vs 534") helps nobody.
        full = not isinstance(error, OSError) and free < _CHUNK
        reason = f"{os.strerror(errno.ENOSPC) if full else reason}; {format_bytes(free)} are free there"
    return CheckpointError(
        f"The checkpoint could not be written to `{path}`: {reason}. Checkpoints saved before are untouched. Free "
        "space or fix the permissions, or choose another `output_dir`; a smaller `save_total_limit` keeps fewer."
    )


def nearest_existing(path: Path) -> Path:
    """Returns `path`, or its closest ancestor that exists."""
    for candidate in (path, *path.parents):
        if candidate.exists():
            return candidate
    return Path.cwd()


def digest(path: Path) -> str:
    """Returns the hash of a file's content, in hexadecimal. Releases the interpreter while it hashes."""
    hasher = hashlib.new(HASH)
    buffer = memoryview(bytearray(_CHUNK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            hasher.update(buffer[:count])
    return hasher.hexdigest()


def map_files(function: Callable[[Path], Any], paths: list[Path]) -> list[Any]:
    """Returns `[function(path), ...]`, a few at a time; hashing and flushing leave the interpreter free."""
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, paths))


def structural_problem(path: Path, read_all: bool = False) -> str | None:
    """Returns what is wrong with the form of a weights, state or JSON file; None when nothing is.

    Finds truncated and emptied files from their ends. With `read_all` also compares the checksums that torch
    writes into its files; safetensors has none.
    """
    size = path.stat().st_size
    kinds = (".safetensors", ".pt", ".pth", ".bin", ".json")
    if path.suffix not in kinds:
        return None
    if size == 0:
        return "is empty"
    try:
        if path.suffix == ".safetensors":
            return _safetensors_problem(path, size)
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
            return None
        with open(path, "rb") as file:
            if file.read(2) != b"PK":
                return None  # torch's format before 1.6; loading it will tell
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip() if read_all else None
            return f"is damaged (checksum of `{damaged}`)" if damaged else None
    except (ValueError, zipfile.BadZipFile, NotImplementedError, EOFError, KeyError) as error:
        return f"is truncated or damaged ({type(error).__name__})"


def _safetensors_problem(path: Path, size: int) -> str | None:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            return "is truncated or damaged (header)"
        header = json.loads(file.read(length))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    expected = 8 + length + max(ends, default=0)
    return None if expected == size else f"has {size} bytes and its header says {expected}"


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Returns whether two tensors have one dtype and shape and the same bits; NaN equals NaN."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    pair = [t.detach().cpu().contiguous().flatten().view(torch.uint8) for t in (left, right)]
    return torch.equal(pair[0], pair[1])
