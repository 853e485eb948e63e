"""Which checkpoints are kept."""

import math
from dataclasses import dataclass
from pathlib import Path

from finetune.checkpoint.manifest import Manifest
from finetune.errors import ArgumentError


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint folder. `manifest` is None for one that transformers wrote."""

    path: Path
    step: int
    manifest: Manifest | None


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay. The newest and the best always do.

    Either `total_limit` (transformers' `save_total_limit`: so many in all, the best among them), or `keep_last`
    newest ones plus `keep_best` best ones by metric, of which NaN is none. None of them: all stay.
    """

    total_limit: int | None = None
    keep_last: int | None = None
    keep_best: int | None = None
    greater_is_better: bool | None = None  # None: what the checkpoints say

    def __post_init__(self) -> None:
        if self.total_limit and (self.keep_last or self.keep_best):
            raise ArgumentError(
                "`save_total_limit` cannot be combined with `keep_last` or `keep_best`; use one of the two policies."
            )

    def to_delete(
        self, checkpoints: list[Checkpoint], best: str | None, *, only_best: bool = False
    ) -> list[Checkpoint]:
        """Returns which of `checkpoints` (oldest first) go. `best` is the name of the best one.

        `only_best`: all but that one go, if it is there.

        >>> steps = [Checkpoint(Path(f"checkpoint-{s}"), s, None) for s in (1, 2, 3, 4)]
        >>> [c.step for c in Retention(total_limit=2).to_delete(steps, best="checkpoint-1")]
        [2, 3]
        """
        if only_best and any(c.path.name == best for c in checkpoints):
            return [c for c in checkpoints if c.path.name != best]
        protected = {c.path.name for c in checkpoints[-1:]} | {best}
        if self.keep_last or self.keep_best:
            protected |= {c.path.name for c in checkpoints[-self.keep_last :]} if self.keep_last else set()
            measured = [(c.manifest, c) for c in checkpoints if c.manifest and _is_number(c.manifest.metric)]
            said = measured[-1][0].greater_is_better if measured else True
            greater = said if self.greater_is_better is None else self.greater_is_better
            measured.sort(key=lambda pair: pair[0].metric or 0.0, reverse=greater)
            protected |= {c.path.name for _, c in measured[: self.keep_best or 0]}
            return [c for c in checkpoints if c.path.name not in protected]
        if not self.total_limit or self.total_limit < 0:
            return []
        others = [c for c in checkpoints if c.path.name not in protected]
        surplus = len(checkpoints) - max(self.total_limit, len(checkpoints) - len(others))
        return others[: max(surplus, 0)]


def _is_number(metric: float | None) -> bool:
    return metric is not None and math.isfinite(metric)
