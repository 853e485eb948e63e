"""Trains with TRL's unmodified trainers, on transformers.Trainer or on ours; started by test_trl_trainers.py.

python run_trl_trainers.py ours|theirs OUT
"""

import copy
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import transformers
import transformers.trainer

spec = importlib.util.spec_from_file_location("fixtures", Path(__file__).parents[1] / "conftest.py")
assert spec is not None and spec.loader is not None
fixtures: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fixtures)

COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 3,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_steps": 2,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
}
TEXTS = ["the cat sat on a mat", "go down over the hills", "birds sang to rivers", "children play every day"] * 3


def trainers(out: Path) -> dict[str, Any]:
    import trl
    from datasets import Dataset

    tokenizer = fixtures.make_chat_tokenizer()
    model = fixtures.make_tiny_llama(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    scorer = transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(**{**model.config.to_dict(), "num_labels": 1})
    )
    text = Dataset.from_dict({"text": TEXTS})
    choice = Dataset.from_dict({"chosen": [f"{t} yes" for t in TEXTS], "rejected": [f"{t} no" for t in TEXTS]})
    prompted = choice.add_column("prompt", TEXTS)  # pyright: ignore
    shared = {"processing_class": tokenizer}
    return {
        "sft": trl.SFTTrainer(
            copy.deepcopy(model), trl.SFTConfig(str(out / "sft"), **COMMON), train_dataset=text,
            eval_dataset=text.select(range(3)), **shared,
        ),
        "dpo": trl.DPOTrainer(
            copy.deepcopy(model), ref_model=copy.deepcopy(model), args=trl.DPOConfig(str(out / "dpo"), **COMMON),
            train_dataset=prompted, eval_dataset=prompted.select(range(3)), **shared,
        ),
        "reward": trl.RewardTrainer(
            scorer, trl.RewardConfig(str(out / "reward"), **COMMON), train_dataset=choice,
            eval_dataset=choice.select(range(4)), **shared,
        ),
    }  # fmt: skip


def main(which: str, out: Path) -> None:
    if which == "ours":
        import finetune

        transformers.trainer.Trainer = finetune.Trainer  # type: ignore[misc]
        # The module bound by `import transformers` is not the one that imports read from.
        sys.modules["transformers"].Trainer = finetune.Trainer  # type: ignore[attr-defined]
    transformers.set_seed(0)
    report = {}
    for name, trainer in trainers(out).items():
        trainer.train()
        report[name] = {
            "bases": [base.__module__ for base in type(trainer).__mro__],
            "history": trainer.state.log_history,
            "saved": sorted(path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*")),
        }
    (out / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
