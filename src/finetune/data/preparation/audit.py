"""What the model will be trained on, counted before the first step: most wrong fine-tunes look healthy.

The counts come from per-row numbers that the preparation stores with the rows, so a cached dataset is audited at
once. Limits turn a run that would learn nothing, or never learn to stop, into an error with its remedy, or a warning.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from finetune.data.preparation.formats import Kind
from finetune.data.preparation.labels import count_supervised_in
from finetune.data.preparation.tokenize import (
    BOUNDARY_MISMATCH,
    DOUBLED_BOS,
    NOTHING_BEFORE_TRUNCATION,
    NOTHING_TRAINED,
    STOP_EXPECTED,
    STOP_TRAINED,
    TEMPLATE_DRIFT,
    TRUNCATED,
)
from finetune.errors import DataFormatError


@dataclass(frozen=True)
class AuditLimits:
    """When a dataset is refused. Shares are between 0 and 1; None switches a limit off."""

    max_lost_share: float | None = 0.95
    """Share of all tokens that truncation may cut off."""

    require_stop: bool = True
    """Refuse rows of which none trains the token that ends an answer."""


@dataclass(frozen=True)
class SupervisionAudit:
    """Counts over the rows of one split; `num_tokens` and `num_supervised` are those that stay after truncation.

    `num_dropped` rows had no supervised token and are left out; `num_dropped_by_truncation` of them had some before.
    `num_stop_expected` rows end with an answer, and of these `num_stop_trained` train the token that ends it.
    `sampled` says that the counts are of the first rows of a stream only. Packing made `num_packed` rows of those that
    stayed, and left out `num_packed_dropped` of them, in which nothing is trained.
    """

    name: str
    format: str
    mask_method: str
    num_rows: int
    num_tokens: int
    num_source_tokens: int
    num_supervised: int
    num_dropped: int
    num_dropped_by_truncation: int
    num_truncated: int
    num_stop_expected: int
    num_stop_trained: int
    num_doubled_bos: int
    num_boundary_mismatches: int
    num_template_drift: int
    longest: int
    first_dropped_rows: tuple[int, ...] = ()
    packing_efficiency: float | None = None
    num_packed: int = 0
    num_packed_dropped: int = 0
    sampled: bool = False

    @property
    def supervised_share(self) -> float:
        """Supervised tokens per token that stays."""
        return self.num_supervised / self.num_tokens if self.num_tokens else 0.0

    @property
    def lost_share(self) -> float:
        """Tokens cut off by truncation per token that was there."""
        return (self.num_source_tokens - self.num_tokens) / self.num_source_tokens if self.num_source_tokens else 0.0

    @property
    def stop_share(self) -> float | None:
        """Rows that train their stop token per row that should; None when no row should."""
        return self.num_stop_trained / self.num_stop_expected if self.num_stop_expected else None

    def with_packing(self, efficiency: float, num_packed: int = 0, num_dropped: int = 0) -> "SupervisionAudit":
        """Returns the audit with the share of packed slots that hold a token, and the counts of packed rows."""
        return replace(self, packing_efficiency=efficiency, num_packed=num_packed, num_packed_dropped=num_dropped)

    def to_dict(self) -> dict[str, Any]:
        """Returns all counts and shares as plain values, for the run folder."""
        shares = {
            "supervised_share": self.supervised_share,
            "lost_share": self.lost_share,
            "stop_share": self.stop_share,
        }
        return {**asdict(self), "first_dropped_rows": list(self.first_dropped_rows), **shares}

    def check(
        self,
        limits: AuditLimits | None = None,
        *,
        max_length: int | None = None,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        """Raises `DataFormatError` naming every limit that is broken, with what to change.

        With `warn`, it is called with each broken limit instead. A dataset that trains nothing is always refused.
        """
        problems = self._nothing_to_learn(max_length)
        broken = [] if problems else self._broken_limits(limits or AuditLimits(), max_length)
        if warn is not None:
            for problem in broken:
                warn(f"{self.name}: {problem}")
        elif broken:
            problems += [*broken, "To train on it anyway, set `data_audit='warn'`."]
        if problems:
            raise DataFormatError(f"The {self.name} dataset cannot be trained on. " + " ".join(problems))

    def _broken_limits(self, limits: AuditLimits, max_length: int | None) -> list[str]:
        broken = []
        if limits.require_stop and self._never_trains_stop():
            broken.append(self._never_stops(max_length))
        if limits.max_lost_share is not None and self.lost_share > limits.max_lost_share:
            broken.append(
                f"`max_length={max_length}` cuts off {self.lost_share:.1%} of all tokens (allowed: "
                f"{limits.max_lost_share:.1%}). Raise `max_length`, or keep every token with `packing=True` and "
                "`packing_strategy='bfd_split'`."
            )
        return broken

    def _nothing_to_learn(self, max_length: int | None) -> list[str]:
        if self.num_rows == 0 and not self.sampled:
            return ["It has no rows."]
        if self.num_supervised or self.num_rows == 0:  # of a packed stream nothing is counted
            return []
        if self.format == Kind.TEXT.value and self.longest <= 1:  # at most the token that ends a text
            return ["All texts are empty."]
        if self.num_dropped_by_truncation:
            return [
                f"None of its {self.num_rows} rows has a trained token left: `max_length={max_length}` cuts off "
                f"every answer (the longest row has {self.longest} tokens). Raise `max_length`, set it to None, or set "
                "`truncation_mode='keep_end'`."
            ]
        return [
            f"None of its {self.num_rows} rows has a trained token (mask: {self.mask_method}). Check "
            "`completion_only_loss`, `assistant_only_loss` and the labels or masks in the data."
        ]

    def _never_trains_stop(self) -> bool:
        if self.format == Kind.TEXT.value and self.num_truncated == self.num_rows:
            return False  # long documents, of which the beginnings are trained: a warning will do
        return self.num_stop_expected > 0 and self.num_stop_trained == 0

    def _never_stops(self, max_length: int | None) -> str:
        if self.num_truncated == self.num_rows:
            return (
                f"Every row is cut at `max_length={max_length}`, so the token that ends an answer is never trained and "
                "the model will not learn to stop. Raise `max_length`, or set `truncation_mode='keep_end'`."
            )
        return (
            "The token that ends an answer is trained in none of its rows, so the model will not learn to stop. If the "
            "chat template has `{% generation %}` blocks, move the end-of-turn token into them; else set `eos_token` "
            "to the token the template ends a turn with, or have the template write `{{ eos_token }}` there."
        )

    def warnings(self) -> list[str]:
        """Returns one line for each count that is not an error but deserves a look."""
        lines = []
        if self.sampled and self.num_rows:
            lines.append(
                f"a stream: only its first {self.num_rows} rows are counted; the others are prepared and checked when "
                "they are read."
            )
        elif self.sampled:
            lines.append("a packed stream: nothing was counted.")
        if self.num_dropped:
            rows = ", ".join(map(str, self.first_dropped_rows))
            lines.append(
                f"{self.num_dropped} rows without a trained token were left out, {self.num_dropped_by_truncation} "
                f"of them because of `max_length` (first: {rows})."
            )
        if self.num_packed_dropped:
            lines.append(
                f"{self.num_packed_dropped} of {self.num_packed} packed rows hold no supervised token, such as a part "
                "of a long prompt, and were left out. A larger `max_length` keeps more of a prompt beside its answer."
            )
        if self.num_truncated:
            lost = self.num_source_tokens - self.num_tokens
            lines.append(
                f"{self.num_truncated} rows were cut at `max_length`; {lost} tokens ({self.lost_share:.1%}) lost."
            )
        if self.stop_share is not None and self.stop_share < 0.99:
            missing = self.num_stop_expected - self.num_stop_trained
            lines.append(f"{missing} rows do not train the token that ends their answer.")
        if self.num_doubled_bos:
            lines.append(f"{self.num_doubled_bos} rows began with two BOS tokens.")
        if self.num_template_drift:
            lines.append(
                f"In {self.num_template_drift} rows the chat template writes the prompt differently alone than before "
                "its completion."
            )
        elif self.num_boundary_mismatches:
            lines.append(
                f"In {self.num_boundary_mismatches} rows prompt and completion meet inside a token: the model sees "
                "other prompt tokens in training than at inference. End prompts on a word, and begin completions with "
                "the space."
            )
        return lines


def audit_rows(
    flags: np.ndarray,
    lengths: np.ndarray,
    source_lengths: np.ndarray,
    supervised: np.ndarray,
    *,
    name: str = "train",
    format: str = "tokenized",
    mask_method: str = "given",
    sampled: bool = False,
) -> SupervisionAudit:
    """Returns the audit of rows from their flags, lengths after and before truncation, and supervised counts, (B,)."""

    def count(bit: int) -> int:
        return int(np.count_nonzero(flags & bit))

    dropped = (flags & NOTHING_TRAINED) != 0
    before = dropped & ((flags & NOTHING_BEFORE_TRUNCATION) != 0)
    expected = ((flags & STOP_EXPECTED) != 0) & ~before
    return SupervisionAudit(
        name=name,
        format=format,
        mask_method=mask_method,
        num_rows=len(flags),
        num_tokens=int(lengths.sum(dtype=np.int64)),
        num_source_tokens=int(source_lengths.sum(dtype=np.int64)),
        num_supervised=int(supervised.sum(dtype=np.int64)),
        num_dropped=int(dropped.sum()),
        num_dropped_by_truncation=int((dropped & ~before).sum()),
        num_truncated=count(TRUNCATED),
        num_stop_expected=int(expected.sum()),
        num_stop_trained=int((expected & ((flags & STOP_TRAINED) != 0)).sum()),
        num_doubled_bos=count(DOUBLED_BOS),
        num_boundary_mismatches=count(BOUNDARY_MISMATCH),
        num_template_drift=count(TEMPLATE_DRIFT),
        longest=int(source_lengths.max()) if len(source_lengths) else 0,
        first_dropped_rows=tuple(np.flatnonzero(dropped)[:5].tolist()),
        sampled=sampled,
    )


def audit(dataset: Any, *, name: str = "train", format: str = Kind.TOKENIZED.value) -> SupervisionAudit:
    """Returns the audit of a map-style dataset with `input_ids` and `labels`, without knowledge of its source.

    What preparation alone knows (truncation, stop tokens, borders) is counted as 0. Rows are read in Arrow batches.
    """
    lengths, supervised = count_rows(dataset)
    flags = np.where(supervised == 0, NOTHING_TRAINED | NOTHING_BEFORE_TRUNCATION, 0).astype(np.uint8)
    return audit_rows(flags, lengths, lengths, supervised, name=name, format=format)


def count_rows(dataset: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns (tokens, supervised tokens) per row, each (B,), of a map-style dataset with `labels`, packed or not."""
    lengths, supervised = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
    names = [name for name in ("labels", "seq_lengths") if name in dataset.column_names]
    for table in dataset.with_format("arrow", columns=names).iter(batch_size=1000):
        lengths.append(table["labels"].combine_chunks().value_lengths().to_numpy(zero_copy_only=False))
        supervised.append(count_supervised_in(table))
    return np.concatenate(lengths), np.concatenate(supervised)
