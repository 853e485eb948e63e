"""Runs every named case in this process (one of a group): trains, evaluates, saves, and resumes from a checkpoint.

accelerate launch --config_file FILE run_equality.py OUT '{"cases": ["padded"], "accumulation": 2, "backend": "ddp"}'

Each case leaves `OUT/<case>/report.json` and the model in `OUT/<case>/model`. `CASES` are the same for every backend;
what differs is how many processes share the work, and how. One group of processes runs all cases, because starting
one takes longer than training these models.
"""

import gc
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fixtures = load(HERE.parent / "conftest.py")

# 21 rows in batches of 2 for 2 processes: the last round of an epoch has one row for one process and none for the
# other, the last window fewer batches than the others. 7 rows leave a short round in evaluation too.
ROWS, EVAL_ROWS, SAVE_STEP = 21, 7, 4
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "num_train_epochs": 2,
    "learning_rate": 1e-3,
    "max_grad_norm": 0.5,
    "weight_decay": 0.1,
    "adam_epsilon": 1e-6,
    "logging_steps": 1,
    "save_steps": SAVE_STEP,
    "report_to": "none",
    "disable_tqdm": True,
    "log_level": "error",
    "seed": 5,
}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": 0.0}
CASES: dict[str, dict[str, Any]] = {
    "padded": {"arguments": {"padding_free": False}},
    "padding_free": {"arguments": {"padding_free": True}},
    "packed": {"arguments": {"packing": True, "max_length": 24}, "rows": 46},
    "packed_by_name": {"arguments": {"packing": True, "max_length": 24}, "rows": 46, "by_name": True},
    "tied": {"arguments": {}, "model": {"tie_word_embeddings": True}},
    "sharded_checkpoints": {"arguments": {}, "environment": {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}},
    "by_name": {"arguments": {}, "by_name": True},
    "lora_by_name": {"arguments": {}, "by_name": True, "lora": True},
    "classification_by_name": {"kind": "classification", "arguments": {}, "by_name": True},
    "classification": {"kind": "classification", "arguments": {"class_weights": "balanced"}},
    "lora": {"arguments": {}, "lora": True},
    "lora_classification": {"kind": "classification", "arguments": {}, "lora": True},
    "checkpointing": {"arguments": {"gradient_checkpointing": True}},
    "lora_checkpointing": {"arguments": {"gradient_checkpointing": True}, "lora": True},
}


def classification_rows(number: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    words = fixtures.WORDS
    rows = []
    for index in range(number):
        length = 2 + int(torch.randint(0, 9, (1,), generator=generator))
        picked = torch.randint(0, len(words), (length,), generator=generator).tolist()
        rows.append({"text": " ".join(words[word] for word in picked), "label": ["bad", "good", "good"][index % 3]})
    return rows


def make_model(case: dict[str, Any]) -> Any:
    """Returns the model of a case, with the same weights in every process."""
    if case.get("kind") != "classification":
        return fixtures.make_tiny_llama(512, **case.get("model", {}))
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    labels = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    return BertForSequenceClassification(
        BertConfig(vocab_size=512, max_position_embeddings=64, **labels, **size, **dropout)
    )


def weights_folder(out: Path) -> Path:
    """Returns where this process saves a model that is then loaded by name."""
    return out / f"weights-{os.environ.get('RANK', '0')}"


def make_trainer(case: dict[str, Any], out: Path, options: dict[str, Any]) -> Any:
    """Returns the trainer of a case: same weights and same rows in every process and for every backend."""
    import finetune

    arguments = {**COMMON, "gradient_accumulation_steps": options["accumulation"], **case["arguments"]}
    arguments["bf16"] = options.get("precision") == "bf16"
    if options["backend"].startswith("zero"):
        arguments["ddp_backend"] = "gloo"
    else:
        arguments["use_cpu"] = True
    lora: Any = None
    tokenizer = fixtures.make_chat_tokenizer()
    if case.get("lora"):
        from peft import LoraConfig

        lora = LoraConfig(**LORA)
    model = str(weights_folder(out.parent)) if case.get("by_name") else make_model(case)
    if case.get("kind") == "classification":
        rows = classification_rows(ROWS + EVAL_ROWS)
        return finetune.SequenceClassificationTrainer(
            model=model,
            args=finetune.SequenceClassificationConfig(str(out), **arguments),
            train_dataset=rows[:ROWS],
            eval_dataset=rows[ROWS:],
            processing_class=tokenizer,
            peft_config=lora,
        )
    number = case.get("rows", ROWS)
    rows = fixtures.make_token_rows(number + EVAL_ROWS, seed=3)
    return finetune.SFTTrainer(
        model=model,
        args=finetune.SFTConfig(str(out), **arguments),
        train_dataset=rows[:number],
        eval_dataset=rows[number:],
        processing_class=tokenizer,
        peft_config=lora,
    )


def run_case(name: str, out: Path, options: dict[str, Any]) -> None:
    import numpy as np
    from accelerate.state import AcceleratorState, GradientState

    case = CASES[name]
    before = dict(os.environ)
    os.environ.update(case.get("environment", {}))
    report: dict[str, Any] = {}
    for part in ("train", "resume"):
        torch.manual_seed(0)
        np.random.seed(0)
        # Each case is a program of its own; the process group stays.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        trainer = make_trainer(case, out / part, options)
        checkpoint = out / "train" / f"checkpoint-{SAVE_STEP}"
        trainer.train(resume_from_checkpoint=None if part == "train" else str(checkpoint))
        metrics = trainer.evaluate()
        trainer.save_model(str(out / part / "model"))
        counted = trainer.predict(trainer.eval_dataset) if case.get("kind") == "classification" else None
        history = trainer.state.log_history
        report[part] = {
            "losses": [entry["loss"] for entry in history if "loss" in entry],
            "grad_norms": [entry["grad_norm"] for entry in history if "grad_norm" in entry],
            "eval": {key: value for key, value in metrics.items() if "_per_second" not in key and "runtime" not in key},
            "predicted_rows": EVAL_ROWS if counted is None else len(counted.predictions),
            "processes": trainer.accelerator.num_processes,
            "kind": str(trainer.accelerator.distributed_type).rsplit(".", 1)[-1],
            "zero_stage": getattr(trainer.accelerator.state.deepspeed_plugin, "zero_stage", None),
        }
        trainer.accelerator.wait_for_everyone()
        main = trainer.is_world_process_zero()
        trainer.accelerator.free_memory()
    os.environ.update({name: before.get(name, "") for name in case.get("environment", {})})
    if main:
        (out / "report.json").write_text(json.dumps(report, indent=1))


def run(out: Path, options: dict[str, Any]) -> None:
    load(HERE / "cpu_shim.py").install(options["backend"])
    for name in options["cases"]:
        if CASES[name].get("by_name"):  # before there is a process group, in which one process would save
            make_model(CASES[name]).save_pretrained(weights_folder(out / name))
            fixtures.make_chat_tokenizer().save_pretrained(weights_folder(out / name))
    for name in options["cases"]:
        run_case(name, out / name, options)
        # `free_memory` collects garbage after each run, half a second among the million objects of the libraries.
        gc.freeze()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    run(Path(sys.argv[1]), json.loads(sys.argv[2]))
    # Not through the interpreter's end: gloo's threads now and then abort it there.
    sys.stdout.flush()
    os._exit(0)
