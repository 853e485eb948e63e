"""From a file of 50,000 chats to the end of the first optimizer step, with a cold and with a warm cache.

    python tests/performance/bench_first_step.py --fast --out results/first_step.json

Every measurement is a fresh process. The clock starts behind the imports (`bench_import.py` has those) and runs
through reading the file, tokenising, masking and one step of a tiny model. `--fast` takes 10,000 rows.
"""

from typing import Any

from data_runs import first_step
from harness import Bench


def main() -> None:
    bench = Bench("first_step", "Time to the first step, chat rows from a file", first_step, __doc__)
    rows = 10_000 if bench.fast else 50_000
    for state in ("cold", "warm"):
        if not bench.wanted(state):
            continue
        shared: dict[str, Any] = {"rows": rows, "warm": state == "warm"}
        sides = {
            "trl": {**shared, "args": {}},
            "trl 2 processes": {**shared, "args": {"dataset_num_proc": 2}},
            "finetune": {**shared, "args": {}},
        }
        if bench.fast:
            sides.pop("trl 2 processes")
        case = bench.case(state, sides, pairs=2 if bench.fast else 5, warmup=0 if bench.fast else 1, settings=shared)
        best = case.best("seconds", [each for each in sides if each != "finetune"])
        case.ratio("with_imports_seconds", best)
        share = 1 / case.ratio("seconds", best)
        case.bar(f"seconds to the first step, {state} cache, as a share of {best}'s", share, at_most=0.3)
    bench.finish()


if __name__ == "__main__":
    main()
