"""Import time: `from finetune import SFTTrainer, SFTConfig` against TRL's, and `import finetune` alone.

    python tests/performance/bench_import.py --fast --out results/import.json

Every measurement is a fresh interpreter, clocked inside it, with the files in the page cache and compiled.
"""

import subprocess
import sys
from typing import Any

from harness import Bench, Pause

STATEMENTS = {
    "trl": "from trl import SFTTrainer, SFTConfig",
    "transformers": "from transformers import Trainer, TrainingArguments",
    "finetune": "from finetune import SFTTrainer, SFTConfig",
    "import finetune": "import finetune",
    "import torch": "import torch",
}
PROGRAM = "import time; begin = time.perf_counter(); {}; print(time.perf_counter() - begin, time.process_time())"


def work(side: str, settings: dict[str, Any], pause: Pause) -> None:
    while True:
        program = PROGRAM.format(STATEMENTS[side])
        answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        seconds, cpu = answer.stdout.split()[-2:]
        pause({"seconds": float(seconds), "cpu_seconds": float(cpu)})


def main() -> None:
    bench = Bench("import", "Import time", work, __doc__)
    names = [name for name in STATEMENTS if not bench.fast or name in ("trl", "finetune", "import finetune")]
    case = bench.case("import", {name: {} for name in names}, pairs=5 if bench.fast else 11)
    case.ratio("cpu_seconds", "trl")
    if not bench.fast:
        case.ratio("seconds", "transformers")
    case.bar("SFTTrainer and SFTConfig, as a share of TRL's", case.shares("seconds", "trl"), at_most=0.4)
    case.bar("import finetune, seconds", case.values("import finetune", "seconds"), at_most=0.3)
    bench.finish()


if __name__ == "__main__":
    main()
