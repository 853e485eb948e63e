"""The memory ledger: what a training will hold on each device, by group, and how that divides over ranks.

One device is traced (`memory_trace.py`). The other ways to parallelise are computed from that trace, for N ranks:

| way    | weights | gradients | optimizer state        | besides                                               |
|--------|---------|-----------|------------------------|-------------------------------------------------------|
| DDP    | whole   | whole     | whole                  | buckets as large as the gradients                      |
| FSDP2  | 1/N     | 1/N       | 1/N                    | gathered: two blocks and what lies outside blocks      |
| ZeRO-1 | whole   | whole     | 1/N + float32 masters  | one bucket of at most 5e8 elements                     |
| ZeRO-2 | whole   | 1/N       | 1/N + float32 masters  | two such buckets                                       |
| ZeRO-3 | 1/N     | 1/N       | 1/N + float32 masters  | one such bucket, and gathered as under FSDP2           |

Gathered weights have gradients too until these are scattered. Activations and temporaries are those of one device,
because each rank runs its own rows. With bfloat16 FSDP2 gathers, and ZeRO stores, weights in bfloat16.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from finetune.features.compiled import repeated_blocks
from finetune.reporting.memory import format_bytes
from finetune.reporting.memory_trace import GROUPS, MemoryTrace

STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
_NAMES = {
    "single": "one device",
    "ddp": "DDP",
    "fsdp2": "FSDP2",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
}
_BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's `reduce_bucket_size`


@dataclass(frozen=True)
class ModelSizes:
    """Elements of a model: all, trained, of its largest repeated block, and outside all blocks."""

    parameters: int
    trained: int
    largest_block: int
    outside_blocks: int

    @classmethod
    def of(cls, model: nn.Module) -> "ModelSizes":
        """Returns the sizes of `model`. Blocks are the members of its outermost module lists (decoder layers)."""
        blocks = repeated_blocks(model)
        every = sum(p.numel() for p in model.parameters())
        sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return cls(every, trained, max(sizes, default=0), max(every - sum(sizes), 0))


@dataclass(frozen=True)
class LedgerRow:
    """Bytes per device of one way to run: the most each group holds, and the largest total. `refused` says why not.

    The groups' maxima do not fall in one moment, so `peak` is less than their sum.
    """

    way: str
    ranks: int
    groups: dict[str, int]
    peak: int
    refused: str = ""

    @property
    def name(self) -> str:
        return _NAMES[self.way] + (f" x {self.ranks}" if self.way != "single" else "")


def single(trace: MemoryTrace) -> LedgerRow:
    """Returns the row of one device."""
    return LedgerRow("single", 1, {group: trace.largest(group) for group in GROUPS}, trace.peak()[0])


def sharded(
    way: str,
    ranks: int,
    trace: MemoryTrace,
    narrow: MemoryTrace,
    sizes: ModelSizes,
    *,
    trained_bytes: int | None = None,
) -> LedgerRow:
    """Returns the row of `way` (one of `STRATEGIES`) on `ranks` devices.

    `trace` has the weights as they are stored, `narrow` as they are computed with (the same object without bfloat16).
    `trained_bytes`: the gradients that DDP exchanges, if not all.
    """
    weights, gradients = trace.largest("weights"), trace.largest("gradients")
    moments, bases = trace.largest("moments"), trace.largest("bases")
    computed = narrow.largest("weights") / max(sizes.parameters, 1)  # bytes of one weight
    if way == "ddp":
        exchanged = gradients if trained_bytes is None else trained_bytes
        groups = {**single(trace).groups, "gradients": gradients + exchanged}
        return LedgerRow(way, ranks, groups, trace.peak()[0] + exchanged)
    masters = 0 if way == "fsdp2" else sizes.trained * 4
    if way != "fsdp2":
        weights, gradients = narrow.largest("weights"), narrow.largest("gradients")
    share_weights = 1 / ranks if way in ("fsdp2", "zero3") else 1.0
    share_gradients = 1.0 if way == "zero1" else 1 / ranks
    gathered = 0
    if way in ("fsdp2", "zero3"):
        trained_share = sizes.trained / max(sizes.parameters, 1)
        working = (2 * sizes.largest_block + sizes.outside_blocks) * computed
        gathered = int(working + (sizes.largest_block + sizes.outside_blocks) * computed * trained_share)
    buckets = {"zero1": 1, "zero2": 2, "zero3": 1}.get(way, 0) * min(sizes.trained, _BUCKET_ELEMENTS) * computed
    state = (moments + bases + masters) // ranks
    # What lies in the trace's own weights and state is replaced by the shares; gradients grow during backward.
    scale = gradients / max(narrow.largest("gradients"), 1) * share_gradients
    moving, _ = narrow.peak({"weights": 0.0, "moments": 0.0, "bases": 0.0, "gradients": scale})
    held = int(weights * share_weights)
    groups = {
        "weights": held + gathered,
        "gradients": int(gradients * share_gradients + buckets),
        "moments": (moments + masters) // ranks,
        "bases": bases // ranks,
        "activations": narrow.largest("activations"),
        "temporary": narrow.largest("temporary"),
    }
    return LedgerRow(way, ranks, groups, int(held + gathered + buckets + state + moving))


def ledger_table(rows: Sequence[LedgerRow]) -> str:
    """Returns the rows as aligned text, one line per way to run, and below them why some are refused."""
    lines = [["per device", *GROUPS, "peak"]]
    for row in rows:
        sizes = [format_bytes(row.groups[group]) for group in GROUPS] + [format_bytes(row.peak)]
        lines.append([row.name, *(["-"] * (len(sizes) - 1) + ["refused"] if row.refused else sizes)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.refused:
            reasons.setdefault(row.refused, []).append(_NAMES[row.way])
    return "\n".join([*text, *(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())])
