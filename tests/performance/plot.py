"""Draws the results: one PNG per benchmark, with every side's measurements, and one with all bars.

python tests/performance/plot.py
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from check_readme import HERE, load_machine

METRICS = {"seconds": "seconds", "peak_mib": "MiB above the start", "ledger_mib": "MiB of tensors"}
COLOURS = {"finetune": "#1f77b4", "trl": "#d62728", "transformers": "#ff7f0e"}


def colour(side: str) -> str:
    return COLOURS.get(side.split()[0], "#7f7f7f")


def draw(result: dict[str, Any], target: Path) -> None:
    """Draws one benchmark: a panel per case and metric, a bar per side, a whisker from smallest to largest."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [
        (case, metric)
        for case in result["cases"]
        for metric in METRICS
        if sum(metric in side for side in case["sides"].values()) > 1
    ]
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.6), squeeze=False)
    for axis, (case, metric) in zip(axes[0], panels, strict=True):
        sides = {name: each[metric] for name, each in case["sides"].items() if metric in each}
        medians = [each["median"] for each in sides.values()]
        whiskers = [
            [each["median"] - each["min"] for each in sides.values()],
            [each["max"] - each["median"] for each in sides.values()],
        ]
        axis.bar(range(len(sides)), medians, yerr=whiskers, color=[colour(name) for name in sides], capsize=3)
        axis.set_xticks(range(len(sides)), list(sides), rotation=35, ha="right", fontsize=8)
        axis.set_title(case["case"], fontsize=9)
        axis.set_ylabel(METRICS[metric], fontsize=8)
    figure.suptitle(result["title"], fontsize=10)
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    plt.close(figure)


def draw_growth(result: dict[str, Any], target: Path) -> None:
    """Draws the growth curves: a panel per axis with time per supervised token, and below it the peak tensor memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axes = result["growth"]
    figure, panels = plt.subplots(2, len(axes), figsize=(3.6 * len(axes), 6.4), squeeze=False)
    for column, (name, axis) in enumerate(axes.items()):
        for row, (metric, label, scale) in enumerate(
            (("seconds_per_token", "µs per supervised token", 1e6), ("ledger_mib", "MiB of tensors at the peak", 1))
        ):
            panel = panels[row][column]
            for side, found in axis["sides"].items():
                points = [(x, each) for x, each in zip(axis["x"], found[metric], strict=True) if each]
                if not points:
                    continue
                medians = [each["median"] * scale for _, each in points]
                low = [(each["median"] - each["min"]) * scale for _, each in points]
                high = [(each["max"] - each["median"]) * scale for _, each in points]
                kind = "time" if row == 0 else "memory"
                exponent = found["exponents"].get(kind)
                legend = side if exponent is None else f"{side}, x^{exponent:.2f}"
                xs = [x for x, _ in points]
                panel.errorbar(xs, medians, yerr=[low, high], color=colour(side), marker="o", capsize=3, label=legend)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xlabel(name, fontsize=8)
            panel.set_ylabel(label, fontsize=8)
            if panel.get_legend_handles_labels()[0]:
                panel.legend(fontsize=7)
    figure.suptitle(result["title"], fontsize=10)
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    plt.close(figure)


def draw_all(results: list[dict[str, Any]], target: Path) -> None:
    """Draws how far each figure is from its goal: right of the line, the goal is met."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names, values = [], []
    for result in results:
        for case in result["cases"]:
            for bar in (each for each in case["bars"] if each["met"] is not None):
                value = max(bar["value"], 1e-9)
                factor = value / bar["at_least"] if bar["at_least"] is not None else bar["at_most"] / value
                names.append(f"{bar['text']}  ({bar['value']:.3g})")
                values.append(min(max(factor, 0.1), 20))
    if not names:
        return
    figure, axis = plt.subplots(figsize=(9, 0.32 * len(names) + 1.2))
    axis.barh(range(len(names)), values, color=["#2ca02c" if each >= 1 else "#d62728" for each in values])
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xscale("log")
    axis.set_xlabel("times the goal")
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args()
    for folder in (each for each in options.results.iterdir() if each.is_dir()):
        results = load_machine(folder)
        for result in results:
            (draw_growth if "growth" in result else draw)(result, folder / f"{result['name']}.png")
        draw_all(results, folder / "goals.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
