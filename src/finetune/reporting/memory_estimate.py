"""The memory estimate: what a training run holds on each device, by group, and how that divides over ranks.

One device is traced (`memory_trace.py`). The other ways to parallelise are computed from that trace, for N ranks:

| way    | weights | gradients | optimizer state        | besides                                               |
|--------|---------|-----------|------------------------|-------------------------------------------------------|
| DDP    | whole   | whole     | whole                  | buckets as large as the gradients                      |
| FSDP2  | 1/N     | 1/N       | 1/N                    | gathered: two blocks and what lies outside blocks      |
| ZeRO-1 | whole   | whole     | 1/N + float32 masters  | a bucket during backward, two copies of 1/N in the step |
| ZeRO-2 | whole   | 1/N       | 1/N + float32 masters  | the same                                               |
| ZeRO-3 | 1/N     | 1/N       | 1/N + float32 masters  | a bucket all the time, and gathered as under FSDP2     |

A bucket has 5e8 elements (DeepSpeed's `reduce_bucket_size`), however small the model is: its memory is taken whole.
Compared with what two processes hold in `tests/distributed/test_memory_of_ranks.py`.

Gathered weights have gradients too until these are scattered. Activations and temporaries are those of one device,
because each rank runs its own rows. With bfloat16 FSDP2 gathers, and ZeRO stores, weights in bfloat16.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from finetune.features.compiled import repeated_blocks
from finetune.files import format_bytes
from finetune.reporting.memory_trace import GROUPS, MemoryTrace

STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
# The argument of the trainer that asks for each of them; DDP needs none.
BACKENDS: dict[str, Literal["deepspeed", "fsdp"] | None] = {
    "ddp": None,
    "fsdp2": "fsdp",
    **dict.fromkeys(("zero1", "zero2", "zero3"), "deepspeed"),
}
_NAMES = {
    "single": "one device",
    "ddp": "DDP",
    "fsdp2": "FSDP2",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
}
BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's `reduce_bucket_size` unless set


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
class MemoryEstimate:
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


def single(trace: MemoryTrace) -> MemoryEstimate:
    """Returns the row of one device."""
    return MemoryEstimate("single", 1, {group: trace.largest(group) for group in GROUPS}, trace.peak()[0])


def sharded(
    way: str,
    ranks: int,
    trace: MemoryTrace,
    narrow: MemoryTrace,
    sizes: ModelSizes,
    *,
    trained_bytes: int | None = None,
    bucket_elements: int = BUCKET_ELEMENTS,
) -> MemoryEstimate:
    """Returns the row of `way` (one of `STRATEGIES`) on `ranks` devices.

    `trace` has the weights as they are stored, `narrow` as they are computed with (the same object without bfloat16).
    `trained_bytes`: the gradients that DDP exchanges, if not all. `bucket_elements`: DeepSpeed's `reduce_bucket_size`.
    """
    computed = narrow.largest("weights") / max(sizes.parameters, 1)  # bytes of one weight
    if way == "ddp":
        exchanged = trace.largest("gradients") if trained_bytes is None else trained_bytes
        groups = {**single(trace).groups, "gradients": trace.largest("gradients") + exchanged}
        return MemoryEstimate(way, ranks, groups, trace.peak()[0] + exchanged)
    stored = trace if way == "fsdp2" else narrow
    weights, gradients = stored.largest("weights"), stored.largest("gradients")
    share_weights = 1 / ranks if way in ("fsdp2", "zero3") else 1.0
    share_gradients = 1.0 if way == "zero1" else 1 / ranks
    gathered = 0
    if way in ("fsdp2", "zero3"):
        trained_share = sizes.trained / max(sizes.parameters, 1)
        working = (2 * sizes.largest_block + sizes.outside_blocks) * computed
        gathered = int(working + (sizes.largest_block + sizes.outside_blocks) * computed * trained_share)
    masters, copies = _of_deepspeed(way, ranks, computed, sizes)
    bucket = 0 if way == "fsdp2" else int(bucket_elements * computed)
    moments, bases = (trace.largest("moments") + masters) // ranks, trace.largest("bases") // ranks
    # Gradients grow during backward, and reach what the way to share them leaves here.
    scale = gradients / max(narrow.largest("gradients"), 1) * share_gradients
    passing = narrow.most(("gradients", scale), ("activations", 1.0), ("temporary", 1.0), during_pass=True)
    # Each rank updates its own share, and nothing is gathered any more.
    stepping = trace.most(("temporary", 1 / ranks), during_pass=False) + gradients // ranks + copies
    stepping += bucket if way == "zero3" else 0
    held = int(weights * share_weights)
    groups = {
        "weights": held + gathered,
        "gradients": int(gradients * share_gradients) + bucket,
        "moments": moments,
        "bases": bases,
        "activations": narrow.largest("activations"),
        "temporary": narrow.largest("temporary"),
    }
    return MemoryEstimate(way, ranks, groups, held + moments + bases + max(gathered + bucket + passing, stepping))


def _of_deepspeed(way: str, ranks: int, computed: float, sizes: ModelSizes) -> tuple[int, int]:
    """Returns what ZeRO needs in bytes: float32 weights, over all ranks, and each rank's gradient copies in the step.

    Float32 weights are copied too; their gradients once, those of 16 bits twice: flat, and in float32.
    """
    if way == "fsdp2":
        return 0, 0
    copies = sizes.trained // ranks * (computed + (4 if computed < 4 else 0))
    return sizes.trained * 4, int(copies)


def estimate_table(rows: Sequence[MemoryEstimate]) -> str:
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
