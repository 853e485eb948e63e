"""What a result says about its machine: versions, hardware, threads, how busy it was, and its measured peaks.

    python tests/performance/machine.py

Results of one kind of machine lie in one folder, `results/<processor>_<its widest arithmetic>/`, its peaks among them.
The peaks are those of this machine with this torch, best of several tries: products of square matrices in float32 and
bfloat16, and copying memory that is already mapped. A floor is made of them: operations over GFLOP/s plus bytes over
GB/s, the time below which no program that does these operations can come.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PACKAGES = ["finetune", "torch", "transformers", "trl", "accelerate", "datasets", "tokenizers", "peft", "galore-torch"]
THREAD_SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TOKENIZERS_PARALLELISM")


def environment() -> dict[str, Any]:
    """Returns versions, hardware, thread counts and the load averages (1, 5, 15 minutes) before anything ran."""
    threads: dict[str, Any] = {name: os.environ.get(name, "unset") for name in THREAD_SETTINGS}
    threads["cores this process may use"] = len(os.sched_getaffinity(0))
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "threads": threads,
        "load": load(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def load() -> list[float]:
    """Returns the load averages of the last 1, 5 and 15 minutes."""
    return [round(each, 2) for each in os.getloadavg()]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    """Returns name, widest arithmetic and number of cores: "AMD EPYC (avx2) x 2"."""
    name, cores = platform.processor() or platform.machine(), os.cpu_count()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        name, cores = (names[0], len(names)) if names else (name, cores)
    return f"{name} ({arithmetic()}) x {cores}"


# What decides the speed of products, widest first: as /proc/cpuinfo calls it.
_ARITHMETIC = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "sve", "asimd")


def arithmetic() -> str:
    """Returns the widest arithmetic of this processor that matters here; "plain" where nothing is known of it."""
    try:
        with open("/proc/cpuinfo") as file:
            lines = [line for line in file if line.lower().startswith(("flags", "features"))]
    except OSError:
        lines = []
    flags = set(lines[0].split(":", 1)[1].split()) if lines else set()
    return next((each for each in _ARITHMETIC if each in flags), "plain")


def has_bfloat16() -> bool:
    """Returns whether torch has fast bfloat16 products for this processor: without, a step takes minutes."""
    return arithmetic() not in ("avx2", "plain")


def folder() -> Path:
    """Returns where results of this kind of machine lie: `results/amd_epyc_avx2`."""
    name = _processor().rsplit(" x ", 1)[0].lower()
    return RESULTS / "_".join("".join(letter if letter.isalnum() else " " for letter in name).split())


class Others:
    """How many cores other programs kept busy while a benchmark ran.

    The load average counts the benchmark too; this is the machine's busy time less that of this process and its
    children. On an idle machine it is near 0; 1.0 means that others kept one core busy all the time.
    """

    def __init__(self) -> None:
        self.begin = (time.perf_counter(), self._busy(), self._own())

    def busy_cores(self) -> float | None:
        """Returns the cores that others kept busy since the beginning; None where the system does not say."""
        then, busy, own = self.begin
        now_busy = self._busy()
        if busy is None or now_busy is None:
            return None
        seconds = max(time.perf_counter() - then, 1e-6)
        return round(max(0.0, (now_busy - busy) - (self._own() - own)) / seconds, 3)

    @staticmethod
    def _busy() -> float | None:
        try:
            with open("/proc/stat") as file:
                fields = [int(each) for each in file.readline().split()[1:9]]
        except (OSError, ValueError):
            return None
        user, nice, system, _, _, irq, softirq, steal = fields
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")

    @staticmethod
    def _own() -> float:
        both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(each.ru_utime + each.ru_stime for each in both)


# ---- Peaks and floors ----


def measure_peaks(size: int = 2048, copied_mib: int = 256, repeats: int = 5) -> dict[str, Any]:
    """Returns `float32_gflops`, `bfloat16_gflops` and `gb_per_second` (read plus written) of this machine."""
    import torch

    peaks: dict[str, Any] = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    # Where bfloat16 is computed number by number, the large product takes a minute, and a small one says the same.
    slow = min(size, 256) if not has_bfloat16() else size
    for name, dtype, width in (("float32", torch.float32, size), ("bfloat16", torch.bfloat16, slow)):
        left, right = (torch.randn(width, width).to(dtype) for _ in range(2))
        seconds = _fastest(lambda left=left, right=right: left @ right, repeats)
        peaks[f"{name}_gflops"] = 2 * width**3 / seconds / 1e9
    source = torch.ones(copied_mib * 2**18)
    target = torch.zeros_like(source)
    peaks["gb_per_second"] = 2 * source.nbytes / _fastest(lambda: target.copy_(source), repeats) / 1e9
    return peaks


def _fastest(action: Callable[[], Any], repeats: int) -> float:
    taken: list[float] = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        action()
        taken.append(time.perf_counter() - begin)
    return min(taken[1:])


def peaks() -> dict[str, Any]:
    """Returns the measured peaks: those kept in `folder()` if they are of this machine, else new ones."""
    path = folder() / "peaks.json"
    if path.exists():
        kept = json.loads(path.read_text())
        if kept.get("processor") == _processor() and kept.get("threads_setting") == os.environ.get("OMP_NUM_THREADS"):
            return kept
    # A process of its own: the harness itself stays without torch and its threads.
    subprocess.run([sys.executable, str(Path(__file__).resolve())], check=True)
    return json.loads(path.read_text())


def floor_seconds(operations: float, moved_bytes: float, dtype: str, measured: dict[str, Any]) -> float:
    """Returns the seconds below which the work cannot come: products at the peak, then bytes at the peak.

    2e9 operations at 100 GFLOP/s and 1e9 bytes at 50 GB/s: 0.02 + 0.02 = 0.04 s.
    """
    return operations / (measured[f"{dtype}_gflops"] * 1e9) + moved_bytes / (measured["gb_per_second"] * 1e9)


def training_work(
    *,
    blocks: float,
    head: float,
    other: float = 0.0,
    layers: int,
    width: int,
    tokens: float,
    supervised: float,
    context: float,
    recomputed: bool,
) -> tuple[float, float]:
    """Returns (operations, bytes) that one float32 AdamW step needs at the least.

    A product of `p` weights takes 2 p operations a token forward and 4 p backward, once more 2 p where the blocks are
    recomputed; the head only the supervised tokens; causal attention half of 12 x layers x width x context a token.
    AdamW reads weights, gradients and two moments and writes all but the gradients (28 bytes a weight); the gradient
    was written once (4). Activations, clipping and the embedding's zeros are not counted: a floor, not an estimate.

    Args:
        blocks: weights in the blocks' products.
        head: weights of the head (tied with the embedding: counted once).
        other: further weights that only the optimizer touches.
        context: mean number of tokens that a token's row has, weighted by tokens.

    For 10 tokens, all supervised, blocks and head of 100 weights each, no attention: 6 x 10 x 200 = 12,000 operations
    and 32 x 200 = 6,400 bytes.
    """
    passes = 8 if recomputed else 6
    products = passes * tokens * blocks + 6 * supervised * head
    attention = (passes / 6) * 12 * layers * width * context / 2 * tokens
    return products + attention, 32 * (blocks + head + other)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=folder() / "peaks.json")
    options = parser.parse_args()
    found = {
        **measure_peaks(),
        "processor": _processor(),
        "threads_setting": os.environ.get("OMP_NUM_THREADS"),
        "load": load(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }
    found = {key: float(f"{each:.6g}") if isinstance(each, float) else each for key, each in found.items()}
    print(json.dumps(found))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
