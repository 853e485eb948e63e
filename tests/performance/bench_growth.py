"""How the cost grows with length, vocabulary, batch and rows: TRL, transformers, finetune and a bare PyTorch loop.

    python tests/performance/bench_growth.py --out results/growth.json          # four minutes on two idle cores

A small Llama (width 128, two layers) in float32. One axis varies at a time around 256 tokens, vocabulary 8k, batch 2:
seconds per supervised token (40 % are) of one window of steps, and the highest level of torch's allocator in one more
window. "Rows" is preparation: the constructor's seconds per supervised token for so many chats, tokenised and masked.
Every side is one process for all points, the sides take turns at every window, and the first window of a point is
thrown away. Incumbents run at their best setting here (no recomputation); so does finetune. An exponent is the slope of
a straight line through the medians on doubly logarithmic paper.
"""

import math
from typing import Any

from data_runs import encode
from harness import Bench, Measure, Pause, clock, clocked, since, summary
from training import (
    Windows,
    arguments,
    classes,
    for_transformers,
    ledger_peak,
    library_of,
    load_library,
    padding_collator,
)
from workloads import SHAPES, chats, make_llama, token_rows, tokenizer

SIDES = ("trl", "transformers", "finetune", "bare loop")
AXES: dict[str, list[int]] = {
    "length": [128, 256, 512, 1024],
    "vocabulary": [2048, 8192, 32_768, 131_072],
    "batch": [1, 4, 16],
    "rows": [500, 2000, 6000],
}
USUAL = {"length": 256, "vocabulary": 8192, "batch": 2}
SUPERVISED = 0.4


def points(axes: dict[str, list[int]]) -> list[dict[str, Any]]:
    """Returns one dictionary per measured point, in the order in which all sides go through them."""
    found: list[dict[str, Any]] = []
    for name, xs in axes.items():
        for x in xs:
            point = {"axis": name, "x": x, **USUAL, **({} if name == "rows" else {name: x})}
            # Windows of a thousand tokens at least, so that the clock has something to tell.
            found.append({**point, "steps": max(1, 1024 // (point["batch"] * point["length"]))})
    return found


def exponent(xs: list[float], ys: list[float]) -> float:
    """Returns the slope of log y over log x by least squares.

    >>> round(exponent([1, 2, 4], [3, 12, 48]), 6)
    2.0
    """
    horizontal, vertical = [math.log(x) for x in xs], [math.log(y) for y in ys]
    middle, level = sum(horizontal) / len(xs), sum(vertical) / len(ys)
    over = sum((x - middle) * (y - level) for x, y in zip(horizontal, vertical, strict=True))
    return over / sum((x - middle) ** 2 for x in horizontal)


# ---- One side ----


def work(side: str, settings: dict[str, Any], pause: Pause) -> None:
    for point in settings["points"]:
        if point["axis"] == "rows":
            prepare(side, point, settings["repeats"], pause)
        elif side == "bare loop":
            bare(point, settings, pause)
        else:
            train(side, point, settings, pause)


def supervised(point: dict[str, Any]) -> int:
    """Returns how many supervised tokens a window has. For 2 steps of 4 rows of 100 tokens: 320."""
    return (point["length"] - round(point["length"] * (1 - SUPERVISED))) * point["batch"] * point["steps"]


def data(point: dict[str, Any], settings: dict[str, Any]) -> Any:
    count = point["batch"] * point["steps"] * (settings["repeats"] + 2)
    return token_rows(count, vocab_size=point["vocabulary"], length=point["length"], prompt_share=1 - SUPERVISED)


def train(side: str, point: dict[str, Any], settings: dict[str, Any], pause: Pause) -> None:
    """Trains one window that is thrown away, `repeats` that are timed, and one whose tensors are counted."""
    steps, windows = point["steps"], settings["repeats"] + 2
    rows = data(point, settings)
    options: dict[str, Any] = {"processing_class": tokenizer(point["vocabulary"])}
    args: dict[str, Any] = {
        "max_steps": steps * windows,
        "per_device_train_batch_size": point["batch"],
        "gradient_checkpointing": False,
        "bf16": False,
        "logging_steps": steps,
    }
    if library_of(side) == "transformers":
        rows, options = for_transformers(rows), {"data_collator": padding_collator}
    else:
        args |= {"completion_only_loss": True, "max_length": point["length"]}
    done = 0

    def counted(measure: Measure) -> None:
        nonlocal done
        done += 1
        pause({**measure, "seconds_per_token": measure["seconds"] / supervised(point)})
        clocks.ledger = done == windows - 1

    clocks = Windows(steps, counted)
    trainer = classes(side)[0](
        model=make_llama("narrow", point["vocabulary"]),
        args=arguments(side, args),
        train_dataset=rows,
        callbacks=[clocks],
        **options,
    )
    trainer.train()


def bare(point: dict[str, Any], settings: dict[str, Any], pause: Pause) -> None:
    """Does the same in a plain loop: the model's own loss over all logits, clipping, fused AdamW."""
    import torch

    rows = for_transformers(data(point, settings))
    model = make_llama("narrow", point["vocabulary"])
    model.config.use_cache = False
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    batches = iter(torch.utils.data.DataLoader(rows, point["batch"], shuffle=True, collate_fn=padding_collator))  # pyright: ignore[reportArgumentType]

    def window() -> Any:
        for _ in range(point["steps"]):
            model(**next(batches)).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    for _ in range(settings["repeats"] + 1):
        begin = clock()
        window()
        measured = since(begin)
        pause({**measured, "seconds_per_token": measured["seconds"] / supervised(point)})
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        window()
    pause({"ledger_mib": ledger_peak(profiler)})


def prepare(side: str, point: dict[str, Any], repeats: int, pause: Pause) -> None:
    """Measures the constructor with so many chats; the bare loop calls the tokenizer and makes masks and labels."""
    import datasets

    datasets.disable_progress_bars()
    datasets.disable_caching()
    table, made = {"messages": chats(point["x"])}, tokenizer()
    answers = [each["content"] for chat in table["messages"] for each in chat if each["role"] == "assistant"]
    tokens = sum(len(each.ids) + 1 for each in made.backend_tokenizer.encode_batch_fast(answers))
    rows = datasets.Dataset.from_dict(table)
    args = model = None
    if library_of(side) in ("trl", "finetune"):
        args = arguments(side, {"bf16": False, "max_length": 1024, "assistant_only_loss": True})
        model = make_llama("narrow", 8192)
    for _ in range(repeats + 2):
        if args is not None:
            fresh = datasets.Dataset.from_dict(table)
            options = {"model": model, "args": args, "train_dataset": fresh, "processing_class": made}
            measured = clocked(lambda: classes(side)[0](**options) and None)  # noqa: B023
        elif side == "bare loop":
            measured = clocked(lambda: {"encodings": len(encode(made, rows["messages"]))})
        else:
            measured = {"seconds": float("nan")}  # the plain Trainer prepares nothing
        pause({**measured, "seconds_per_token": measured["seconds"] / tokens})


# ---- All sides ----


def collected(rounds: list[dict[str, Measure]], chosen: list[dict[str, Any]], repeats: int) -> dict[str, Any]:
    """Returns, by axis: x, and by side the summaries at each point and the exponents.

    Per point there are `repeats` + 2 rounds: one to warm up, the timed ones, and one for the memory.
    """
    axes: dict[str, Any] = {}
    for number, point in enumerate(chosen):
        own = rounds[number * (repeats + 2) : (number + 1) * (repeats + 2)]
        axis = axes.setdefault(point["axis"], {"x": [], "sides": {}})
        axis["x"].append(point["x"])
        for side in own[0]:
            found = axis["sides"].setdefault(side, {"seconds_per_token": [], "ledger_mib": []})
            times = [each[side]["seconds_per_token"] for each in own[1:-1]]
            usable = not any(each is None or math.isnan(each) for each in times)
            found["seconds_per_token"].append(summary(times) if usable else None)
            level = own[-1][side].get("ledger_mib")
            found["ledger_mib"].append(summary([level]) if level else None)
    for axis in axes.values():
        for found in axis["sides"].values():
            fits = {"time": found["seconds_per_token"], "memory": found["ledger_mib"]}
            found["exponents"] = {
                kind: exponent(axis["x"], [each["median"] for each in values])
                for kind, values in fits.items()
                if len(values) > 1 and all(values)
            }
    return axes


def main() -> None:
    bench = Bench("growth", "How the cost grows", work, __doc__, load_library)
    repeats, bench.options.pairs = bench.options.pairs or 3, None
    axes = {name: xs for name, xs in AXES.items() if bench.wanted(name)}
    if bench.fast:
        axes = {name: xs[:2] for name, xs in axes.items()}
    chosen = points(axes)
    settings = {"points": chosen, "repeats": repeats}
    free = {"env": {"TOKENIZERS_PARALLELISM": None}}
    sides = {side: {**settings, **free} for side in SIDES}
    about = {"model": SHAPES["narrow"], **USUAL}
    case = bench.case("all points", sides, pairs=len(chosen) * (repeats + 2), warmup=0, settings=about)
    grown = collected(case.rounds, chosen, repeats)
    # Kept is what is drawn; the settings of all points and every round would be thousands of lines.
    case.result = {"case": "all points", "pairs": repeats, "settings": settings, "sides": {}, "ratios": {}, "bars": []}
    bench.finish(growth=grown)


if __name__ == "__main__":
    main()
