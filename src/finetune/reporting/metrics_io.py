"""Metrics on the terminal and in files. Bound as methods by the trainer: the first argument is the trainer.

File names and contents are those of transformers: `{split}_results.json`, `all_results.json`, `trainer_state.json`.
"""

import datetime
import json
from pathlib import Path
from typing import Any, Protocol

from finetune.control.state import as_json
from finetune.files import write_atomically


class MetricsOwner(Protocol):
    """What these functions read of a trainer."""

    args: Any
    state: Any

    def is_world_process_zero(self) -> bool: ...


def format_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """Returns the metrics as text for people: sizes in MB, times as h:mm:ss.cc, operations in GF, 4 decimals.

    >>> format_metrics({"train_runtime": 75.5, "train_loss": 0.123456, "train_mem_cpu_alloc_delta": 3 << 20})
    {'train_runtime': '0:01:15.50', 'train_loss': 0.1235, 'train_mem_cpu_alloc_delta': '3MB'}
    """
    shown: dict[str, Any] = {}
    for name, value in metrics.items():
        if "_mem_" in name:
            shown[name] = f"{int(value) >> 20}MB"
        elif "_runtime" in name:
            shown[name] = f"{datetime.timedelta(seconds=int(value))}.{int(abs(value - int(value)) * 100):02d}"
        elif name == "total_flos":
            shown[name] = f"{int(value) >> 30}GF"
        else:
            shown[name] = round(value, 4) if isinstance(value, float) else value
    return shown


def metrics_format(self: MetricsOwner, metrics: dict[str, Any]) -> dict[str, Any]:
    """Returns the metrics as text for people; see `format_metrics`."""
    return format_metrics(metrics)


def log_metrics(self: MetricsOwner, split: str, metrics: dict[str, Any]) -> None:
    """Prints the metrics of a split (`train`, `eval`, `test`), aligned and sorted by name, on the first process.

    With `skip_memory_metrics=False` there are also, in MB, `{stage}_mem_cpu_alloc_delta` (kept by the stage) and
    `{stage}_mem_cpu_peaked_delta` (needed on top for a while), and the same for `gpu`.
    """
    if not self.is_world_process_zero():
        return
    shown = format_metrics(metrics)
    name_width = max((len(name) for name in shown), default=0)
    value_width = max((len(str(value)) for value in shown.values()), default=0)
    print(f"***** {split} metrics *****")
    for name in sorted(shown):
        print(f"  {name: <{name_width}} = {shown[name]!s:>{value_width}}")


def save_metrics(self: MetricsOwner, split: str, metrics: dict[str, Any], combined: bool = True) -> None:
    """Writes `{split}_results.json` and, if `combined`, merges the metrics into `all_results.json`. First process."""
    if not self.is_world_process_zero():
        return
    folder = Path(self.args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / f"{split}_results.json", metrics)
    if combined:
        path = folder / "all_results.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        _write(path, {**known, **metrics})


def save_state(self: MetricsOwner) -> None:
    """Writes `trainer_state.json` into the output folder. First process."""
    if not self.is_world_process_zero():
        return
    folder = Path(self.args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    self.state.save_to_json(folder / "trainer_state.json")


def _write(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON as transformers formats it; the old file stays if the content cannot be written."""
    write_atomically(path, json.dumps(content, indent=4, sort_keys=True, default=as_json))
