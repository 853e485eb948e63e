"""Checks the figures in the READMEs against the measured JSON files, or writes them.

    python tests/performance/check_readme.py            # exit status 1 and the differing lines if a figure is wrong
    python tests/performance/check_readme.py --write    # writes them anew

What stands between the two markers is made from `results/<machine>/*.json` and from nothing else: in the README of the
project the table, a column per machine; in that of this folder how the cost grows, how far one could get where a goal
is missed, and how it was measured.
"""

import argparse
import difflib
import json
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
README, DETAILS = HERE.parent.parent / "README.md", HERE / "README.md"
BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"
ORDER = [
    "short_chats", "packed", "vocabulary", "loop_overhead", "import", "first_step", "prepare_rows", "evaluation",
    "galore_refresh", "galore_refresh_large", "checkpoint", "resume", "growth",
]  # fmt: skip


Results = list[dict[str, Any]]


def load(folder: Path) -> dict[str, Results]:
    """Returns the results of every machine that has a folder in `folder`, by its processor; the most results first."""
    found = [results for each in sorted(folder.iterdir()) if each.is_dir() and (results := load_machine(each))]
    return {each[0]["environment"]["processor"]: each for each in sorted(found, key=len, reverse=True)}


def load_machine(folder: Path) -> Results:
    """Returns the results in the folder of one machine, in the order of the table; unknown ones come last."""
    found = [{"name": path.stem, **json.loads(path.read_text())} for path in sorted(folder.glob("*.json"))]
    found = [each for each in found if "benchmark" in each]
    return sorted(found, key=lambda each: ORDER.index(each["benchmark"]) if each["benchmark"] in ORDER else len(ORDER))


def spelled(text: str) -> str:
    """Returns a text of a result with the names of its sides written out.

    >>> spelled("as a share of trl 2 processes's"), spelled("against trl"), spelled("a share of transformers's")
    ("as a share of TRL's with 2 processes", 'against TRL', "a share of transformers'")
    """
    text = re.sub(r"\btrl 2 processes('s)?", r"TRL\1 with 2 processes", text)
    return re.sub(r"\btrl\b", "TRL", text).replace("transformers's", "transformers'")


def number(value: float) -> str:
    """Returns a figure as the table shows it: 3 significant digits, never in powers of ten.

    >>> number(3.14159), number(0.0271), number(1234.5)
    ('3.14', '0.0271', '1234')
    """
    if abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.3g}"


def spread(case: dict[str, Any], bar: dict[str, Any]) -> str:
    """Returns smallest to largest of the figure over all pairs; empty for a figure that has one value."""
    if "spread" in bar:
        return f" ({number(bar['spread']['min'])} to {number(bar['spread']['max'])})"
    value = bar["value"]
    for ratio in case["ratios"].values():
        if value and abs(ratio["median"] / value - 1) < 1e-4:
            return f" ({number(ratio['min'])} to {number(ratio['max'])})"
        if value and ratio["median"] and abs(value * ratio["median"] - 1) < 1e-4:
            return f" ({number(1 / ratio['max'])} to {number(1 / ratio['min'])})"
    return ""


def goal(bar: dict[str, Any]) -> str:
    """Returns a bar's goal as the table says it: "≥ 3", or a dash without one."""
    if bar["met"] is None:
        return "-"
    return f"≥ {bar['at_least']:g}" if bar["at_least"] is not None else f"≤ {bar['at_most']:g}"


def figure(case: dict[str, Any], bar: dict[str, Any]) -> str:
    """Returns a cell: the median, its spread, and whether the goal is met: "3 (2 to 5), met"."""
    verdict = {None: "", True: ", met", False: ", **missed**"}[bar["met"]]
    return number(bar["value"]) + spread(case, bar) + verdict


def floors(results: Results) -> list[str]:
    """Returns a line for every goal that a machine missed: how far the machine itself would let anybody get."""
    lines: list[str] = []
    for result in results:
        for bar in (bar for case in result["cases"] for bar in case["bars"] if bar["met"] is False):
            said = bar.get("floor")
            if said is None:
                lines.append(f"- {result['title']}, {bar['text']}: no floor was computed.")
                continue
            wanted = bar["at_least"] if bar["at_least"] is not None else bar["at_most"]
            beyond = said["best_possible"] < wanted if bar["at_least"] is not None else said["best_possible"] > wanted
            verdict = "the goal is beyond this machine's floor" if beyond else "the floor would allow the goal"
            best = number(said["best_possible"])
            lines.append(f"- {result['title']}, {bar['text']}: {said['says']}. At the floor: {best}; {verdict}.")
    processor = results[0]["environment"]["processor"]
    return ["", f"How far one could get where a goal is missed, {processor}:", "", *lines] if lines else []


def growth(results: Results) -> list[str]:
    """Returns the table of fitted exponents, if growth was measured."""
    lines: list[str] = []
    for axes in (result["growth"] for result in results if "growth" in result):
        sides = list(dict.fromkeys(side for axis in axes.values() for side in axis["sides"]))
        lines += [
            "",
            "How the cost grows: the exponent `e` of time per supervised token ~ x^e, and of peak tensor memory ~ x^e "
            f"({results[0]['environment']['processor']}).",
            "",
            f"| x | from, to | {' | '.join(sides)} |",
            "|---|---|" + "---|" * len(sides),
        ]
        for name, axis in axes.items():
            cells: list[str] = []
            for side in sides:
                exponents = axis["sides"].get(side, {}).get("exponents", {})
                cells.append(", ".join(f"{kind} {value:.2f}" for kind, value in exponents.items()) or "-")
            lines.append(f"| {name} | {axis['x'][0]:,} to {axis['x'][-1]:,} | {' | '.join(cells)} |")
    return lines


def circumstances(results: Results) -> list[str]:
    """Returns the lines that say on what, with what and how undisturbed a machine's figures were measured."""
    first = results[0]["environment"]
    versions = ", ".join(f"{name} {first['packages'][name]}" for name in ("torch", "transformers", "trl"))
    dates = sorted(each["environment"]["date"] for each in results)
    pairs = [case["pairs"] for result in results for case in result["cases"] if case["bars"]] or [0]
    lines = [
        "",
        f"{first['processor']}, {first['memory_gib']} GiB, Python {first['python']}, {versions}, "
        f"{dates[0]} to {dates[-1]}; {' to '.join(map(str, sorted({min(pairs), max(pairs)})))} pairs each.",
    ]
    if "threads" in first:
        lines.append("Threads: " + ", ".join(f"{name} {value}" for name, value in first["threads"].items()) + ".")
    busy = [each["environment"].get("cores_busy_with_others") for each in results]
    known = [each for each in busy if each is not None]
    if known:
        lines.append(
            f"Other programs kept {number(min(known))} to {number(max(known))} cores busy meanwhile"
            f"{'' if len(known) == len(busy) else ' (not known of all)'}."
        )
    disagreeing = [
        f"{result['title']}, {case['case']}: {name}"
        for result in results
        for case in result["cases"]
        for name, check in case.get("checks", {}).items()
        if not check["agree"]
    ]
    unable = [f"{result['title']}, {name}: {why}" for result in results
              for name, why in result.get("left_out", {}).items()]  # fmt: skip
    if unable:
        lines.append(f"Not measured: {'; '.join(unable)}.")
    lines.append(
        f"Checks that did not agree: {'; '.join(disagreeing)}." if disagreeing else "Losses and token counts agreed."
    )
    return lines


def table(machines: dict[str, Results]) -> list[str]:
    """Returns the lines between the markers of the project's README."""
    if not machines:
        return ["No results yet: run `make bench`."]
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for processor, results in machines.items():
        for result in results:
            for case in result["cases"]:
                for bar in case["bars"]:
                    cells = rows.setdefault((result["title"], bar["text"], goal(bar)), {})
                    cells[processor] = figure(case, bar)
    # A stable sort: what only one machine measured stands with the rest of its benchmark.
    titles = list(dict.fromkeys(title for title, _, _ in rows))
    ordered = sorted(rows.items(), key=lambda row: titles.index(row[0][0]))
    lines = [f"| what | case | {' | '.join(machines)} | goal |", "|---|---|" + "---|" * (len(machines) + 1)]
    above = ""
    for (title, text, wanted), cells in ordered:
        shown = [title if title != above else "", spelled(text), *(cells.get(each, "-") for each in machines), wanted]
        lines.append(f"| {' | '.join(shown)} |")
        above = title
    return lines


def details(machines: dict[str, Results]) -> list[str]:
    """Returns the lines between the markers of this folder's README."""
    parts = [part(results) for part in (growth, floors, circumstances) for results in machines.values()]
    return [spelled(line) for part in parts for line in part]


def block(text: str) -> list[str]:
    """Returns the lines of a README between the markers.

    Raises:
        ValueError: a marker is missing.
    """
    lines = text.splitlines()
    if BEGIN not in lines or END not in lines:
        raise ValueError(f"The README has no lines {BEGIN} and {END}.")
    return lines[lines.index(BEGIN) + 1 : lines.index(END)]


def differences(text: str, wanted: list[str]) -> list[str]:
    """Returns how a README differs from the `wanted` lines, as lines of a diff; none if it is right."""
    return list(difflib.unified_diff(block(text), wanted, "README.md", "measured", lineterm="", n=0))


def written(text: str, wanted: list[str]) -> str:
    """Returns a README with the `wanted` lines between its markers."""
    block(text)
    head, rest = text.split(BEGIN + "\n", 1)
    tail = rest.split(END, 1)[1]
    return head + BEGIN + "\n" + "\n".join(wanted) + "\n" + END + tail


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--details", type=Path, default=DETAILS)
    options = parser.parse_args()
    results, wrong = load(options.results), []
    for path, wanted in ((options.readme, table(results)), (options.details, details(results))):
        if options.write:
            path.write_text(written(path.read_text(), wanted))
        wrong += differences(path.read_text(), wanted)
    print("\n".join(wrong) if wrong else "The figures of the READMEs are the measured ones.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
