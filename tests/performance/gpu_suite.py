"""The comparison on a GPU: TRL and finetune on random Gemma-2B- and Llama-1B-shaped models in bf16, one call.

    python tests/performance/gpu_suite.py --out results/gpu.json            # an H100-class GPU, under 10 minutes
    python tests/performance/gpu_suite.py --dry-run                         # a tiny model on the CPU, to check the code

Every run is a process of its own: it says tokens/s, model FLOP utilisation, peak memory by torch's allocator, seconds
to the first step and the loss; one more compares a refresh of GaLore's basis. Runs go from the most to the least
telling, and stop when the time is up; what was left out is named. `bars` holds the goals; one that was not measured is
null, and TRL's best is the fastest of its packed runs on the same model up to length 2048. MFU counts 6 operations per
token and parameter (4 for LoRA, whose frozen weights get no gradient), the head only for the supervised 70 %, plus
causal attention within the samples, over the peak given with `--peak-tflops`; recomputation is not counted.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import bench_galore_refresh
from harness import rounded
from machine import environment
from training import classes
from workloads import token_rows, tokenizer

MODELS: dict[str, dict[str, Any]] = {
    "gemma-2b": {
        "type": "gemma",
        "vocab_size": 256_000,
        "hidden_size": 2048,
        "intermediate_size": 16_384,
        "num_hidden_layers": 18,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
    },
    "llama-1b": {
        "type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "type": "llama",
        "vocab_size": 9000,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
PROMPT_SHARE = 0.3
GALORE = {"optim": "galore_adamw", "optim_target_modules": "all-linear", "optim_args": "rank=128,update_proj_gap=200"}
# What is run, the most telling first: (name, model, sides, length, batch, arguments).
RUNS: list[tuple[str, str, tuple[str, ...], int, int, dict[str, Any]]] = [
    ("packed", "llama-1b", ("trl", "finetune"), 2048, 8, {"packing": True}),
    ("packed, no checkpointing", "llama-1b", ("trl", "finetune"), 2048, 4, {"packing": True, "checkpointing": False}),
    ("packed", "gemma-2b", ("trl", "finetune"), 2048, 4, {"packing": True}),
    ("padded against padding-free", "llama-1b", ("trl", "finetune"), 2048, 8, {}),
    ("LoRA, packed", "gemma-2b", ("trl", "finetune"), 2048, 4, {"packing": True, "lora": True}),
    ("packed, 8192", "llama-1b", ("trl", "finetune"), 8192, 2, {"packing": True}),
    ("GaLore", "llama-1b", ("finetune",), 2048, 4, {"packing": True, **GALORE}),
    ("GaLore layerwise", "llama-1b", ("finetune",), 2048, 4, {"packing": True, **GALORE, "layerwise": True}),
    ("packed, Liger", "llama-1b", ("trl", "finetune"), 2048, 8, {"packing": True, "use_liger_kernel": True}),
    ("packed, compiled", "llama-1b", ("trl", "finetune"), 2048, 8, {"packing": True, "torch_compile": True}),
    # Before TRL's GaLore, whose exact decompositions may use up the time that is left.
    ("GaLore refresh", "gemma-2b", ("both",), 0, 0, {}),
    ("packed, 4096", "llama-1b", ("trl", "finetune"), 4096, 4, {"packing": True}),
    ("GaLore, TRL", "llama-1b", ("trl",), 2048, 4, {"packing": True, **GALORE}),
]


def make_model(shape: dict[str, Any], dtype: Any, device: str) -> Any:
    """Returns a model with random weights, made on the device."""
    import torch
    from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig

    settings: dict[str, Any] = {key: value for key, value in shape.items() if key != "type"}
    extra: dict[str, Any] = {"max_position_embeddings": 16_384, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = (GemmaConfig if shape["type"] == "gemma" else LlamaConfig)(**settings, **extra, tie_word_embeddings=True)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def flops_per_token(model: Any, length: int, trains_all: bool) -> float:
    """Returns the operations of one token, forward and backward, recomputation not counted."""
    config = model.config
    # The tied head works for the supervised tokens only.
    head = config.vocab_size * config.hidden_size
    parameters = sum(each.numel() for each in model.parameters()) - PROMPT_SHARE * head
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * length
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # Causal attention computes half of the square.
    return (6 if trains_all else 4) * parameters + attention * width / 2


def one_run(order: dict[str, Any]) -> dict[str, Any]:
    """Trains one side for a few steps and returns what it measured."""
    import torch
    from transformers import TrainerCallback

    begin, side, dry = time.perf_counter(), order["side"], order["dry"]
    options, length, batch = dict(order["options"]), order["length"], order["batch"]
    checkpointing, lora, layerwise = (options.pop(key, default) for key, default in
                                      (("checkpointing", True), ("lora", False), ("layerwise", False)))  # fmt: skip
    device = "cpu" if dry else "cuda"
    shape = MODELS["tiny" if dry else order["model"]]
    # Weights in bf16 on both sides: what a checkpoint in bf16 is when neither is asked for anything else.
    model = make_model(shape, torch.bfloat16, device)
    rows = token_rows(order["rows"], vocab_size=shape["vocab_size"], prompt_share=PROMPT_SHARE)
    if layerwise:
        options["optim"] = "galore_adamw_layerwise"
    trainer_class, config_class = classes(side)
    args = config_class(
        tempfile.mkdtemp(prefix="bench_gpu_"),
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=dry,
        bf16=True,
        seed=1,
        max_steps=order["steps"],
        logging_steps=order["steps"],
        per_device_train_batch_size=batch,
        max_length=length,
        gradient_checkpointing=checkpointing,
        completion_only_loss=True,
        **options,
    )
    peft = None
    if lora:
        from peft import LoraConfig

        peft = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not dry:
                torch.cuda.synchronize()
            times.append(time.perf_counter())

    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=rows,
        processing_class=tokenizer(shape["vocab_size"]),
        peft_config=peft,
        callbacks=[Clock()],
    )
    prepared = time.perf_counter()
    if not dry:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    seconds = statistics.median(b - a for a, b in itertools.pairwise(times[1:]))
    data = trainer.train_dataset
    tokens = batch * sum(len(each) for each in data["input_ids"]) / len(data)
    rate = tokens / seconds
    counted = flops_per_token(model, min(length, 130), not lora)
    return {
        "seconds": seconds,
        "tokens_per_second": rate,
        "mfu": rate * counted / (order["peak_tflops"] * 1e12),
        "peak_mib": 0.0 if dry else torch.cuda.max_memory_allocated() / 2**20,
        "first_step_seconds": times[0] - prepared,
        "preparation_seconds": prepared - begin,
        "losses": [each["loss"] for each in trainer.state.log_history if "loss" in each],
    }


def refresh(order: dict[str, Any]) -> dict[str, Any]:
    """Returns seconds of one basis refresh, ours and galore_torch's, for the largest matrix of a Gemma-2B."""
    rows, columns, rank = (32, 64, 4) if order["dry"] else (2048, 16_384, 128)
    device = "cpu" if order["dry"] else "cuda"
    first, fresh = (bench_galore_refresh.synthetic(rows, columns, 0.75, seed).to(device) for seed in (0, 1))
    return bench_galore_refresh.compare(first, 0.8 * first + 0.2 * fresh, rank, 3, True)


def run_all(options: argparse.Namespace) -> dict[str, Any]:
    """Runs everything that fits in the time; returns what the JSON holds."""
    started = time.perf_counter()
    cases: list[dict[str, Any]] = []
    left_out: list[str] = []
    for name, model, sides, length, batch, args in RUNS:
        case: dict[str, Any] = {"case": f"{model}, {name}", "length": length, "batch": batch, "sides": {}}
        for side in sides:
            left = options.minutes * 60 - (time.perf_counter() - started)
            if left < 0 and not options.dry_run:
                left_out.append(f"{case['case']}: {side}")
                continue
            order = {
                "side": side,
                "model": model,
                "length": min(length, 128) if options.dry_run else length,
                "batch": min(batch, 2) if options.dry_run else batch,
                "options": args,
                "rows": 60 if options.dry_run else 4000,
                "steps": 3 if options.dry_run else 12,
                "dry": options.dry_run,
                "peak_tflops": options.peak_tflops,
            }
            # Whatever begins in time ends within the ten minutes of one call.
            case["sides"][side] = _here(order) if options.dry_run else _in_process(order, min(180.0, left + 45))
            print(case["case"], side, json.dumps(rounded(case["sides"][side])), flush=True)
        _compare(case)
        cases.append(case)
    gpu = "none" if options.dry_run else _gpu_name()
    return {"gpu": gpu, "environment": environment(), "bars": bars(cases), "cases": cases, "left_out": left_out}


def bars(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the goals, each with its figure and whether it is met; both None where it was not measured."""
    by_name = {case["case"]: case for case in cases}

    def best(model: str, side: str, metric: str) -> float | None:
        packed = (
            each["sides"].get(side, {}).get(metric)
            for name, each in by_name.items()
            if name.startswith(f"{model}, packed") and each["length"] <= 2048
        )
        return max((each for each in packed if each), default=None)

    def side(name: str, which: str) -> dict[str, Any]:
        return by_name.get(name, {}).get("sides", {}).get(which, {})

    found: list[dict[str, Any]] = []

    def bar(text: str, value: float | None, *, at_least: float | None = None, at_most: float | None = None) -> None:
        met = None
        if value is not None and (at_least is not None or at_most is not None):
            met = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
        found.append({"text": text, "value": value, "at_least": at_least, "at_most": at_most, "met": met})

    for model in ("llama-1b", "gemma-2b"):
        theirs, ours = (best(model, each, "tokens_per_second") for each in ("trl", "finetune"))
        bar(f"{model}: tokens/s against TRL's best", ours / theirs if ours and theirs else None, at_least=1.5)
        bar(f"{model}: MFU of the packed full fine-tune", best(model, "finetune", "mfu"), at_least=0.5)
    for name, model, sides, *_ in RUNS:
        if {"trl", "finetune"} <= set(sides):
            share = by_name.get(f"{model}, {name}", {}).get("peak_share")
            bar(f"{model}, {name}: peak memory as a share of TRL's", share, at_most=0.6)
    started = side("llama-1b, GaLore", "finetune").get("first_step_seconds")
    bar("llama-1b, GaLore: seconds to the first step", started, at_most=10.0)
    whole, layered = (
        side(name, "finetune").get("peak_mib") for name in ("llama-1b, GaLore", "llama-1b, GaLore layerwise")
    )
    bar(
        "llama-1b, GaLore: layerwise peak as a share of the ordinary one",
        layered / whole if layered and whole else None,
    )
    speedup = side("gemma-2b, GaLore refresh", "both").get("warm_speedup")
    bar("GaLore refresh, 2048 x 16384, rank 128, against galore-torch", speedup, at_least=50.0)
    return found


def _compare(case: dict[str, Any]) -> None:
    """Adds ours / theirs where both ran: tokens/s, and peak memory as a share."""
    sides = case["sides"]
    if all("seconds" in sides.get(side, {}) for side in ("trl", "finetune")):
        theirs, ours = sides["trl"], sides["finetune"]
        case["speedup"] = ours["tokens_per_second"] / theirs["tokens_per_second"]
        if theirs["peak_mib"]:
            case["peak_share"] = ours["peak_mib"] / theirs["peak_mib"]


def _here(order: dict[str, Any]) -> dict[str, Any]:
    """Runs in this process: imports are most of a tiny run's time. Without Triton and a compiler, which need a GPU."""
    gpu_only = ("use_liger_kernel", "torch_compile")
    order = {**order, "options": {key: value for key, value in order["options"].items() if key not in gpu_only}}
    try:
        return (refresh if order["side"] == "both" else one_run)(json.loads(json.dumps(order)))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[-600:]}


def _in_process(order: dict[str, Any], limit: float) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).resolve()), "--one", json.dumps(order)]
    environment_ = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        answer = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=limit,
            env=environment_,
            cwd=Path(__file__).parent,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"more than {limit:.0f} s"}
    lines = [line for line in answer.stdout.splitlines() if line.startswith("RESULT ")]
    if answer.returncode or not lines:
        return {"error": answer.stderr.strip()[-600:]}
    return json.loads(lines[-1].removeprefix("RESULT "))


def _gpu_name() -> str:
    import torch

    return torch.cuda.get_device_name()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--minutes", type=float, default=8.5, help="no new run begins later")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="dense bf16 peak; 989 for an H100 or H200")
    parser.add_argument("--only", nargs="*", default=[], help="parts of the names of the runs")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        order = json.loads(options.one)
        print("RESULT " + json.dumps((refresh if order["side"] == "both" else one_run)(order)))
        return 0
    if options.only:
        RUNS[:] = [each for each in RUNS if any(part in f"{each[1]}, {each[0]}" for part in options.only)]
    result = run_all(options)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(rounded(result), indent=1) + "\n")
    failed = [case["case"] for case in result["cases"] for side in case["sides"].values() if "error" in side]
    print("left out:", result["left_out"], "failed:", failed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
