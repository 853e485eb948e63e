"""A vocabulary of 200,000, 40 % of the tokens supervised: time and peak memory against TRL and transformers.

    python tests/performance/bench_vocabulary.py --fast --out results/vocabulary.json

Two layers of width 256 and a tied head, 4 rows of 256 tokens. `--fast` measures only the faster incumbent's time, and
TRL's memory, which does not vary, in a window of its own. Peak memory is this process's highest resident memory
above where it stood before the first step, and the highest level of torch's allocator, which its profiler records.
That recording costs a step of seconds less than a hundredth (measured with and without), on all sides alike.
"""

from typing import Any

from harness import Bench
from training import load_library, train, training_floor

SHARED = {"shape": "wide_head", "vocab_size": 200_000, "rows": 400, "length": 256}
ARGS = {"per_device_train_batch_size": 4, "gradient_checkpointing": False, "logging_steps": 1}
SFT = {"completion_only_loss": True}


def sides(bf16: bool, **extra: Any) -> dict[str, dict[str, Any]]:
    shared = {**SHARED, "ledger": True, **extra}
    args = {**ARGS, "bf16": bf16}
    return {
        "trl": {**shared, "args": {**args, **SFT}},
        "transformers": {**shared, "args": args},
        "finetune": {**shared, "args": {**args, **SFT}},
    }


def main() -> None:
    bench = Bench("vocabulary", "Vocabulary 200k, width 256, 40 % supervised", train, __doc__, load_library)
    for precision, bar in (("float32", 10.0), ("bf16", 15.0)):
        if not bench.wanted(precision):
            continue
        bf16 = precision == "bf16"
        chosen = sides(bf16, steps=1 if bench.fast else 2)
        least = chosen.pop("trl") if bench.fast else None  # the slower of the two, by far; it needs the least memory
        case = bench.case(precision, chosen, settings=SHARED)
        others = [each for each in chosen if each != "finetune"]
        for other in others:
            for metric in ("seconds", "cpu_seconds", "peak_mib", "ledger_mib"):
                case.ratio(metric, other)
            case.losses_agree(2e-2 if bf16 else 5e-4, other)
        best = case.best("seconds", others)
        speed = case.ratios("seconds", best)
        case.bar(f"tokens/s against {best}, {precision}", speed, at_least=bar, floor=training_floor(case, best))
        text = f"peak tensor memory of a step as a share of trl's, {precision}"
        if least is None:
            case.bar(text, case.shares("ledger_mib", "trl"), at_most=0.5)
            case.bar(f"tokens/s against trl, {precision}", case.ratios("seconds", "trl"))
        else:
            theirs = bench.measured_once("trl", least)["ledger_mib"]
            case.bar(text, [ours / theirs for ours in case.values("finetune", "ledger_mib")], at_most=0.5)
    bench.finish()


if __name__ == "__main__":
    main()
