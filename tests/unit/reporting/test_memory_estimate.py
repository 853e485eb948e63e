"""The arithmetic of the estimate on a trace made by hand, and the trace of a layer small enough to count."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from finetune.reporting.memory_estimate import ModelSizes, estimate_table, sharded, single
from finetune.reporting.memory_trace import GROUPS, MemoryTrace, trace_updates

# weights, gradients, moments, bases, activations, temporary: the middle of backward, its end, the step.
TRACE = MemoryTrace(
    np.array([[800, 400, 1600, 0, 600, 300], [800, 800, 1600, 0, 0, 300], [800, 800, 1600, 0, 0, 0]]), {}
)
# With weights and gradients of two bytes.
HALF = MemoryTrace(TRACE.samples // np.array([2, 2, 1, 1, 1, 1]), {})
SIZES = ModelSizes(parameters=200, trained=200, largest_block=50, outside_blocks=20)  # four bytes each


def row(way, ranks=4, narrow=TRACE, **options):
    return sharded(way, ranks, TRACE, narrow, SIZES, **options)


def test_one_device():
    one = single(TRACE)
    assert one.groups == dict(zip(GROUPS, (800, 800, 1600, 0, 600, 300), strict=True))
    assert one.peak == 3700 and TRACE.peak()[1]["gradients"] == 400
    # Without moments the end of backward is smaller than its middle still.
    assert TRACE.peak({"moments": 0.0, "activations": 0.0})[0] == 1900


def test_ddp_adds_buckets():
    assert row("ddp").peak == 3700 + 800 and row("ddp").groups["gradients"] == 1600
    assert row("ddp", trained_bytes=100).peak == 3800


def test_fsdp2_shards_and_gathers():
    gathered = (2 * 50 + 20) * 4 + (50 + 20) * 4
    found = row("fsdp2")
    assert found.groups["weights"] == 200 + gathered and found.groups["moments"] == 400
    assert found.groups["gradients"] == 200
    assert found.peak == 200 + gathered + 400 + (100 + 600 + 300)


def test_zero_keeps_masters_and_buckets():
    bucket = 200 * 4
    one, two, three = (row(way, bucket_elements=200) for way in ("zero1", "zero2", "zero3"))
    assert one.groups["moments"] == two.groups["moments"] == three.groups["moments"] == (1600 + 800) // 4
    assert one.groups["gradients"] == 800 + bucket and two.groups["gradients"] == 200 + bucket
    assert one.groups["weights"] == two.groups["weights"] == 800 and three.groups["weights"] < 1000
    assert one.peak == 800 + bucket + 600 + (400 + 600 + 300)
    assert row("zero1", bucket_elements=0, narrow=HALF).peak == 400 + 600 + (200 + 600 + 300)
    # Nobody sets the bucket: its memory is taken whole, however small the model.
    assert row("zero2").groups["gradients"] == 200 + 4 * 500_000_000


def test_the_step_needs_most_where_activations_are_few():
    few = MemoryTrace(TRACE.samples * np.array([1, 1, 1, 1, 0.01, 0]), {})
    found = sharded("zero2", 4, few, few, SIZES, bucket_elements=0)
    assert found.peak == 800 + 600 + (200 + 200)
    # Under FSDP2 there are no copies, but then the pass, with what is gathered, needs most.
    assert sharded("fsdp2", 4, few, few, SIZES).peak == 200 + 400 + (120 * 4 + 70 * 4) + (100 + 6)


def test_the_first_update_is_left_out():
    first = [[800, 800, 0, 0, 900, 0], [800, 800, 800, 0, 0, 900]]
    trace = MemoryTrace(np.concatenate([np.array(first), TRACE.samples]), {})
    assert trace.most(("activations", 1.0), during_pass=True) == 600
    assert trace.most(("temporary", 1.0), during_pass=False) == 300


def test_more_ranks_never_need_more():
    for way in ("fsdp2", "zero1", "zero2", "zero3"):
        assert row(way, 8).peak < row(way, 2).peak


def test_sizes_know_blocks():
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            inner = nn.ModuleList([nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False)])
            self.layers = nn.ModuleList([inner, nn.Linear(4, 4, bias=False)])
            self.head = nn.Linear(5, 1, bias=False).requires_grad_(False)

    assert ModelSizes.of(Decoder()) == ModelSizes(6 + 6 + 16 + 5, 28, 16, 5)


@pytest.mark.parametrize("fake", [True, False])
def test_a_trace_that_can_be_counted(fake):
    """y = (x W)^2: W is (100, 10) floats, x (50, 100), so AdamW keeps 2 x 4,000 bytes and its step counter 4."""
    state = torch.random.get_rng_state()
    traced = trace_updates(
        lambda: nn.Linear(100, 10, bias=False),
        lambda model: torch.optim.AdamW(model.parameters(), foreach=False),
        lambda model: model(torch.ones(50, 100)).square().sum(),
        max_grad_norm=0.0,
        fake=fake,
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert traced.largest("weights") == 4000 and traced.largest("gradients") == 4000
    assert traced.largest("moments") == 8004 and traced.dtypes == {"float32": 2000}
    # x, x W and the loss are kept; (x W)^2 went when it had been summed.
    assert traced.largest("activations") == 50 * 100 * 4 + 50 * 10 * 4 + 4


def test_the_table_names_what_is_refused():
    rows = [single(TRACE), *(dataclasses.replace(row(way), refused="because") for way in ("zero1", "zero2"))]
    lines = estimate_table(rows).splitlines()
    assert lines[1].split() == ["one", "device", *"800 B 800 B 1.6 KiB 0 B 600 B 300 B 3.6 KiB".split()]
    assert lines[2].split()[:3] == ["ZeRO-1", "x", "4"] and lines[2].endswith("refused")
    assert lines[4] == "ZeRO-1, ZeRO-2: because"
