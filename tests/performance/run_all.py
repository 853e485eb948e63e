"""Runs every benchmark, draws the results and writes the README's table: what `make bench` does.

    python tests/performance/run_all.py [--full] [--only short_chats packed]
    python tests/performance/run_all.py --only growth galore_refresh_large

The fast set is meant to take ten minutes on two idle cores (an older processor takes twice as long). Not in it, and run
by `--full` or when they are named: the growth curves (four minutes), GaLore's refreshes (two minutes and a half), and
what needs many rows (`first_step_50k`, `prepare_rows_50k`, `evaluation_2k`: a quarter of an hour each on an older
processor).

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
# Measured beside the fast set of the same script, with many rows.
MANY_ROWS = {
    "first_step_50k": "bench_first_step.py",
    "prepare_rows_50k": "bench_prepare_rows.py",
    "evaluation_2k": "bench_evaluation.py",
}
# Measured only when asked for, and by `--full`: script and what it is given.
EXTRA = {
    **{name: (script, []) for name, script in MANY_ROWS.items()},
    "growth": ("bench_growth.py", []),
    "galore_refresh": ("bench_galore_refresh.py", ["--fast"]),
    "galore_refresh_large": ("bench_galore_refresh.py", ["--large"]),
}


def commands(full: bool, only: list[str]) -> dict[str, list[str]]:
    """Returns the command of every benchmark to run, by the name of its result."""
    names = {script.stem.removeprefix("bench_"): script for script in sorted(HERE.glob("bench_*.py"))}
    chosen: dict[str, list[str]] = {}
    for name, script in names.items():
        if name not in EXTRA:
            fast = not full or script.name in MANY_ROWS.values()
            chosen[name] = [sys.executable, str(script), *(["--fast"] if fast else [])]
    for name, (script, given) in EXTRA.items():
        if full or name in only:
            chosen[name] = [sys.executable, str(HERE / script), *given]
    return {name: each for name, each in chosen.items() if not only or any(part in name for part in only)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="more and longer measurements: hours")
    parser.add_argument("--only", nargs="*", default=[], help="parts of the names of the benchmarks to run")
    options = parser.parse_args()
    results = machine.folder()
    failed: list[str] = []
    started = time.perf_counter()
    # The floors need the machine's peaks: anew in each run, because a machine may change.
    subprocess.run([sys.executable, str(HERE / "machine.py")], check=True)
    limit = LIMIT_FULL if options.full or options.only else LIMIT_FAST
    for name, command in commands(options.full, options.only).items():
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
