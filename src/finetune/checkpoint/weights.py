"""Model weights: written as transformers writes them, loaded, and compared with the file after loading."""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from finetune.checkpoint import backends, files, gathered, layout
from finetune.checkpoint.writer import CheckpointWriter, agreeing
from finetune.errors import CheckpointError
from finetune.models.adapters import unwrap
from finetune.models.traits import saves_itself
from finetune.wrappers import is_peft_model

Save = Callable[..., None]  # the facade's `_save(output_dir, state_dict=None)`


def save_model(
    save: Save,
    output_dir: str | os.PathLike[str],
    *,
    accelerator: Any,
    model: nn.Module,
    model_wrapped: Any,
    for_checkpoint: bool,
) -> None:
    """Gathers a sharded model if there is one, and calls `save`. Called on all processes.

    `for_checkpoint`: shards that the optimizer's files will hold are not gathered. A user who calls `save_model` gets
    whole weights also then.

    Raises:
        CheckpointError: a write failed, of a sharded model also when it was on another process: all of them are in
            collectives together, before and after.
    """
    found = gathered.gather_weights(accelerator, model, model_wrapped, for_checkpoint=for_checkpoint)
    if found.skip:
        return
    if found.engine_format:
        with agreeing():
            save(str(output_dir), state_dict={})
            if accelerator.is_main_process:
                for name in (layout.WEIGHTS, layout.PICKLED_WEIGHTS, layout.ADAPTER_WEIGHTS):
                    (Path(output_dir) / name).unlink(missing_ok=True)
        backends.save_engine_weights(output_dir, model, model_wrapped)
        return
    given = {} if found.state_dict is None else {"state_dict": found.state_dict}
    with agreeing() if backends.is_sharded(accelerator) else contextlib.nullcontext():
        save(str(output_dir), **given)


def write_model(
    output_dir: str | os.PathLike[str],
    state_dict: dict[str, Tensor] | None,
    *,
    model: nn.Module,
    args: Any,
    processing_class: Any = None,
    data_collator: Any = None,
    writer: CheckpointWriter | None = None,
    joins_gather: bool = False,
) -> None:
    """Writes weights, configuration, tokenizer and arguments into `output_dir`. The default of `Trainer._save`.

    Args:
        state_dict: the weights when they had to be gathered; None asks the model.
        writer: of a checkpoint being saved, which may write in the background; None writes now.
        joins_gather: the model was sharded when it was loaded, so processes that write nothing help to gather.
    """
    if not (args.should_save or joins_gather):
        return
    folder = Path(output_dir)
    with files.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        target: Any = unwrap(model, keep_adapters=True)
        in_background = writer is not None and writer.collects and not (is_peft_model(target) or joins_gather)
        if state_dict is not None or in_background or not saves_itself(target):
            was_gathered = state_dict is not None
            state_dict = gathered.without_wrapper_prefixes(target.state_dict() if state_dict is None else state_dict)
            if was_gathered:
                state_dict = gathered.without_tied_copies(state_dict, target)
        if in_background:
            assert writer is not None
            state_dict = writer.snapshot(state_dict)
            writer.run(lambda: _write_weights(target, folder, state_dict, args.should_save))
        else:
            _write_weights(target, folder, state_dict, args.should_save)
        if not args.should_save:
            return
        tokenizer = processing_class if processing_class is not None else getattr(data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
    files.save_plain(plain_arguments(args), folder / layout.TRAINING_ARGS)


def _write_weights(target: Any, folder: Path, state_dict: dict[str, Tensor] | None, is_writer: bool) -> None:
    with files.writing(folder):
        if saves_itself(target):
            # Before saving, which takes the tensors out of it.
            formats = {tensor.dtype for tensor in (state_dict or {}).values() if tensor.is_floating_point()}
            with _without_progress_bar(), gathered.naming_as_unsharded(target):
                target.save_pretrained(str(folder), state_dict=state_dict, is_main_process=is_writer)
            if is_writer and formats:
                _state_number_format(folder / "config.json", formats)
                _require_tensors(layout.adapter_file(folder))
        elif is_writer:
            assert state_dict is not None
            files.save_tensors(state_dict, folder / layout.WEIGHTS)


def _state_number_format(config: Path, formats: set[Any]) -> None:
    """Makes `config.json` name the format of the weights that were saved, not that of a model which was cast."""
    if len(formats) != 1 or not config.is_file():
        return
    name = str(formats.pop()).removeprefix("torch.")
    content = json.loads(config.read_text(encoding="utf-8"))
    if content.get("dtype", name) != name:
        content["dtype"] = name
        config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _require_tensors(adapter: Path | None) -> None:
    """Raises `CheckpointError` when PEFT found none of the adapter's tensors among those that were gathered."""
    if adapter is not None and not files.load_tensors(adapter):
        raise CheckpointError(
            f"`{adapter}` was written without a tensor: PEFT found none of the adapter's in the weights gathered from "
            "all processes. Use another way to share the model out (`accelerate_configs/fsdp2.yaml` or `zero2.yaml`)."
        )


@contextlib.contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Keeps transformers from drawing a bar of written shards into that of the training."""
    from transformers.utils import logging as library

    shown = library.is_progress_bar_enabled()
    if shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            library.enable_progress_bar()


def plain_arguments(args: Any) -> dict[str, Any]:
    """Returns the fields of `args` as JSON-like values: what `training_args.bin` holds, without tokens."""
    content = args.to_dict() if hasattr(args, "to_dict") else dict(vars(args))
    return json.loads(json.dumps(content, default=str))


# ---- Loading ----


def load_weights(checkpoint: str | os.PathLike[str], model: nn.Module) -> None:
    """Loads the weights in `checkpoint` into `model` and compares what the model then holds with the files.

    Full weights in one file or in shards, safetensors or `torch.save`, and PEFT adapters.

    Raises:
        CheckpointError: nothing to load; names or shapes of another model; or a tensor that did not arrive, such as
            an adapter that the model does not have.
    """
    folder = Path(checkpoint)
    try:
        found = layout.find_weights(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"`{folder}` cannot be read ({error}); pass another checkpoint.") from error
    target: Any = unwrap(model, keep_adapters=True)
    if found.adapters and is_peft_model(target):
        _load_adapters(target, found.adapters, folder)
    elif found.full:
        _load_full(target, found.full, folder)
    elif found.adapters:
        raise CheckpointError(
            f"`{folder}` holds a PEFT adapter and the model has none. Pass the `peft_config` the run was started with."
        )
    elif found.sharded:
        raise CheckpointError(
            f"`{folder}` was written by FSDP or DeepSpeed in shards. Resume with the same distributed setup; "
            "`accelerate merge-weights` or `zero_to_fp32.py` makes whole weights of it."
        )
    else:
        raise CheckpointError(f"`{folder}` holds no weights. Pass another `resume_from_checkpoint`.")


def _load_full(model: Any, paths: Iterable[Path], folder: Path) -> None:
    expected: dict[str, Tensor] = model.state_dict()
    seen: set[str] = set()
    unexpected: list[str] = []
    for path in paths:
        tensors = files.load_tensors(path)
        if not seen and not set(tensors) & set(expected):
            _load_converted(model, folder)
            return
        unexpected += [name for name in tensors if name not in expected]
        with backends.restoring(path):
            model.load_state_dict({n: t for n, t in tensors.items() if n in expected}, strict=False)
        _compare(model.state_dict(), tensors, path)
        seen |= set(tensors)
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    unexpected = [name for name in unexpected if not any(re.search(pattern, name) for pattern in ignored)]
    missing = _missing(model, expected, seen)
    if missing and unexpected:
        _load_converted(model, folder)
    elif missing or unexpected:
        raise CheckpointError(
            f"The weights in `{folder}` are of another model: {_name_some(missing, 'missing')}"
            f"{_name_some(unexpected, 'not in this model')}. Resume with the model the run was started with."
        )


def _missing(model: Any, expected: dict[str, Tensor], seen: set[str]) -> list[str]:
    """Returns the names no file had, without those that share their memory with one that was there."""
    arrived = {expected[name].data_ptr() for name in seen if name in expected}
    optional = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    absent = [n for n, t in expected.items() if n not in seen and n not in optional and t.numel()]
    lost = [name for name in absent if expected[name].data_ptr() not in arrived]
    if len(lost) < len(absent) or optional:
        tie = getattr(model, "tie_weights", None)
        if callable(tie):
            tie()
    return lost


def _load_converted(model: Any, folder: Path) -> None:
    """Loads weights whose names on disk are not the model's: transformers renames and splits some when it saves."""
    if not hasattr(type(model), "from_pretrained") or not (folder / "config.json").is_file():
        raise CheckpointError(
            f"The weights in `{folder}` have other names than this `{type(model).__name__}`. Resume with the model the "
            "run was started with."
        )
    with backends.restoring(folder):
        loaded, info = type(model).from_pretrained(
            str(folder), config=model.config, dtype=model.dtype, output_loading_info=True
        )
        problems = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
        if problems:
            raise CheckpointError(f"The weights in `{folder}` are of another model: {problems}.")
        tensors = loaded.state_dict()
        model.load_state_dict(tensors)
    _compare(model.state_dict(), tensors, folder)


def _load_adapters(model: Any, adapters: dict[str, Path], folder: Path) -> None:
    active = [model.active_adapter] if isinstance(model.active_adapter, str) else list(model.active_adapter)
    if len(adapters) == 1 and len(active) == 1:
        adapters = dict.fromkeys(active, next(iter(adapters.values())))  # saved under another name
    lost = [name for name in active if name not in adapters]
    if lost:
        raise CheckpointError(f"`{folder}` has no weights of the active adapter `{lost[0]}`, only of {list(adapters)}.")
    for name, place in adapters.items():
        with backends.restoring(place):
            if name not in model.peft_config:
                model.load_adapter(str(place), name, is_trainable=False)
            else:
                _load_adapter(model, name, place)


def _load_adapter(model: Any, name: str, place: Path) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    path = layout.adapter_file(place)
    assert path is not None
    tensors = files.load_tensors(path)
    result: Any = set_peft_model_state_dict(model, dict(tensors), adapter_name=name)
    live = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    missing = sorted(set(live) - set(tensors))
    unexpected = sorted(result.unexpected_keys)
    if missing or unexpected:
        raise CheckpointError(
            f"The adapter in `{place}` did not load into the model: {_name_some(missing, 'missing')}"
            f"{_name_some(unexpected, 'not in this model')}. Resume with the `peft_config` the run was started with."
        )
    _compare(live, tensors, path)


def _compare(live: dict[str, Tensor], tensors: dict[str, Tensor], path: Path) -> None:
    for name, tensor in tensors.items():
        here = live.get(name)
        if here is not None and not files.same_bits(here, tensor.to(here.dtype)):
            raise CheckpointError(
                f"`{name}` in the model differs from `{path}` after loading. Something else writes to the model, or a "
                "memory is failing; do not continue from it."
            )


def _name_some(names: list[str], what: str) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(f'`{name}`' for name in names[:3])}{more} {what}; "
