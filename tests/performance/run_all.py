"""Runs every benchmark, draws the results and writes the README's table: what `make bench` does.

    python tests/performance/run_all.py [--full] [--only short_chats packed]

Unattended and without a network. A benchmark that fails or takes too long is named at the end (exit status 1); the
others still run.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
# Seconds a fast benchmark may take before it is given up; many times what it takes on two idle cores.
LIMIT_FAST, LIMIT_FULL = 240, 3600


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="more and longer measurements: about an hour")
    parser.add_argument("--only", nargs="*", default=[], help="parts of the names of the benchmarks to run")
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    failed: list[str] = []
    started = time.perf_counter()
    for script in sorted(HERE.glob("bench_*.py")):
        name = script.stem.removeprefix("bench_")
        if options.only and not any(part in name for part in options.only):
            continue
        print(f"==> {name} ({time.perf_counter() - started:.0f} s so far)", flush=True)
        command = [sys.executable, str(script), "--out", str(RESULTS / f"{name}.json")]
        try:
            limit = LIMIT_FULL if options.full else LIMIT_FAST
            subprocess.run(command + ([] if options.full else ["--fast"]), check=True, timeout=limit)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            failed.append(f"{name}: {error}"[:200])
    for script in ("plot.py", "check_readme.py"):
        extra = ["--write"] if script == "check_readme.py" else []
        if subprocess.run([sys.executable, str(HERE / script), *extra], check=False).returncode:
            failed.append(script)
    print(f"{time.perf_counter() - started:.0f} s in all. Results: {RESULTS}")
    print("\n".join(["FAILED:", *failed]) if failed else "All benchmarks ran.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
