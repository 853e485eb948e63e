"""The comparison on a GPU: TRL and finetune on random Gemma-2B- and Llama-1B-shaped models in bf16, one call.

    python tests/performance/gpu_suite.py --out results/gpu.json            # an H100-class GPU, under 10 minutes
    python tests/performance/gpu_suite.py --dry-run                         # a tiny model on the CPU, to check the code

Every run is a process of its own: it says tokens/s, model FLOP utilisation, peak memory by torch's allocator, seconds
to the first step and the loss. Runs go from the most to the least telling, and stop when the time is up; what was left
out is named. MFU counts 6 operations per token and parameter (4 for LoRA, whose frozen weights get no gradient) plus
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

from harness import environment, rounded
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
    ("GaLore", "llama-1b", ("trl",), 2048, 4, {"packing": True, **GALORE}),
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
    parameters = sum(each.numel() for each in model.parameters())
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
    # Full fine-tuning keeps float32 master weights in AdamW through autocast; LoRA's frozen weights are bf16.
    model = make_model(shape, torch.bfloat16, device)
    rows = token_rows(order["rows"], vocab_size=shape["vocab_size"], prompt_share=0.3)
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


def run_all(options: argparse.Namespace) -> dict[str, Any]:
    """Runs everything that fits in the time; returns what the JSON holds."""
    started = time.perf_counter()
    cases: list[dict[str, Any]] = []
    left_out: list[str] = []
    for name, model, sides, length, batch, args in RUNS:
        case: dict[str, Any] = {"case": f"{model}, {name}", "length": length, "batch": batch, "sides": {}}
        for side in sides:
            if time.perf_counter() - started > options.minutes * 60:
                left_out.append(f"{case['case']}: {side}")
                continue
            order = {
                "side": side,
                "model": model,
                "length": min(length, 128) if options.dry_run else length,
                "batch": batch,
                "options": {key: value for key, value in args.items() if not (options.dry_run and "compile" in key)},
                "rows": 200 if options.dry_run else 4000,
                "steps": 3 if options.dry_run else 12,
                "dry": options.dry_run,
                "peak_tflops": options.peak_tflops,
            }
            case["sides"][side] = _in_process(order)
            print(case["case"], side, json.dumps(rounded(case["sides"][side])), flush=True)
        _compare(case)
        cases.append(case)
    gpu = "none" if options.dry_run else _gpu_name()
    return {"gpu": gpu, "environment": environment(), "cases": cases, "left_out": left_out}


def _compare(case: dict[str, Any]) -> None:
    """Adds ours / theirs where both ran: tokens/s, and peak memory as a share."""
    sides = case["sides"]
    if all("seconds" in sides.get(side, {}) for side in ("trl", "finetune")):
        theirs, ours = sides["trl"], sides["finetune"]
        case["speedup"] = ours["tokens_per_second"] / theirs["tokens_per_second"]
        if theirs["peak_mib"]:
            case["peak_share"] = ours["peak_mib"] / theirs["peak_mib"]


def _in_process(order: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).resolve()), "--one", json.dumps(order)]
    environment_ = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        answer = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=180,
            env=environment_,
            cwd=Path(__file__).parent,
        )
    except subprocess.TimeoutExpired:
        return {"error": "more than 180 s"}
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
    parser.add_argument("--minutes", type=float, default=9.0, help="no new run begins later")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="dense bf16 peak; 989 for an H100 or H200")
    parser.add_argument("--only", nargs="*", default=[], help="parts of the names of the runs")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print("RESULT " + json.dumps(one_run(json.loads(options.one))))
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
