"""`report.html`: one file that shows what a run was and how it went, readable offline and without this package."""

import html
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.files import write_atomically
from finetune.reporting.plots import History, charts, number, read_history, svg

_STYLE = """
:root { color-scheme: light dark; --line: #8883; --soft: #8881; --muted: #777; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 2px; } h2 { font-size: 18px; margin: 36px 0 10px; }
.muted { color: var(--muted); } .tiles { display: flex; flex-wrap: wrap; gap: 10px; margin-top: 18px; }
.tile { border: 1px solid var(--line); border-radius: 10px; padding: 9px 16px; min-width: 110px; }
.tile b { display: block; font-size: 20px; font-variant-numeric: tabular-nums; } .tile span { color: var(--muted); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 16px; }
.charts figure { margin: 0; border: 1px solid var(--line); border-radius: 10px; padding: 8px; } svg { width: 100%; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); }
th { color: var(--muted); font-weight: 500; } td { overflow-wrap: anywhere; }
td.text { white-space: pre-wrap; max-width: 420px; } code { font-size: 13px; }
summary { cursor: pointer; margin: 10px 0; color: var(--muted); }
"""

_HIDDEN = "(hidden)"
_SECRET_NAMES = ("hub_token", "push_to_hub_token", "token", "api_key", "password", "secret")


def write_report(
    run_dir: str | os.PathLike[str],
    history: History,
    config: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Writes `run_dir/report.html` and returns its path. The file needs no network and no other file.

    Args:
        history: `state.log_history`.
        config: field -> value, or field -> `{"value": ..., "source": "file" | "flag" | "default" | ...}`. Tokens
            are never written.
        extra: any of `title` and `notes` (text), `results` (name -> value), `data_audit` (rows of a table, or name
            -> value), `memory` (rows), `generations` (rows with `prompt`, `before`, `after` and more), `series` (title
            -> points of (step, value), drawn as further curves), `environment` (name -> value).

    Raises:
        OSError: the folder cannot be written.
    """
    extra = extra or {}
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    title = str(extra.get("title") or folder.resolve().name)
    pictures = "".join(f"<figure>{svg(chart)}</figure>" for chart in charts(history, extra.get("series")))
    sections = [
        f'<div class="tiles">{"".join(_tile(name, text) for name, text in _key_figures(history))}</div>',
        _section("Curves", f'<div class="charts">{pictures}</div>' if pictures else ""),
        _section("Before and after", _rows_table(extra.get("generations"), text=True)),
        _section("Results", _any_table(extra.get("results"))),
        _section("Data", _any_table(extra.get("data_audit"))),
        _section("Memory", _any_table(extra.get("memory"))),
        _section("Configuration", _configuration(config)),
        _section("Environment", _any_table(extra.get("environment"))),
    ]
    notes = f'<p class="muted">{html.escape(str(extra["notes"]))}</p>' if extra.get("notes") else ""
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{html.escape(title)}</h1>{notes}{''.join(sections)}</body></html>\n"
    )
    path = folder / "report.html"
    write_atomically(path, page)
    return path


def report_from_run(run_dir: str | os.PathLike[str], extra: Mapping[str, Any] | None = None) -> Path:
    """Writes the report of a finished or running `output_dir` from its files and returns its path.

    Reads `trainer_state.json` (or the newest checkpoint's), and if present `all_results.json`, `data_audit.json`,
    `memory_usage.json` and `resolved_config.yaml`.

    Raises:
        ArgumentError: `run_dir` holds no `trainer_state.json`.
    """
    folder = Path(run_dir)
    found: dict[str, Any] = {}
    if (folder / "all_results.json").is_file():
        found["results"] = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
    if (folder / "memory_usage.json").is_file():
        from finetune.reporting.run_memory import memory_rows

        found["memory"] = memory_rows(json.loads((folder / "memory_usage.json").read_text(encoding="utf-8")))
    if (folder / "data_audit.json").is_file():
        found["data_audit"] = _audit_rows(json.loads((folder / "data_audit.json").read_text(encoding="utf-8")))
    config: Mapping[str, Any] | None = None
    if (folder / "resolved_config.yaml").is_file():
        import yaml

        config = _fields(yaml.safe_load((folder / "resolved_config.yaml").read_text(encoding="utf-8")))
    return write_report(folder, read_history(folder), config, {**found, **(extra or {})})


def _audit_rows(splits: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns `data_audit.json` as a table with a column per split; unknown counts are left out."""
    names = dict.fromkeys(name for split in splits.values() for name in split if name != "name")
    rows = [
        {"": name.removeprefix("num_").replace("_", " "), **{split: splits[split].get(name) for split in splits}}
        for name in names
    ]
    return [row for row in rows if any(value not in (None, []) for key, value in row.items() if key)]


def _fields(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of `resolved_config.yaml` without the classes over them."""
    fields: dict[str, Any] = {}
    for name, entry in resolved.items():
        is_class = isinstance(entry, Mapping) and "value" not in entry
        fields.update(entry if is_class else {name: entry})
    return fields


def _key_figures(history: History) -> list[tuple[str, str]]:
    """Returns the numbers a reader looks for first."""
    figures: list[tuple[str, str]] = []
    steps = [entry["step"] for entry in history if "step" in entry]
    if steps:
        figures.append(("steps", number(max(steps))))
    for name, label in (("loss", "loss"), ("eval_loss", "eval loss")):
        values = [entry[name] for entry in history if isinstance(entry.get(name), int | float)]
        if values:
            same = len(values) == 1
            figures.append((label, number_or_text(values[0]) + ("" if same else f" → {number_or_text(values[-1])}")))
    total = next((entry for entry in reversed(history) if "train_runtime" in entry), {})
    if "train_runtime" in total:
        figures.append(("runtime", f"{total['train_runtime']:,.1f} s"))
    figures += [
        (f"{unit} per second", number_or_text(total[f"train_{unit}_per_second"]))
        for unit in ("samples", "tokens", "steps")
        if f"train_{unit}_per_second" in total
    ]
    if total.get("total_flos"):
        figures.append(("operations", f"{total['total_flos']:.3g}"))
    return figures


def number_or_text(value: Any) -> str:
    """Returns a value for a table cell: numbers shortened, containers as JSON, the rest as text."""
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return number(value) if math.isfinite(value) else str(value)
    if isinstance(value, dict | list | tuple):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def _tile(name: str, text: str) -> str:
    return f'<div class="tile"><b>{html.escape(text)}</b><span>{html.escape(name)}</span></div>'


def _section(title: str, body: str) -> str:
    return f"<h2>{title}</h2>{body}" if body else ""


def _any_table(content: Any) -> str:
    if isinstance(content, Mapping):
        rows = [{"": name, "value": value} for name, value in content.items()]
        return _rows_table(rows)
    return _rows_table(content)


def _rows_table(rows: Sequence[Mapping[str, Any]] | None, text: bool = False) -> str:
    """Returns a table with the union of the rows' keys as columns, in order of first appearance."""
    if not rows:
        return ""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in columns)
    style = ' class="text"' if text else ""
    body = "".join(
        "<tr>"
        + "".join(f"<td{style}>{html.escape(number_or_text(row[c])) if c in row else ''}</td>" for c in columns)
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _configuration(config: Mapping[str, Any] | None) -> str:
    """Returns what was chosen as a table, and what was left at its default folded below it."""
    rows = [_config_row(name, entry) for name, entry in (config or {}).items()]
    chosen = [row for row in rows if row["source"] != "default"]
    defaults = [row for row in rows if row["source"] == "default"]
    folded = (
        f"<details><summary>{len(defaults)} defaults</summary>{_rows_table(defaults)}</details>" if defaults else ""
    )
    return _rows_table(chosen) + folded


def _config_row(name: str, entry: Any) -> dict[str, Any]:
    if isinstance(entry, Mapping) and "value" in entry and set(entry) <= {"value", "source", "from"}:
        value, source = entry["value"], str(entry.get("source", entry.get("from", "")))
    else:
        value, source = entry, ""
    return {"field": name, "value": _hide_secret(name, value), "source": source}


def _hide_secret(name: str, value: Any) -> Any:
    is_secret = name.lower() in _SECRET_NAMES or (isinstance(value, str) and value.startswith("hf_"))
    return _HIDDEN if is_secret and value else value
