"""What packing did to a dataset: how full its rows are, and which tokens were lost."""

from dataclasses import dataclass
from typing import Any

from finetune.data.columns import list_lengths
from finetune.data.rows import LENGTH


@dataclass(frozen=True)
class PackingReport:
    """What packing did to one dataset; tokens are counted in the first list column."""

    num_rows_before: int
    num_rows_after: int
    num_tokens_before: int
    num_tokens_after: int
    num_truncated_rows: int
    seq_length: int

    @property
    def lost_tokens(self) -> int:
        """Tokens that no packed row holds: 0 for `bfd_split` and `wrapped`."""
        return self.num_tokens_before - self.num_tokens_after

    @property
    def efficiency(self) -> float:
        """Share of the `num_rows_after * seq_length` slots that hold a token, between 0 and 1."""
        slots = self.num_rows_after * self.seq_length
        return self.num_tokens_after / slots if slots else 0.0

    def __str__(self) -> str:
        lost = f"{self.lost_tokens} tokens of {self.num_truncated_rows} longer rows lost"
        return (
            f"packed {self.num_rows_before} rows into {self.num_rows_after} of up to {self.seq_length} tokens "
            f"({self.efficiency:.1%} full, {lost})"
        )


def packing_report(before: Any, after: Any, seq_length: int) -> PackingReport:
    """Returns the counts of a `Dataset` before and after packing; reads Arrow offsets only, not the tokens."""
    column = next(name for name in before.column_names if name != LENGTH)
    old, new = list_lengths(before, column), list_lengths(after, column)
    return PackingReport(len(old), len(new), int(old.sum()), int(new.sum()), int((old > seq_length).sum()), seq_length)
