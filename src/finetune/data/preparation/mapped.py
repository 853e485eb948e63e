"""The functions that `Dataset.map` calls, and the columns they make."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.data.preparation.batches import BatchProcessor
from finetune.data.preparation.labels import LabelledBatch
from finetune.data.preparation.settings import DataSettings
from finetune.data.preparation.tokenize import NOTHING_TRAINED
from finetune.data.rows import LENGTH, WEIGHTS

if TYPE_CHECKING:
    import pyarrow as pa

SOURCE_LENGTH, SUPERVISED, FLAGS = "_source_length", "_supervised", "_flags"
COUNT_COLUMNS = (SOURCE_LENGTH, SUPERVISED, FLAGS)
"""Per-row numbers that are stored with the prepared rows for the audit, and taken off before training."""
_CHAT_COLUMNS = ("messages", "conversations", "prompt", "completion")


class MapFunction:
    """The mapped function: a batch of raw columns to an Arrow table with tokens and per-row counts; picklable."""

    def __init__(self, processor: BatchProcessor, keep: Sequence[str]) -> None:
        self.processor = processor
        self.keep = list(keep)

    def __call__(self, batch: Mapping[str, Any], indices: Sequence[int]) -> "pa.Table | dict[str, Any]":
        labelled = self.processor.process(batch, indices)
        arrays = _arrays(labelled)
        if not self.keep:
            import pyarrow as pa

            return pa.table(arrays)
        return {**{key: list(batch[key]) for key in self.keep}, **{key: v.to_pylist() for key, v in arrays.items()}}


class StreamFunction:
    """The same for streams: plain lists, without the rows that train nothing and without the counts.

    `source` is the stream of raw rows, which is read again when a row cannot even be handed to this function.
    """

    def __init__(self, processor: BatchProcessor, keep: Sequence[str], source: Any = None) -> None:
        self.processor = processor
        self.keep = list(keep)
        self.source = source
        self.num_read = 0

    def __deepcopy__(self, memo: Any) -> "StreamFunction":
        return self  # `datasets` copies a stream before it reads it, and the source may be a table in memory

    def __call__(self, batch: Mapping[str, Any], indices: Sequence[int]) -> dict[str, Any]:
        labelled = self.processor.process(batch, indices)
        self.num_read = indices[-1] + 1
        flags = flags_to_act_on(labelled.tokens.flags, labelled.tokens.lengths, self.processor.settings)
        trained = np.flatnonzero((flags & NOTHING_TRAINED) == 0).tolist()
        columns: dict[str, list[Any]] = {key: list(batch[key]) for key in self.keep}
        for key, values in _arrays(labelled).items():
            if key not in COUNT_COLUMNS:
                columns[key] = values.to_pylist()
        return {key: [values[i] for i in trained] for key, values in columns.items()}


def flags_to_act_on(flags: np.ndarray, lengths: np.ndarray, settings: DataSettings) -> np.ndarray:
    """Returns the flags (B,) of rows, NOTHING_TRAINED only where the row is to be left out (`keep_untrained`)."""
    if not settings.keep_untrained:
        return flags
    return np.where(lengths > 0, flags & ~np.uint8(NOTHING_TRAINED), flags)


def _arrays(labelled: LabelledBatch) -> dict[str, Any]:
    import pyarrow as pa

    tokens = labelled.tokens
    offsets = pa.array(tokens.offsets.astype(np.int32))

    def lists(values: np.ndarray) -> Any:
        return pa.ListArray.from_arrays(offsets, pa.array(values))

    assert tokens.labels is not None
    arrays = {"input_ids": lists(tokens.ids), "labels": lists(tokens.labels)}
    arrays[LENGTH] = pa.array(tokens.lengths.astype(np.int32))
    if tokens.weights is not None:
        arrays[WEIGHTS] = lists(tokens.weights)
    arrays[SOURCE_LENGTH] = pa.array(labelled.source_lengths)
    arrays[SUPERVISED] = pa.array(labelled.supervised)
    arrays[FLAGS] = pa.array(tokens.flags)
    return arrays


def output_features(processor: BatchProcessor, kept: Mapping[str, Any], *, stream: bool = False) -> Any:
    """Returns the `datasets.Features` of the columns made, after those of the columns kept."""
    from datasets import Features, Sequence, Value

    types: dict[str, Any] = dict(kept)
    types |= {"input_ids": Sequence(Value("int32")), "labels": Sequence(Value("int32")), LENGTH: Value("int32")}
    if processor.weighted:
        types[WEIGHTS] = Sequence(Value("float32"))
    if not stream:
        types |= {SOURCE_LENGTH: Value("int32"), SUPERVISED: Value("int32"), FLAGS: Value("uint8")}
    return Features(types)


def kept_columns(settings: DataSettings, columns: Iterable[str]) -> list[str]:
    """Returns which of the raw columns are passed on."""
    made = ("input_ids", "labels", LENGTH, "completion_mask", "assistant_masks", WEIGHTS, *COUNT_COLUMNS)
    return [c for c in columns if c not in made and (settings.keep_columns == "all" or c in settings.keep_columns)]


def has_other_weights(dataset: Any) -> bool | None:
    """Returns whether any message of a `datasets.Dataset` has a `weight` other than 0, 1 and None.

    Read from Arrow, without making rows. None when it cannot tell: no column is a list of messages (JSON text is not).
    """
    import pyarrow as pa

    answer: bool | None = None
    for name in (column for column in dataset.column_names if column in _CHAT_COLUMNS):
        kind = dataset.data.schema.field(name).type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_struct(kind.value_type):
            continue
        answer = bool(answer)
        if kind.value_type.get_field_index("weight") >= 0:
            answer = answer or any(
                _other_weights(chunk.flatten().field("weight")) for chunk in dataset.data.column(name).chunks
            )
    return answer


def _other_weights(weights: Any) -> bool:
    import pyarrow as pa

    if not (pa.types.is_integer(weights.type) or pa.types.is_floating(weights.type)):
        return False  # none at all, or no numbers, which reading the rows will say
    known = set(weights.unique().to_pylist())  # a dataset has a handful of different weights
    return bool(known - {0, 1, None})
