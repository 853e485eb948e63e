"""Curves of a run as SVG (drawn here) or PNG (matplotlib), from `trainer_state.json` alone.

Imports nothing but the standard library, so a run can be looked at on a machine without torch.
"""

import html
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.errors import ArgumentError
from finetune.files import CHECKPOINT_PREFIX, checkpoint_step

History = Sequence[Mapping[str, Any]]
Points = list[tuple[float, float]]

# Told apart by colour-blind readers as well (Okabe and Ito).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

_WIDTH, _HEIGHT = 560, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 14, 34, 40
_MAX_POINTS = 1200
_BOOKKEEPING = {"epoch", "step", "total_flos", "num_tokens", "num_input_tokens_seen"}


@dataclass
class Chart:
    """One picture: named series of (step, value). A `smooth` chart also shows a running mean of long series."""

    title: str
    series: dict[str, Points] = field(default_factory=dict)
    smooth: bool = False


def read_history(source: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns the `log_history` of a run: `source` is a `trainer_state.json`, a checkpoint, or an output folder.

    In an output folder the file beside the checkpoints is read, else that of the newest checkpoint.

    Raises:
        ArgumentError: there is no such file, or it is not the state of a trainer.
    """
    path = Path(source)
    if path.is_dir():
        states = {checkpoint_step(c.parent): c for c in path.glob(f"{CHECKPOINT_PREFIX}-*/trainer_state.json")}
        newest_first = sorted((step for step in states if step is not None), reverse=True)
        candidates = [path / "trainer_state.json", *(states[step] for step in newest_first)]
        path = next((candidate for candidate in candidates if candidate.is_file()), candidates[0])
    if not path.is_file():
        raise ArgumentError(
            f"There is no `trainer_state.json` in {os.fspath(source)!r} or its checkpoints; "
            "give the `output_dir` of a run."
        )
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["log_history"])
    except (ValueError, KeyError, TypeError) as error:
        raise ArgumentError(f"{os.fspath(path)!r} is not the state of a trainer: {error!r}.") from error


def charts(history: History, more: Mapping[str, Iterable[tuple[float, float]]] | None = None) -> list[Chart]:
    """Returns one chart per quantity logged at two or more steps, loss first; `x` and `eval_x` share a chart.

    `more` adds series by title, such as `{"memory (MiB)": [(step, value), ...]}`.

    >>> history = [{"loss": 2.0, "step": 1}, {"loss": 1.0, "step": 2}, {"eval_loss": 1.5, "step": 2}]
    >>> [(chart.title, list(chart.series)) for chart in charts(history)]
    [('loss', ['loss', 'eval_loss'])]
    """
    found: dict[str, Chart] = {}
    for entry in history:
        # The last entry repeats totals of the whole run, which are not points of a curve.
        if "step" not in entry or "train_runtime" in entry:
            continue
        for name, value in entry.items():
            title = _title(name)
            if title is None or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            chart = found.setdefault(title, Chart(title, smooth=title in ("loss", "grad_norm")))
            chart.series.setdefault(name, []).append((float(entry["step"]), float(value)))
    for title, points in (more or {}).items():
        found[title] = Chart(title, {title: [(float(x), float(y)) for x, y in points]})
    order = {"loss": 0, "learning_rate": 1, "grad_norm": 2}
    kept = [chart for chart in found.values() if any(len(points) > 1 for points in chart.series.values())]
    return sorted(kept, key=lambda chart: order.get(chart.title, 3))


def _title(name: str) -> str | None:
    """Returns the chart a logged name belongs to; None if it is not drawn."""
    if name in _BOOKKEEPING or name.endswith(("_runtime", "preparation_time")):
        return None
    if name.startswith("eval_"):
        if name.endswith("_per_second"):
            return None
        return "loss" if name.endswith("_loss") else name.removeprefix("eval_")
    if name.endswith("_per_second"):
        return "throughput"
    return "memory" if "_mem_" in name else name


def svg(chart: Chart) -> str:
    """Returns the chart as an `<svg>` element; its text takes the colour of the page around it."""
    drawn = {name: [p for p in points if math.isfinite(p[1])] for name, points in chart.series.items()}
    drawn = {name: points for name, points in drawn.items() if points}
    lost = sum(len(points) for points in chart.series.values()) - sum(len(points) for points in drawn.values())
    every = [point for points in drawn.values() for point in points] or [(0.0, 0.0)]
    x_ticks = ticks(min(x for x, _ in every), max(x for x, _ in every))
    y_ticks = ticks(min(y for _, y in every), max(y for _, y in every))
    low_x = min(x for x, _ in every)
    high_x = max(*(x for x, _ in every), low_x + 1e-9)
    low_y, high_y = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - low_x) / (high_x - low_x)
        up = (y - low_y) / (high_y - low_y)
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{html.escape(chart.title)}" font-family="system-ui, sans-serif" font-size="11" '
        'fill="currentColor">'
    ]
    for y in y_ticks:
        top = place(low_x, y)[1]
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{top:.1f}" y2="{top:.1f}" stroke="currentColor" '
            f'stroke-opacity=".12"/><text x="{_LEFT - 8}" y="{top + 4:.1f}" text-anchor="end">{number(y)}</text>'
        )
    parts += [
        f'<text x="{place(x, low_y)[0]:.1f}" y="{_HEIGHT - _BOTTOM + 17}" text-anchor="middle">{number(x)}</text>'
        for x in x_ticks
        if low_x <= x <= high_x
    ]
    parts.append(
        f'<text x="{(_WIDTH + _LEFT) / 2:.0f}" y="{_HEIGHT - 6}" text-anchor="middle" opacity=".7">step</text>'
    )
    parts.append(f'<text x="{_LEFT}" y="18" font-size="13" font-weight="600">{html.escape(chart.title)}</text>')
    if lost:
        parts.append(f'<text x="{_LEFT + 4}" y="{_TOP + 10}" fill="#c00">{lost} non-finite values not drawn</text>')
    parts += _drawn_series(chart, drawn, place)
    return "".join([*parts, "</svg>"])


def _drawn_series(chart: Chart, drawn: dict[str, Points], place: Any) -> list[str]:
    parts: list[str] = []
    for index, (name, points) in enumerate(drawn.items()):
        color = COLORS[index % len(COLORS)]
        smoothed = running_mean(points) if chart.smooth and len(points) > 40 else None
        parts.append(_line(points, place, color, faint=smoothed is not None))
        if smoothed is not None:
            parts.append(_line(smoothed, place, color))
        if len(points) <= 40:
            for x, y in points:
                across, up = place(x, y)
                parts.append(
                    f'<circle cx="{across:.1f}" cy="{up:.1f}" r="2.6" fill="{color}">'
                    f"<title>{html.escape(name)} {number(y)} at step {number(x)}</title></circle>"
                )
        if len(drawn) == 1 and name == chart.title:
            continue
        left = _WIDTH - _RIGHT - min(128, 420 // len(drawn)) * (len(drawn) - index)
        parts.append(
            f'<rect x="{left}" y="11" width="12" height="4" rx="2" fill="{color}"/>'
            f'<text x="{left + 17}" y="17">{html.escape(name[:17])}</text>'
        )
    return parts


def _line(points: Points, place: Any, color: str, faint: bool = False) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in thin(points)))
    return (
        f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{1 if faint else 1.8}" '
        f'stroke-opacity="{0.3 if faint else 1}" stroke-linejoin="round"/>'
    )


def thin(points: Points, limit: int = _MAX_POINTS) -> Points:
    """Returns at most about `limit` points: of each stretch its lowest and its highest, so spikes stay visible."""
    if len(points) <= limit:
        return points
    size = math.ceil(2 * len(points) / limit)
    kept: Points = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        ends = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def running_mean(points: Points) -> Points:
    """Returns the mean over a window of a twentieth of the points, centred, so that it does not lag behind them.

    >>> running_mean([(0, 1.0), (1, 4.0), (2, 1.0)])
    [(0, 2.5), (1, 2.0), (2, 2.5)]
    """
    reach = max(len(points) // 40, 1)
    smoothed = []
    for index, (x, _) in enumerate(points):
        window = points[max(index - reach, 0) : index + reach + 1]
        smoothed.append((x, sum(y for _, y in window) / len(window)))
    return smoothed


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Returns round numbers that enclose `low` and `high`, two at least.

    >>> ticks(0.3, 2.1)
    [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    """
    if high <= low:
        spread = abs(low) * 0.1 or 1.0
        low, high = low - spread, high + spread
    rough = (high - low) / about
    size = 10.0 ** math.floor(math.log10(rough))
    step = size * next((factor for factor in (1, 2, 2.5, 5) if factor * size >= rough), 10)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12 - math.floor(math.log10(step))) for index in range(first, last + 1)]


def number(value: float) -> str:
    """Returns a short number: `0.001`, `2e-05`, `12,500`, `3.2M`."""
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    if abs(value) >= 1e6:
        return f"{value / 1e6:.4g}M" if abs(value) < 1e9 else f"{value:.3g}"
    return f"{value:.4g}"


def save_plots(
    source: str | os.PathLike[str], output_dir: str | os.PathLike[str] | None = None, format: str = "svg"
) -> list[Path]:
    """Writes one picture per chart of the run in `source` to `output_dir` (`source`/plots); returns their paths.

    Without a curve of two points nothing is written and the list is empty.

    Raises:
        ArgumentError: no run in `source`, an unknown `format`, or `png` without matplotlib.
    """
    if format not in ("svg", "png"):
        raise ArgumentError(f"`format` is {format!r}; choose `svg` or `png`.")
    pictures = charts(read_history(source))
    if not pictures:
        return []
    base = Path(source)
    folder = Path(output_dir) if output_dir is not None else (base if base.is_dir() else base.parent) / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for chart in pictures:
        path = folder / f"{''.join(c if c.isalnum() else '_' for c in chart.title)}.{format}"
        if format == "svg":
            path.write_text(svg(chart).replace("currentColor", "#222"), encoding="utf-8")
        else:
            _save_png(chart, path)
        paths.append(path)
    return paths


def _save_png(chart: Chart, path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ArgumentError("PNG pictures need matplotlib. Run `pip install matplotlib`, or choose `svg`.") from None
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for index, (name, points) in enumerate(chart.series.items()):
        axes.plot(*zip(*points, strict=True), label=name, color=COLORS[index % len(COLORS)])
    axes.set(title=chart.title, xlabel="step")
    axes.grid(alpha=0.2)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
