"""Short chats of mixed length, batch 8, vocabulary 8k: TRL's and our SFTTrainer, both at their defaults, and at best.

    python tests/performance/bench_short_chats.py --fast --out results/short_chats.json

Rows are log-normal in length (median 90 tokens, about 70 words), the first 60 % are the prompt. Precision is set, the
same on both sides; everything else is each side's default, or its best setting on this machine.
"""

from typing import Any

from harness import Bench
from training import load_library, train, training_floor

SHARED = {"shape": "small", "vocab_size": 8192}
BATCH = {"per_device_train_batch_size": 8, "completion_only_loss": True, "logging_steps": 1}
BEST_OF_TRL = {"gradient_checkpointing": False}
# TRL's padding-free batches run on a CPU too, through a dense mask; `max_length` has to be None for them.
PADDING_FREE = {**BEST_OF_TRL, "padding_free": True, "max_length": None}


def sides(bf16: bool, steps: int, rows: int) -> dict[str, dict[str, Any]]:
    """Returns the settings of every side for one precision."""

    def side(**args: Any) -> dict[str, Any]:
        return {**SHARED, "rows": rows, "steps": steps, "args": {**BATCH, "bf16": bf16, **args}}

    return {
        "trl": side(),
        "trl best": side(**BEST_OF_TRL),
        "trl padding-free": side(**PADDING_FREE),
        "finetune": side(),
        "finetune best": side(gradient_checkpointing=False),
    }


def main() -> None:
    bench = Bench(
        "short_chats", "Short chats of mixed length, batch 8, vocabulary 8k", train, __doc__, imports=load_library
    )
    for precision, bar in (("float32", 3.0), ("bf16", 4.0)):
        if not bench.wanted(precision):
            continue
        chosen = sides(precision == "bf16", *((2, 600) if bench.fast else (10, 2000)))
        if bench.fast:
            chosen.pop("trl best")  # padding-free is faster
        case = bench.case(precision, chosen, settings=SHARED)
        defaults = case.ratios("seconds", "trl")
        best = case.best("seconds", [each for each in chosen if each not in ("trl", "finetune", "finetune best")])
        bests = case.ratios("seconds", best, "finetune best")
        case.ratio("cpu_seconds", "trl")
        case.losses_agree(2e-4 if precision == "float32" else 2e-2, "trl")
        case.losses_agree(2e-4 if precision == "float32" else 2e-2, "trl", "finetune best")
        text, floor = f"tokens/s against TRL, defaults of both, {precision}", training_floor(case, "trl")
        case.bar(text, defaults, at_least=bar, floor=floor)
        # No goal of its own: said beside it, because defaults are half of a comparison.
        case.bar(
            f"tokens/s, best of both ({best}), {precision}", bests, floor=training_floor(case, best, "finetune best")
        )
    bench.finish()


if __name__ == "__main__":
    main()
