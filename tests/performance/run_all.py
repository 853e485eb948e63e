"""Runs a set of benchmarks, draws the results and writes the README's table: what `make bench` does.

    python tests/performance/run_all.py                                  # the set "training"
    python tests/performance/run_all.py --set start
    python tests/performance/run_all.py --only short_chats packed

On two cores "training" (steps and evaluation) takes less than ten minutes, "start" (from the import to the first step,
checkpoints, resuming) thirteen, "growth" four, "galore" three, and "rows" (what needs thousands of rows) an hour.
`--full` runs them all, with more and longer measurements.

Unattended and without a network. A benchmark that fails or takes too long is named at the end (exit status 1); the
others still run.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import machine

HERE = Path(__file__).resolve().parent
# Seconds a fast benchmark may take before it is given up; many times what it takes on two idle cores.
LIMIT_FAST, LIMIT_FULL = 600, 3600
# By set and name of the result: a script of this folder and what it is given.
FAST = "--fast"
SETS: dict[str, dict[str, tuple[str, ...]]] = {
    "training": {
        "short_chats": ("bench_short_chats.py", FAST),
        "packed": ("bench_packed.py", FAST),
        "vocabulary": ("bench_vocabulary.py", FAST),
        "loop_overhead": ("bench_loop_overhead.py", FAST),
        "evaluation": ("bench_evaluation.py", FAST),
    },
    "start": {
        "import": ("bench_import.py", FAST),
        "first_step": ("bench_first_step.py", FAST),
        "prepare_rows": ("bench_prepare_rows.py", FAST),
        "checkpoint": ("bench_checkpoint.py", FAST),
        "resume": ("bench_resume.py", FAST),
    },
    "growth": {"growth": ("bench_growth.py",)},
    "galore": {
        "galore_refresh": ("bench_galore_refresh.py", FAST),
        "galore_refresh_large": ("bench_galore_refresh.py", "--large"),
    },
    "rows": {
        "first_step_50k": ("bench_first_step.py",),
        "prepare_rows_50k": ("bench_prepare_rows.py",),
        "evaluation_2k": ("bench_evaluation.py",),
    },
}
ALL = {name: given for chosen in SETS.values() for name, given in chosen.items()}
# Their long measurements are the set "rows", or have a name of their own.
ALWAYS_FAST = {"first_step", "prepare_rows", "evaluation", "galore_refresh"}


def commands(chosen: str = "training", only: list[str] | None = None, *, full: bool = False) -> dict[str, list[str]]:
    """Returns the command of every benchmark to run, by the name of its result."""
    names = only or (ALL if full else SETS[chosen])
    found = {name: list(ALL[name]) for name in names}
    for name, given in found.items():
        if full and FAST in given and name not in ALWAYS_FAST:
            given.remove(FAST)
    return {name: [sys.executable, str(HERE / script), *given] for name, (script, *given) in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=SETS, default="training", help="what to measure")
    parser.add_argument("--only", nargs="+", choices=ALL, metavar="NAME", help=f"of {', '.join(ALL)}")
    parser.add_argument("--full", action="store_true", help="all, with more and longer measurements: hours")
    options = parser.parse_args()
    results = machine.folder()
    failed: list[str] = []
    started = time.perf_counter()
    # The floors need the machine's peaks: anew in each run, because a machine may change.
    subprocess.run([sys.executable, str(HERE / "machine.py")], check=True)
    for name, command in commands(options.set, options.only, full=options.full).items():
        limit = LIMIT_FAST if FAST in command else LIMIT_FULL
        print(f"==> {name} ({time.perf_counter() - started:.0f} s so far)", flush=True)
        try:
            subprocess.run([*command, "--out", str(results / f"{name}.json")], check=True, timeout=limit)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            failed.append(f"{name}: {error}"[:200])
    for script in ("plot.py", "check_readme.py"):
        extra = ["--write"] if script == "check_readme.py" else []
        if subprocess.run([sys.executable, str(HERE / script), *extra], check=False).returncode:
            failed.append(script)
    print(f"{time.perf_counter() - started:.0f} s in all. Results: {results}")
    print("\n".join(["FAILED:", *failed]) if failed else "All benchmarks ran.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
