"""Tokenising, masking the assistant's turns and packing 50,000 chats: rows per second on the same cores.

    python tests/performance/bench_prepare_rows.py --fast --out results/prepare_rows.json

The rows lie in memory and nothing is cached. The side "tokenizer alone" is the floor: the tokenizers
library on all cores with no template, masks or packing. `--fast` takes 10,000 rows and leaves out TRL with one process.
"""

from typing import Any

from data_runs import prepare_rows
from harness import Bench
from training import load_library

ARGS = {"packing": True, "assistant_only_loss": True}


def main() -> None:
    bench = Bench("prepare_rows", "Tokenising, masking and packing chats", prepare_rows, __doc__, load_library)
    rows = 10_000 if bench.fast else 50_000
    shared: dict[str, Any] = {"rows": rows}
    # Unset, the tokenizer may use all cores in one process, as it does in a user's program.
    free = {"env": {"TOKENIZERS_PARALLELISM": None}}
    sides = {
        "trl": {**shared, **free, "args": ARGS},
        "trl 2 processes": {**shared, "args": {**ARGS, "dataset_num_proc": 2}},
        "finetune": {**shared, **free, "args": ARGS},
    }
    incumbents = ["trl 2 processes"] if bench.fast else ["trl", "trl 2 processes"]
    if bench.fast:
        sides.pop("trl")  # the slower of the two
    sides["tokenizer alone"] = {**shared, **free}
    case = bench.case("chats", sides, settings=shared)
    same = {side: case.result["sides"][side]["tokens"]["median"] for side in (*incumbents, "finetune")}
    case.result["checks"]["tokens"] = {**same, "agree": len(set(same.values())) == 1}
    best = case.best("seconds", incumbents)
    if not bench.fast:
        case.ratio("cpu_seconds", "trl")
    theirs, alone, ours = (
        case.result["sides"][side]["seconds"]["median"] for side in (best, "tokenizer alone", "finetune")
    )
    case.ratio("seconds", best, "tokenizer alone")
    case.bar(
        f"rows/s against {best}, {rows:,} rows",
        case.ratios("seconds", best),
        at_least=4.0,
        floor={
            "seconds": alone,
            "best_possible": theirs / alone,
            "ours_over_floor": ours / alone,
            "says": f"the tokenizers library alone takes {alone:.2g} s on all cores, ours {ours:.2g} s in all, "
            f"{best} {theirs:.2g} s",
        },
    )
    bench.finish()


if __name__ == "__main__":
    main()
