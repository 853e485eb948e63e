"""Packed rows of 1,024 tokens: TRL's SFTTrainer and ours, both packing best-fit, in float32 and bf16.

    python tests/performance/bench_packed.py --fast --out results/packed.json

The rows are those of `bench_short_chats.py`. Both sides run at their best setting on this machine (no recomputation of
activations); TRL's default, which recomputes, is measured too.
"""

from typing import Any

from harness import Bench
from training import load_library, train, training_floor

SHARED = {"shape": "small", "vocab_size": 8192}
ARGS = {
    "per_device_train_batch_size": 2,
    "completion_only_loss": True,
    "packing": True,
    "max_length": 1024,
    "logging_steps": 1,
}


def main() -> None:
    bench = Bench(
        "packed", "Packed rows of 1,024 tokens, 2 per batch, vocabulary 8k", train, __doc__, imports=load_library
    )
    for precision, bar in (("float32", 1.5), ("bf16", 3.0)):
        if not bench.wanted(precision):
            continue
        steps, rows = (1, 600) if bench.fast else (8, 2000)

        def side(**args: Any) -> dict[str, Any]:
            return {**SHARED, "rows": rows, "steps": steps, "args": {**ARGS, "bf16": precision == "bf16", **args}}  # noqa: B023

        no_checkpointing = side(gradient_checkpointing=False)
        sides = {"trl": side(), "trl best": no_checkpointing, "finetune": no_checkpointing}
        if bench.fast:
            sides.pop("trl")
        case = bench.case(precision, sides, settings=SHARED)
        if not bench.fast:
            case.ratio("seconds", "trl")
        case.ratio("cpu_seconds", "trl best")
        case.losses_agree(2e-4 if precision == "float32" else 2e-2, "trl best")
        speed, floor = case.ratios("seconds", "trl best"), training_floor(case, "trl best")
        case.bar(f"tokens/s against TRL at its best, {precision}", speed, at_least=bar, floor=floor)
    bench.finish()


if __name__ == "__main__":
    main()
