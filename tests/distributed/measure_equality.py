"""How far two processes are from one: runs `run_equality.py` under `accelerate launch` and compares what it left.

python tests/distributed/measure_equality.py          # every backend: writes equality.json and the README's table
python tests/distributed/measure_equality.py fsdp1    # one anew, the others as they are in equality.json

One process accumulates twice as many micro-batches as each of two. The tests use `launch` and `compare`.
"""

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from launching import run

HERE = Path(__file__).parent
SHIM = {"fsdp_cpu_ram_efficient_loading": "false", "fsdp_sync_module_states": "false"}
# Every file of `accelerate_configs/` for several processes, and the kind of run that it must become.
BACKENDS: dict[str, str] = {
    "ddp": "MULTI_CPU",
    "cpu": "MULTI_CPU",
    "ddp_multi_node": "MULTI_CPU",
    "fsdp1": "FSDP",
    "fsdp2": "FSDP",
    "fsdp2_offload": "FSDP",
    **dict.fromkeys(("zero1", "zero2", "zero3", "zero3_offload"), "DEEPSPEED"),
}
ACCUMULATION = 2
CASES = [
    *("padded", "padding_free", "packed", "tied", "classification", "lora", "lora_classification"),
    *("checkpointing", "lora_checkpointing", "lora_by_name", "classification_by_name"),
]


def launch(backend: str, cases: list[str], out: Path, precision: str = "no") -> None:
    """Runs the cases on two processes as the configuration `backend` says. Raises with the end of its output.

    `one` is a single process without a launcher, `single_gpu` one with it; both accumulate twice as much.
    """
    alone = backend in ("one", "single_gpu")
    payload = {"cases": cases, "backend": backend, "accumulation": ACCUMULATION * (2 if alone else 1)}
    payload["precision"] = precision
    options: dict[str, Any] = {}
    if backend != "one":
        # FSDP1 would send the weights from the first process to the others through a device that is not there.
        flags = {"mixed_precision": precision, **(SHIM if backend == "fsdp1" else {})}
        options = {"config": backend, "flags": flags, "processes": 1 if alone else 2}
    if backend == "ddp_multi_node":
        options["machines"] = 2
    if backend.startswith("zero"):
        options["environment"] = {"DS_ACCELERATOR": "cpu"}
    run(HERE / "run_equality.py", out, json.dumps(payload), timeout=500, **options)


def compare(one: Path, other: Path, backend: str) -> dict[str, float]:
    """Returns the largest differences of one case, after checking what must be the same exactly.

    `losses`, `grad_norms`: over all steps. `evaluation`: over all metrics. `weights`: of the saved model.
    `resumed`: losses and weights of the run that was resumed from a checkpoint.
    """
    expected = json.loads((one / "report.json").read_text())["train"]
    report = json.loads((other / "report.json").read_text())
    weights = read_weights(one / "train" / "model")
    found: dict[str, dict[str, float]] = {}
    for part in ("train", "resume"):
        run = report[part]
        pair = (run, expected)
        stage = re.match(r"zero(\d)", backend)
        assert run["processes"] == (2 if backend in BACKENDS else 1)
        assert run["kind"] == BACKENDS.get(backend, "NO")
        assert run["zero_stage"] == (int(stage[1]) if stage else None)
        assert run["predicted_rows"] == expected["predicted_rows"]
        assert run["eval"].keys() == expected["eval"].keys()
        assert run["eval"].get("eval_num_tokens", 1) >= expected["eval"].get("eval_num_tokens", 1)
        saved = read_weights(other / part / "model")
        assert saved.keys() == weights.keys(), sorted(saved.keys() ^ weights.keys())
        assert {name: (t.dtype, t.shape) for name, t in saved.items()} == {
            name: (t.dtype, t.shape) for name, t in weights.items()
        }
        found[part] = {
            "losses": _largest(run["losses"], expected["losses"]),
            "grad_norms": _largest(run["grad_norms"], expected["grad_norms"]),
            # Tokens include those of rows that only keep the processes in step.
            "evaluation": _largest(
                *([r["eval"][name] for name in r["eval"] if name != "eval_num_tokens"] for r in pair)
            ),
            "weights": max((saved[name] - tensor).abs().max().item() for name, tensor in weights.items()),
        }
    resumed = found["resume"]
    return {**found["train"], "resumed": max(resumed.values())}


def read_weights(folder: Path) -> Any:
    from safetensors.torch import load_file

    adapter = folder / "adapter_model.safetensors"
    return load_file(adapter if adapter.is_file() else folder / "model.safetensors")


def _largest(left: list[float], right: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(left, right, strict=True))


LABELS = {
    "ddp": "DDP",
    "cpu": "DDP, `cpu`",
    "ddp_multi_node": "DDP, 2 machines",
    "fsdp1": "FSDP1",
    "fsdp2": "FSDP2",
    "fsdp2_offload": "FSDP2, offloaded",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
    "zero3_offload": "ZeRO-3, offloaded",
    "padded": "SFT, padded",
    "padding_free": "SFT, padding-free",
    "packed": "SFT, packed",
    "tied": "SFT, tied embeddings",
    "classification": "classification",
    "lora": "SFT, LoRA",
    "lora_classification": "classification, LoRA",
    "checkpointing": "SFT, gradient checkpointing",
    "lora_checkpointing": "SFT, LoRA, gradient checkpointing",
    "lora_by_name": "SFT, LoRA, model loaded by name",
    "classification_by_name": "classification, model loaded by name",
}
README, DETAILS = HERE.parents[1] / "README.md", HERE / "README.md"
MARKS = ("<!-- equality:begin -->\n", "<!-- equality:end -->\n")
Result = dict[str, dict[str, dict[str, float]]]


def summary(result: Result) -> str:
    """Returns the README's sentence: the largest differences over all launches and cases."""
    runs = [case for cases in result.values() for case in cases.values()]
    losses, weights = (max(run[name] for run in runs) for name in ("losses", "weights"))
    return (
        f"Largest difference over {len(result)} launches x {len(runs) // len(result)} cases: {losses:.0e} of the "
        f"losses, {weights:.0e} of the saved weights.\n"
    )


def table(result: Result) -> str:
    """Returns the whole table: for each case and backend the largest difference of losses and of weights."""
    lines = ["| | " + " | ".join(LABELS[backend] for backend in result) + " |", "|---" * (len(result) + 1) + "|"]
    for case in CASES:
        cells = [f"{result[b][case]['losses']:.0e} / {result[b][case]['weights']:.0e}" for b in result]
        lines.append(f"| {LABELS[case]} | " + " | ".join(cells).replace("0e+00", "0") + " |")
    return "\n".join(lines) + "\n"


def between_marks(text: str, content: str) -> str:
    """Returns a README's text with `content` between its marks."""
    before, rest = text.split(MARKS[0])
    return before + MARKS[0] + content + MARKS[1] + rest.split(MARKS[1])[1]


def written(result: Result) -> dict[Path, str]:
    """Returns the two READMEs as they have to be."""
    return {
        README: between_marks(README.read_text(), summary(result)),
        DETAILS: between_marks(DETAILS.read_text(), table(result)),
    }


def main(backends: list[str]) -> None:
    import importlib.metadata

    file = HERE / "equality.json"
    known = json.loads(file.read_text())["two processes"] if backends else {}
    with tempfile.TemporaryDirectory() as folder:
        one = Path(folder) / "one"
        launch("one", CASES, one)
        for backend in backends or BACKENDS:
            out = Path(folder) / backend
            launch(backend, CASES, out)
            known[backend] = {case: compare(one / case, out / case, backend) for case in CASES}
            print(backend, "done", flush=True)
    result = {backend: known[backend] for backend in BACKENDS if backend in known}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate", "deepspeed")}
    content = {"versions": versions, "reference": "one process, accumulation 4", "two processes": result}
    file.write_text(json.dumps(content, indent=1) + "\n")
    for path, text in written(result).items():
        path.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
