"""Run every benchmark of this folder, one after the other, and keep what they measured: `make bench`.

Each `bench_*.py` is a program of its own that takes `--json FILE`; results go to `tests/performance/results/`.
"""

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def main() -> int:
    """Returns 0 when all benchmarks ran."""
    results = FOLDER / "results"
    results.mkdir(exist_ok=True)
    failed = []
    for program in sorted(FOLDER.glob("bench_*.py")):
        print(f"== {program.name}", flush=True)
        target = results / f"{program.stem}.json"
        if subprocess.run([sys.executable, str(program), "--json", str(target)], check=False).returncode:
            failed.append(program.name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
