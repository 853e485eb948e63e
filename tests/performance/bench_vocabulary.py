"""A vocabulary of 200,000, 40 % of the tokens supervised: time and peak memory against TRL and transformers.

    python tests/performance/bench_vocabulary.py --fast --out results/vocabulary.json

Two layers of width 256 and a tied head, 4 rows of 256 tokens. Peak memory is this process's highest resident memory
above where it stood before the first step, and, in a run of its own, the highest level of torch's allocator.
"""

from typing import Any

from harness import Bench
from training import train

SHARED = {"shape": "wide_head", "vocab_size": 200_000, "rows": 400, "length": 256}
ARGS = {"per_device_train_batch_size": 4, "gradient_checkpointing": False, "logging_steps": 1}
SFT = {"completion_only_loss": True}


def sides(bf16: bool, **extra: Any) -> dict[str, dict[str, Any]]:
    shared = {**SHARED, **extra}
    args = {**ARGS, "bf16": bf16}
    return {
        "trl": {**shared, "args": {**args, **SFT}},
        "transformers": {**shared, "args": args},
        "finetune": {**shared, "args": {**args, **SFT}},
    }


def main() -> None:
    bench = Bench("vocabulary", "Vocabulary 200k, width 256, 40 % supervised", train, __doc__)
    for precision, bar in (("float32", 10.0), ("bf16", 15.0)):
        if not bench.wanted(precision):
            continue
        bf16 = precision == "bf16"
        chosen = sides(bf16, steps=1 if bench.fast else 2)
        if bench.fast:
            chosen.pop("trl")  # the slower of the two here, by far
        case = bench.case(precision, chosen, settings=SHARED)
        others = [each for each in chosen if each != "finetune"]
        for other in others:
            case.ratio("seconds", other)
            case.ratio("cpu_seconds", other)
            case.ratio("peak_mib", other)
            case.losses_agree(2e-2 if bf16 else 5e-4, other)
        best = case.best("seconds", others)
        case.bar(f"tokens/s against {best}, {precision}", case.ratio("seconds", best), at_least=bar)
        if bench.fast and bf16:
            continue
        ledger = bench.case(f"{precision}, tensor ledger", sides(bf16, ledger=True, steps=1), pairs=1)
        smallest = ledger.best("ledger_mib", ["trl", "transformers"])
        share = 1 / ledger.ratio("ledger_mib", smallest)
        ledger.bar(f"peak tensor memory of a step as a share of {smallest}'s, {precision}", share, at_most=0.5)
    bench.finish()


if __name__ == "__main__":
    main()
