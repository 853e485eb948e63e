"""From a file of 50,000 chats to the end of the first optimizer step, with a cold and with a warm cache.

    python tests/performance/bench_first_step.py --fast --out results/first_step.json

Every measurement is a new process that has imported its libraries and done nothing else (`bench_import.py` measures
the imports). The clock runs through reading the file, tokenising, masking and one step of a tiny model.
The floor, measured once, is the tokenizer alone and one step of a plain loop. `--fast` takes 10,000 rows.
"""

import tempfile
from typing import Any

from data_runs import first_step
from harness import Bench
from training import load_library

# As in a user's program: unset.
FREE = {"env": {"TOKENIZERS_PARALLELISM": None}}


def main() -> None:
    bench = Bench(
        "first_step", "Time to the first step, chat rows from a file", first_step, __doc__, imports=load_library
    )
    rows = 10_000 if bench.fast else 50_000
    for state in ("cold", "warm"):
        if not bench.wanted(state):
            continue
        shared: dict[str, Any] = {"rows": rows, "warm": state == "warm", "args": {}, **FREE}
        cache = tempfile.TemporaryDirectory(prefix="bench_first_step_")
        if state == "warm":
            shared["cache"] = cache.name
        incumbents = {"trl": shared, "trl 2 processes": {**shared, "args": {"dataset_num_proc": 2}}}
        if bench.fast:
            incumbents.pop("trl 2 processes" if state == "warm" else "trl")
        sides = {**incumbents, "finetune": shared}
        with cache:
            # The round that is thrown away fills the cache.
            case = bench.case(state, sides, settings=shared, fresh=True, warmup=int(state == "warm"))
            bare = bench.measured_once("bare", shared, warmup=0)["seconds"]
        best = case.best("seconds", list(incumbents))
        theirs = case.result["sides"][best]["seconds"]["median"]
        case.bar(
            f"seconds to the first step, {rows:,} rows, {state} cache, as a share of {best}'s",
            case.shares("seconds", best),
            at_most=0.3,
            floor={
                "seconds": bare,
                "best_possible": bare / theirs,
                "says": f"{'tokenising alone, ' if state == 'cold' else ''}opening the rows, making the model and one "
                f"plain step take {bare:.2g} s, {best} {theirs:.2g} s",
            },
        )
    bench.finish()


if __name__ == "__main__":
    main()
