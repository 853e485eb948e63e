"""Checks the figures in the README against the measured JSON files, or writes them.

    python tests/performance/check_readme.py            # exit status 1 and the differing lines if a figure is wrong
    python tests/performance/check_readme.py --write    # writes the table anew

The table between the two markers is made from `results/*.json` and from nothing else.
"""

import argparse
import difflib
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
README = HERE.parent.parent / "README.md"
BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"
ORDER = [
    "short_chats", "packed", "vocabulary", "loop_overhead", "import", "first_step", "prepare_rows", "evaluation",
    "galore_refresh", "checkpoint", "resume",
]  # fmt: skip


def load(folder: Path) -> list[dict[str, Any]]:
    """Returns the results in `folder`, in the order of the table; unknown ones come last."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    found = [each for each in found if "benchmark" in each]
    return sorted(found, key=lambda each: ORDER.index(each["benchmark"]) if each["benchmark"] in ORDER else len(ORDER))


def number(value: float) -> str:
    """Returns a figure as the table shows it: 3 significant digits, never in powers of ten.

    >>> number(3.14159), number(0.0271), number(1234.5)
    ('3.14', '0.0271', '1234')
    """
    if abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.3g}"


def spread(case: dict[str, Any], value: float) -> str:
    """Returns smallest to largest of the ratio whose median `value` (or its inverse) is; empty for other figures."""
    for ratio in case["ratios"].values():
        if value and abs(ratio["median"] / value - 1) < 1e-4:
            return f" ({number(ratio['min'])} to {number(ratio['max'])})"
        if value and ratio["median"] and abs(value * ratio["median"] - 1) < 1e-4:
            return f" ({number(1 / ratio['max'])} to {number(1 / ratio['min'])})"
    return ""


def table(results: list[dict[str, Any]]) -> list[str]:
    """Returns the lines between the markers."""
    if not results:
        return ["No results yet: run `make bench`."]
    lines = ["| what | case | measured (smallest to largest) | goal | met |", "|---|---|---|---|---|"]
    for result in results:
        for case in result["cases"]:
            for bar in case["bars"]:
                goal = f"≥ {bar['at_least']:g}" if bar["at_least"] is not None else f"≤ {bar['at_most']:g}"
                measured = number(bar["value"]) + spread(case, bar["value"])
                met = "yes" if bar["met"] else "**no**"
                lines.append(f"| {result['title']} | {bar['text']} | {measured} | {goal} | {met} |")
    first = results[0]["environment"]
    versions = ", ".join(f"{name} {first['packages'][name]}" for name in ("torch", "transformers", "trl"))
    disagreeing = [
        f"{result['title']}, {case['case']}: {name}"
        for result in results
        for case in result["cases"]
        for name, check in case.get("checks", {}).items()
        if not check["agree"]
    ]
    lines += [
        "",
        f"{first['processor']}, {first['memory_gib']} GiB, Python {first['python']}, {versions}, {first['date']}.",
    ]
    lines.append(
        f"Checks that did not agree: {'; '.join(disagreeing)}." if disagreeing else "Losses and token counts agreed."
    )
    return lines


def block(text: str) -> list[str]:
    """Returns the lines of a README between the markers.

    Raises:
        ValueError: a marker is missing.
    """
    lines = text.splitlines()
    if BEGIN not in lines or END not in lines:
        raise ValueError(f"The README has no lines {BEGIN} and {END}.")
    return lines[lines.index(BEGIN) + 1 : lines.index(END)]


def differences(text: str, results: list[dict[str, Any]]) -> list[str]:
    """Returns how the README differs from what was measured, as lines of a diff; none if it is right."""
    return list(difflib.unified_diff(block(text), table(results), "README.md", "measured", lineterm="", n=0))


def written(text: str, results: list[dict[str, Any]]) -> str:
    """Returns the README with the table made anew."""
    block(text)
    head, rest = text.split(BEGIN + "\n", 1)
    tail = rest.split(END, 1)[1]
    return head + BEGIN + "\n" + "\n".join(table(results)) + "\n" + END + tail


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--readme", type=Path, default=README)
    options = parser.parse_args()
    results, text = load(options.results), options.readme.read_text()
    if options.write:
        options.readme.write_text(written(text, results))
        return 0
    wrong = differences(text, results)
    print("\n".join(wrong) if wrong else "The README's figures are the measured ones.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
