"""Tokenising, masking the assistant's turns and packing 50,000 chats: rows per second on the same cores.

    python tests/performance/bench_prepare_rows.py --fast --out results/prepare_rows.json

The rows lie in memory and nothing is cached. `--fast` takes 10,000 rows.
"""

from typing import Any

from data_runs import prepare_rows
from harness import Bench

ARGS = {"packing": True, "assistant_only_loss": True}


def main() -> None:
    bench = Bench("prepare_rows", "Tokenising, masking and packing chats", prepare_rows, __doc__)
    rows = 10_000 if bench.fast else 50_000
    shared: dict[str, Any] = {"rows": rows}
    # Unset, the tokenizer may use all cores in one process, as it does in a user's program.
    free = {"env": {"TOKENIZERS_PARALLELISM": "true"}}
    sides = {
        "trl": {**shared, **free, "args": ARGS},
        "trl 2 processes": {**shared, "args": {**ARGS, "dataset_num_proc": 2}},
        "finetune": {**shared, **free, "args": ARGS},
    }
    case = bench.case("chats", sides, pairs=3 if bench.fast else 5, settings=shared)
    same = {side: each["tokens"]["median"] for side, each in case.result["sides"].items()}
    case.result["checks"]["tokens"] = {**same, "agree": len(set(same.values())) == 1}
    best = case.best("seconds", ["trl", "trl 2 processes"])
    case.ratio("cpu_seconds", "trl")
    case.bar(f"rows/s against {best}", case.ratio("seconds", best), at_least=4.0)
    bench.finish()


if __name__ == "__main__":
    main()
