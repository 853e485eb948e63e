"""Measures the incumbent and finetune side by side: alternating, each in a process of its own.

A benchmark script holds one function that works for one side, and calls `pause` whenever a measurement is ready:

    def work(side: str, settings: dict[str, Any], pause: Pause) -> None:
        model = ...
        while True:
            pause(clocked(lambda: train_some_steps(model)))

    def main() -> None:
        bench = Bench("short_chats", "Short chats", work, __doc__, load_library)
        case = bench.case("float32", {"trl": {...}, "finetune": {...}}, pairs=5)
        case.bar("speed", against="trl", at_least=3.0)
        bench.finish()

Each side runs in its own process, which waits while the other side measures (A B A B ...): memory, allocator settings
and patches of one library do not reach the other. All sides import what they need (`imports`) at the same time; from
then on only one works at a time. The first round warms up and is dropped. A ratio is that of the two measurements of
one round, so a slow minute of the machine hits both; reported are the median of these ratios, their smallest, largest
and quartiles. Ratios are always incumbent / finetune: 3.0 means that finetune takes a third.

The result of a script is one JSON file: versions, hardware, threads, how busy the machine was, settings, every single
measurement, the bars, and for a bar that was missed the floor that the machine's measured peaks set.
"""

import argparse
import contextlib
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import machine

Measure = dict[str, Any]
Pause = Callable[[Measure], None]
Work = Callable[[str, dict[str, Any], Pause], None]
Imports = Callable[[str], Any]

HERE = Path(__file__).resolve().parent
OURS = "finetune"


# ---- Arithmetic ----


def summary(values: Iterable[float]) -> dict[str, float]:
    """Returns median, extremes and quartiles. For 1, 2, 4: median 2, min 1, max 4, q1 1.5, q3 3."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("nothing was measured")
    return {
        "median": statistics.median(ordered),
        "min": ordered[0],
        "max": ordered[-1],
        "q1": _quantile(ordered, 0.25),
        "q3": _quantile(ordered, 0.75),
    }


def _quantile(ordered: list[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def ratios(rounds: list[dict[str, Measure]], metric: str, other: str, ours: str = OURS) -> list[float]:
    """Returns `other / ours` of each round. Rounds {a: 6, b: 2} and {a: 8, b: 4} give 3.0 and 2.0, not 14 / 6."""
    return [each[other][metric] / each[ours][metric] for each in rounds]


def difference(left: list[float], right: list[float]) -> float:
    """Returns the largest relative difference of two lists of losses; infinite if one of them is longer, or is NaN."""
    if len(left) != len(right):
        return float("inf")
    if any(math.isnan(each) for each in (*left, *right)):
        return float("inf")
    pairs = zip(left, right, strict=True)
    return max((abs(a - b) / max(abs(a), abs(b), 1e-12) for a, b in pairs), default=0.0)


# ---- One side, in its own process ----


def clock() -> tuple[float, float, int]:
    """Returns now: seconds, processor seconds and page faults of this process."""
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    return time.perf_counter(), time.process_time(), faults


def since(begin: tuple[float, float, int]) -> Measure:
    """Returns the measurement from `begin`, a value of `clock`, to now."""
    names = ("seconds", "cpu_seconds", "page_faults")
    return {name: now - then for name, then, now in zip(names, begin, clock(), strict=True)}


def clocked(action: Callable[[], Any]) -> Measure:
    """Returns the measurement of `action()`; a dictionary that it returns is added."""
    begin = clock()
    result = action()
    measured = since(begin)
    return {**measured, **(result if isinstance(result, dict) else {})}


def resident_mib(field: str = "VmRSS") -> float:
    """Returns this process's resident memory in MiB; `VmHWM` is the highest so far."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(field + ":"):
                return int(line.split()[1]) / 1024
    return float("nan")


def reset_peak() -> None:
    """Sets `VmHWM` back to the present resident memory, so that the next measurement has a peak of its own.

    Where the kernel does not allow it the peak stays that of the whole process.
    """
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


class _Done(Exception):
    """The harness wants no more measurements."""


def serve(work: Work, request: str, imports: Imports | None = None) -> None:
    """Runs one side: imports, then waits for a line on stdin before each measurement; answers on the original stdout.

    What the libraries print goes to stderr, which the harness keeps in a file.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    order = json.loads(request)
    waiting = sys.stdin

    def wait() -> None:
        if waiting.readline().strip() != "go":
            raise _Done

    def pause(measure: Measure) -> None:
        answers.write(json.dumps(measure) + "\n")
        answers.flush()
        wait()

    try:
        if imports is not None:
            imports(order["side"])
        pause({"ready": True})
        work(order["side"], order["settings"], pause)
    except _Done:
        pass
    # Threads and loaders of a half-finished run must not keep the process alive.
    answers.flush()
    os._exit(0)


class Worker:
    """The process of one side. `ask` returns its next measurement."""

    def __init__(self, script: Path, side: str, settings: dict[str, Any], log: Path) -> None:
        self.side, self.log = side, log
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        environment.setdefault("TOKENIZERS_PARALLELISM", "false")
        for name, value in settings.get("env", {}).items():
            if value is None:
                environment.pop(name, None)
            else:
                environment[name] = value
        # Whatever a side leaves behind goes with it.
        self.scratch = environment["TMPDIR"] = tempfile.mkdtemp(prefix="finetune_bench_")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(script), "--worker", json.dumps({"side": side, "settings": settings})],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                cwd=HERE,
            )

    def read(self) -> Measure:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            tail = "".join(self.log.read_text().splitlines(keepends=True)[-25:])
            raise RuntimeError(
                f"The side {self.side!r} ended without a measurement (exit {self.process.wait()}):\n{tail}"
            )
        return json.loads(line)

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def ask(self) -> Measure:
        self.go()
        return self.read()

    def close(self) -> None:
        if self.process.poll() is None:
            try:
                assert self.process.stdin is not None
                self.process.stdin.write("stop\n")
                self.process.stdin.close()
                self.process.wait(timeout=20)
            except (OSError, subprocess.TimeoutExpired):
                self.process.kill()
        self.process.wait()
        shutil.rmtree(self.scratch, ignore_errors=True)


def alternate(
    script: Path, sides: dict[str, dict[str, Any]], pairs: int, logs: Path, warmup: int = 1
) -> list[dict[str, Measure]]:
    """Returns `pairs` rounds, each with one measurement per side, after `warmup` rounds that are thrown away.

    Every second round goes through the sides backwards, so that none is always measured right behind the same other.
    """
    workers: list[Worker] = []
    try:
        workers = _started(script, sides, logs)
        return [_round(workers, number) for number in range(warmup + pairs)][warmup:]
    finally:
        for worker in workers:
            worker.close()


def alternate_fresh(
    script: Path, sides: dict[str, dict[str, Any]], pairs: int, logs: Path, warmup: int = 0
) -> list[dict[str, Measure]]:
    """Like `alternate` with new processes in every round, for work that is only slow the first time."""
    rounds: list[dict[str, Measure]] = []
    for number in range(warmup + pairs):
        workers: list[Worker] = []
        try:
            workers = _started(script, sides, logs)
            rounds.append(_round(workers, number))
        finally:
            for worker in workers:
                worker.close()
    return rounds[warmup:]


def _round(workers: list[Worker], number: int) -> dict[str, Measure]:
    """Returns one measurement of each side, in the order of `workers`; odd rounds are measured backwards."""
    measured = {worker.side: worker.ask() for worker in (workers if number % 2 == 0 else workers[::-1])}
    found = {worker.side: measured[worker.side] for worker in workers}
    _say(number, found)
    return found


def _started(script: Path, sides: dict[str, dict[str, Any]], logs: Path) -> list[Worker]:
    # They import side by side, on one thread each. Steps side by side would not be cheaper than in turn: two pools of
    # threads on the same cores wait for each other (2,000 rows of a narrow model: 249 s instead of 12).
    workers = [Worker(script, name, settings, logs / f"{_slug(name)}.log") for name, settings in sides.items()]
    for worker in workers:
        worker.read()
    return workers


def _say(number: int, measured: dict[str, Measure]) -> None:
    print("  round", number, {side: _short(each) for side, each in measured.items()}, file=sys.stderr, flush=True)


def _short(measure: Measure) -> str:
    words = [f"{measure['seconds']:.3f} s" if "seconds" in measure else ""]
    words += [f"cpu {measure['cpu_seconds']:.3f}" if "cpu_seconds" in measure else ""]
    words += [f"faults {measure['page_faults']}" if "page_faults" in measure else ""]
    words += [f"{measure['peak_mib']:.0f} MiB" if "peak_mib" in measure else ""]
    return " ".join(word for word in words if word)


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name.lower()).strip("_")


# ---- A script's cases and its result ----


class Case:
    """One comparison: its rounds, the ratios asked for, and the bars they are held against."""

    def __init__(self, name: str, settings: dict[str, Any], rounds: list[dict[str, Measure]]) -> None:
        self.name, self.rounds = name, rounds
        self.result: dict[str, Any] = {
            "case": name,
            "pairs": len(rounds),
            "settings": settings,
            "sides": {side: self._of_side(side) for side in rounds[0]},
            "ratios": {},
            "checks": {},
            "bars": [],
        }

    def _of_side(self, side: str) -> dict[str, Any]:
        measures = [each[side] for each in self.rounds]
        shared = [key for key in measures[0] if all(key in each for each in measures)]
        numeric = [key for key in shared if isinstance(measures[0][key], int | float)]
        return {
            key: {**summary(each[key] for each in measures), "values": [each[key] for each in measures]}
            for key in numeric
        }

    def ratio(self, metric: str, against: str, ours: str = OURS) -> float:
        """Returns the median ratio `against / ours` of a metric, and keeps it with its spread."""
        return summary(self.ratios(metric, against, ours))["median"]

    def ratios(self, metric: str, against: str, ours: str = OURS) -> list[float]:
        """Returns the ratio `against / ours` of a metric in each round, and keeps them with their spread."""
        values = ratios(self.rounds, metric, against, ours)
        self.result["ratios"][f"{metric}: {against} / {ours}"] = {**summary(values), "values": values}
        return values

    def shares(self, metric: str, against: str, ours: str = OURS) -> list[float]:
        """Returns `ours / against` of each round, for bars that ask for a share; keeps the ratios."""
        return [1 / each for each in self.ratios(metric, against, ours)]

    def values(self, side: str, metric: str) -> list[float]:
        """Returns a side's measurements of a metric, one a round."""
        return [each[side][metric] for each in self.rounds]

    def bar(
        self,
        text: str,
        value: float | list[float],
        *,
        at_least: float | None = None,
        at_most: float | None = None,
        floor: dict[str, Any] | None = None,
    ) -> bool | None:
        """Notes whether `value`, or the median of the values of all rounds, meets the bar; returns it.

        Without `at_least` and `at_most` it is a figure to be told, with no goal: None.
        `floor` says how far one could get: `says`, a sentence, and `best_possible`, the figure at the floor.
        """
        spread = None
        if isinstance(value, list):
            spread, value = summary(value), summary(value)["median"]
        met = None
        if at_least is not None or at_most is not None:
            met = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
        entry: dict[str, Any] = {"text": text, "value": value, "at_least": at_least, "at_most": at_most, "met": met}
        if spread is not None:
            entry["spread"] = {key: spread[key] for key in ("min", "max", "q1", "q3")}
        if floor is not None:
            entry["floor"] = floor
        self.result["bars"].append(entry)
        bound = f">= {at_least}" if at_least is not None else f"<= {at_most}"
        said = "no goal" if met is None else f"bar {bound}: {'met' if met else 'MISSED'}"
        print(f"  {text}: {value:.3g} ({said})", file=sys.stderr, flush=True)
        return met

    def best(self, metric: str, sides: list[str]) -> str:
        """Returns the incumbent with the smallest median of a metric: its best setting."""
        return min(sides, key=lambda side: self.result["sides"][side][metric]["median"])

    def losses_agree(self, tolerance: float, reference: str, ours: str = OURS, key: str = "losses") -> bool:
        """Checks the losses of the last round, which hold those of the whole run."""
        left, right = self.rounds[-1][reference][key], self.rounds[-1][ours][key]
        shared = min(len(left), len(right))
        found = difference(left[:shared], right[:shared]) if shared else float("inf")
        self.result["checks"][f"losses: {reference} and {ours}"] = {
            "largest_relative_difference": found if found != float("inf") else None,
            "tolerance": tolerance,
            "compared": shared,
            "agree": found <= tolerance,
        }
        if found > tolerance:
            print(f"  LOSSES DIFFER: {reference} {left} {ours} {right}", file=sys.stderr, flush=True)
        return found <= tolerance


class Bench:
    """What a `bench_*.py` script runs: reads the options, runs cases, writes the JSON."""

    def __init__(
        self, name: str, title: str, work: Work, doc: str | None = None, imports: Imports | None = None
    ) -> None:
        parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--fast", action="store_true", help="fewer and shorter measurements")
        parser.add_argument("--pairs", type=int, help="rounds per case")
        parser.add_argument("--only", nargs="*", default=[], help="parts of the names of the cases to run")
        parser.add_argument("--out", type=Path, help="where the JSON goes")
        parser.add_argument("--worker", help=argparse.SUPPRESS)
        self.options = parser.parse_args()
        if self.options.worker:
            serve(work, self.options.worker, imports)
        self.name, self.title = name, title
        self.script = Path(sys.argv[0]).resolve()
        self.fast: bool = self.options.fast
        self.cases: list[Case] = []
        self.environment = machine.environment()
        self.others = machine.Others()
        self.left_out: dict[str, str] = {}
        self.started = time.perf_counter()

    def wanted(self, name: str) -> bool:
        """Returns whether `--only` leaves this case in, and the processor can compute in its number format."""
        if name == "bf16" and not machine.has_bfloat16():
            self.left_out[name] = "the processor has no bfloat16 arithmetic"
            return False
        return not self.options.only or any(part in name for part in self.options.only)

    def case(
        self,
        name: str,
        sides: dict[str, dict[str, Any]],
        *,
        pairs: int = 5,
        warmup: int = 1,
        settings: dict[str, Any] | None = None,
        fresh: bool = False,
    ) -> Case:
        """Runs one comparison; `fresh` with new processes in every round."""
        print(f"{self.name}: {name}", file=sys.stderr, flush=True)
        logs = HERE / "results" / "logs" / self.name / _slug(name)
        rounds = (alternate_fresh if fresh else alternate)(
            self.script, sides, self.options.pairs or pairs, logs, warmup
        )
        self.cases.append(Case(name, {"shared": settings or {}, "sides": sides}, rounds))
        return self.cases[-1]

    def measured_once(self, side: str, settings: dict[str, Any], warmup: int = 1) -> Measure:
        """Returns one measurement of a side in a process of its own, for what does not vary and for floors."""
        logs = HERE / "results" / "logs" / self.name / "once"
        return alternate(self.script, {side: settings}, 1, logs, warmup)[0][side]

    def finish(self, **extra: Any) -> None:
        """Writes the result; `extra` are further entries of the JSON."""
        busy = {"load_at_end": machine.load(), "cores_busy_with_others": self.others.busy_cores()}
        result = {
            "benchmark": self.name,
            "title": self.title,
            "fast": self.fast,
            "environment": {**self.environment, **busy},
            "seconds_taken": round(time.perf_counter() - self.started, 1),
            "cases": [case.result for case in self.cases],
            "left_out": self.left_out,
            **extra,
        }
        target: Path = self.options.out or machine.folder() / f"{self.name}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(rounded(result), indent=1) + "\n")
        print(f"{target} ({result['seconds_taken']} s)", file=sys.stderr, flush=True)


def rounded(value: Any) -> Any:
    """Returns `value` with floats of 6 significant digits: what a clock can tell, and readable."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    return value
