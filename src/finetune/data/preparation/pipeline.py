"""Raw rows -> `input_ids`, `labels` and `length`, in one batched map per split.

Map-style datasets and streams take the same path (`batches.BatchProcessor`); a stream is prepared while it is read.
Prepared rows are cached under a key of their own (`cache.py`). Processes that start together do not wait at a
barrier: one takes a file lock and works, the others find the rows in the cache when they get the lock.

Columns of the result: `input_ids` and `labels` (lists of int32, half the memory of int64; collators cast), `length`
(int32, so that grouping by length reads one column), and `keep_columns`. Everything else is dropped.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune import environment
from finetune.data.preparation import cache
from finetune.data.preparation.audit import SupervisionAudit, audit, audit_rows, count_rows
from finetune.data.preparation.batches import BatchProcessor
from finetune.data.preparation.formats import Kind
from finetune.data.preparation.mapped import (
    COUNT_COLUMNS,
    FLAGS,
    SOURCE_LENGTH,
    SUPERVISED,
    MapFunction,
    StreamFunction,
    flags_to_act_on,
    has_other_weights,
    kept_columns,
    output_features,
)
from finetune.data.preparation.pretokenized import holds_integers
from finetune.data.preparation.settings import DataSettings
from finetune.data.preparation.tokenize import NOTHING_TRAINED
from finetune.data.preparation.watchdog import map_with_workers
from finetune.data.rows import LENGTH
from finetune.data.sources import first_row, is_iterable_dataset, plain_rows
from finetune.errors import DataFormatError

Say = Callable[[str], None]

_STREAM_AUDIT_ROWS = 64


@dataclass(frozen=True)
class PreparedSplit:
    """A prepared dataset, what is known about it, and where it came from.

    `cache` is the line that was printed: a hit, a miss with its reason, or why nothing is cached.
    """

    dataset: Any
    audit: SupervisionAudit
    cache: str


def prepare_split(
    dataset: Any, processing_class: Any, settings: DataSettings, *, name: str = "train", say: Say | None = None
) -> PreparedSplit:
    """Returns the dataset prepared for training, with its audit.

    `dataset` is a `datasets.Dataset` or `IterableDataset`; what is already prepared comes back unchanged. Rows that
    would train nothing are left out and counted in the audit. The audit is not checked here (`audit.check`). `say`
    gets one line about format and cache; by default the main process prints it.

    Raises `DataFormatError` for an empty dataset, unknown columns, and bad rows, naming the row.
    """
    say = say or say_on_main_process
    streams = is_iterable_dataset(dataset)
    # Of a stream with a format (torch, numpy), rows hold arrays instead of lists.
    row = first_row(dataset.with_format(None) if streams else dataset, name)
    if streams:
        return _prepare_stream(dataset, processing_class, settings, row, name, say)
    dataset = plain_rows(dataset, name)
    row = first_row(dataset, name)
    columns = list(row)
    ready = _already_prepared(dataset, columns, settings, name)
    if ready is not None:
        return ready
    processor = BatchProcessor(processing_class, settings, row, name, weighted=has_other_weights(dataset))
    try:
        prepared, cached = _map(dataset.with_format(None), processor, processing_class, name, say)
    except UnicodeDecodeError as error:
        raise DataFormatError(_not_utf8(dataset, name, error)) from error
    say(f"{name}: {processor.format.describe(columns)}; cache {cached}")
    return PreparedSplit(*_finish(prepared, processor), cached)


def say_on_main_process(message: str) -> None:
    """Prints a line, in the process of rank 0 only."""
    if environment.rank() == 0:
        print(message, flush=True)


def _map(dataset: Any, processor: BatchProcessor, processing_class: Any, name: str, say: Say) -> tuple[Any, str]:
    settings = processor.settings
    renderer = processor.renderer
    templates = [] if renderer is None else [renderer.template, renderer.tool_template]
    parts = cache.key_parts(dataset, processing_class, settings, templates)
    key = cache.fingerprint(parts)
    path, nowhere = cache.cache_file(dataset, key, settings.cache_dir)
    keep = kept_columns(settings, dataset.column_names)
    options = {
        "with_indices": True,
        "batched": True,
        "batch_size": settings.batch_size,
        "remove_columns": dataset.column_names,
        "features": output_features(processor, {column: dataset.features[column] for column in keep}),
        "new_fingerprint": key,
        "desc": f"Preparing {name} rows",
    }

    file = path or cache.kept_nowhere(dataset)

    def run(function: Callable[..., Any], num_proc: int | None) -> Any:
        return dataset.map(function, num_proc=num_proc, cache_file_name=file, **options)

    function = MapFunction(processor, keep)
    workers = settings.num_proc if settings.num_proc and settings.num_proc > 1 else None
    if path is None:
        return _run(run, function, workers, settings, say), f"off ({nowhere})"
    if cache.is_cached(path):
        return run(function, workers), "HIT"
    with cache.lock(path, lambda message: say(f"{name}: {message}")):
        if cache.is_cached(path):
            return run(function, workers), "HIT (another process prepared the rows)"
        reason = cache.explain_miss(path, parts)
        prepared = _run(run, function, workers, settings, say)
        cache.remember(path, parts)
    return prepared, f"MISS ({reason})"


def _run(run: Callable[..., Any], function: Any, workers: int | None, settings: DataSettings, say: Say) -> Any:
    if workers is None:
        return run(function, None)
    return map_with_workers(run, function, workers, settings.stall_seconds, say)


def _finish(prepared: Any, processor: BatchProcessor) -> tuple[Any, SupervisionAudit]:
    """Returns the dataset without its dropped rows and counts, and the audit made of the counts."""

    def column(key: str) -> np.ndarray:
        return prepared.data.column(key).to_numpy()

    flags = flags_to_act_on(column(FLAGS), column(LENGTH), processor.settings)
    audit = audit_rows(
        flags,
        column(LENGTH),
        column(SOURCE_LENGTH),
        column(SUPERVISED),
        name=processor.name,
        format=processor.format.kind.value,
        mask_method=processor.mask_method,
    )
    kept = np.flatnonzero((flags & NOTHING_TRAINED) == 0)
    prepared = prepared.remove_columns(list(COUNT_COLUMNS))
    return (prepared if len(kept) == len(flags) else prepared.select(kept)), audit


def _already_prepared(dataset: Any, columns: Sequence[str], settings: DataSettings, name: str) -> PreparedSplit | None:
    """Returns the dataset as it is if it has labels and needs neither truncation nor dropping, or is packed.

    Of packed rows those that train nothing are left out.
    """
    if "seq_lengths" not in columns and not {"input_ids", "labels"} <= set(columns):
        return None
    if "labels" not in columns:
        raise DataFormatError(
            f"The {name} dataset is packed (`seq_lengths`) but has no `labels`. Pack rows that have them."
        )
    packed = "seq_lengths" in columns
    odd = [key for key in ("input_ids", "labels") if key in columns and not holds_integers(dataset, key)]
    if odd and packed:
        raise DataFormatError(
            f"The {name} dataset is packed (`seq_lengths`), but {' and '.join(map(repr, odd))} do not hold a list of "
            "integers in every row. Pack rows that have them."
        )
    if odd:
        return None  # the rows are read one by one, and the bad one is named
    if not packed and LENGTH not in columns:
        return None
    made = audit(dataset, name=name, format=(Kind.PACKED if packed else Kind.TOKENIZED).value)
    too_long = settings.truncate and settings.max_length is not None and made.longest > settings.max_length
    if not packed and (too_long or made.num_dropped):
        return None
    if 0 < made.num_dropped < made.num_rows:
        dataset = dataset.select(np.flatnonzero(count_rows(dataset)[1]))
    return PreparedSplit(dataset, made, "already prepared")


def _not_utf8(dataset: Any, name: str, error: UnicodeDecodeError) -> str:
    """Returns the message for text that Arrow holds and Python cannot decode, with the first row that has some."""
    row, found = 0, error
    try:
        for _ in dataset:
            row += 1
    except UnicodeDecodeError as again:
        found = again
    return f"Row {row} of the {name} dataset holds text that is not UTF-8: {found}. Repair or remove it."


def _prepare_stream(
    dataset: Any, processing_class: Any, settings: DataSettings, row: Mapping[str, Any], name: str, say: Say
) -> PreparedSplit:
    if "seq_lengths" in row:
        audit = audit_rows(*[np.zeros(0, np.int32)] * 4, name=name, format=Kind.PACKED.value, sampled=True)
        return PreparedSplit(dataset, audit, "already prepared")
    dataset = dataset.with_format(None)
    columns = list(row)
    processor = BatchProcessor(processing_class, settings, row, name)
    keep = kept_columns(settings, columns)
    known = dataset.features or {}
    features = None
    if all(column in known for column in keep):
        features = output_features(processor, {column: known[column] for column in keep}, stream=True)
    prepared = dataset.map(
        StreamFunction(processor, keep, dataset),
        with_indices=True,
        batched=True,
        batch_size=min(settings.batch_size, 256),
        remove_columns=columns,
        features=features,
    )
    try:
        sample = list(dataset.take(_STREAM_AUDIT_ROWS))
    except UnicodeDecodeError as error:
        raise DataFormatError(f"The {name} dataset holds text that is not UTF-8: {error}.") from error
    batch = {column: [example.get(column) for example in sample] for column in columns}
    labelled = processor.process(batch, range(len(sample)))
    audit = audit_rows(
        flags_to_act_on(labelled.tokens.flags, labelled.tokens.lengths, settings),
        labelled.tokens.lengths,
        labelled.source_lengths,
        labelled.supervised,
        name=name,
        format=processor.format.kind.value,
        mask_method=processor.mask_method,
        sampled=True,
    )
    line = f"off (a stream is prepared as it is read; audited are its first {len(sample)} rows)"
    say(f"{name}: {processor.format.describe(columns)}; cache {line}")
    return PreparedSplit(prepared, audit, line)
