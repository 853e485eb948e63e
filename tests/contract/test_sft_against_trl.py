"""The same SFT run by TRL 1.16 and by us: losses, token metrics and signatures."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset

import finetune

WORDS = "the cat sat on a mat and saw the red sun go down over hills while birds sang to rivers".split()


def sentences(count: int) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(0, len(WORDS), (count, 12), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in row[: 4 + n % 8]) for n, row in enumerate(picks)]


ROWS = {
    "text": [{"text": s} for s in sentences(16)],
    "prompt-completion": [{"prompt": s[:10], "completion": s[10:]} for s in sentences(16)],
    "messages": [
        {"messages": [{"role": "user", "content": s[:10]}, {"role": "assistant", "content": s[10:]}]}
        for s in sentences(16)
    ],
}
OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_steps": 6,
    # Adam divides a gradient of nearly zero by itself, which turns rounding into steps of full size.
    "optim": "sgd",
    "learning_rate": 0.5,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "max_length": 64,
}
COMPARED = ("loss", "grad_norm", "learning_rate", "mean_token_accuracy", "entropy", "num_tokens", "epoch")


def run(library: Any, model: Any, tokenizer: Any, rows: list[dict[str, Any]], out: Path, **options: Any) -> Any:
    trainer = library.SFTTrainer(
        model=model,
        args=library.SFTConfig(str(out), **{**OPTIONS, **options}),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:6]),
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer


CASES: list[tuple[str, dict[str, Any]]] = [
    ("text", {}),
    ("prompt-completion", {}),
    ("messages", {}),
    ("messages", {"assistant_only_loss": True}),
    ("text", {"gradient_accumulation_steps": 4}),
    ("text", {"loss_type": "dft"}),
    ("prompt-completion", {"completion_only_loss": False}),
    ("text", {"max_length": 12}),
    ("text", {"packing": True, "max_length": 32, "max_steps": 3}),
]


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_the_same_run(kind: str, options: dict[str, Any], tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    import copy

    rows = ROWS[kind]
    theirs = run(trl, tiny_llama(vocab_size=512), copy.deepcopy(chat_tokenizer), rows, tmp_path / "a", **options)
    ours = run(finetune, tiny_llama(vocab_size=512), chat_tokenizer, rows, tmp_path / "b", **options)
    for mine, other in zip(ours.state.log_history[:-1], theirs.state.log_history[:-1], strict=True):
        # TRL averages the ratios of the micro-batches; ours are sums over counts, so they agree for one micro-batch.
        for name in COMPARED if "gradient_accumulation_steps" not in options else ("loss", "grad_norm", "num_tokens"):
            assert mine[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6), (name, mine, other)
    expected = theirs.model.state_dict()
    for name, tensor in ours.model.state_dict().items():
        assert torch.allclose(tensor, expected[name], atol=1e-5), name
    assert ours.completion_only_loss == theirs.completion_only_loss
    assert ours.padding_free or not theirs.padding_free


def test_the_constructor_has_trls_parameters() -> None:
    theirs = dict(inspect.signature(trl.SFTTrainer.__init__).parameters)
    ours = dict(inspect.signature(finetune.SFTTrainer.__init__).parameters)
    ours.pop("old_names")
    assert list(ours) == list(theirs)
    for name, parameter in theirs.items():
        assert ours[name].default == parameter.default, name


def test_evaluation_is_the_token_mean(tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    losses = []
    for size in (1, 2, 6):
        trainer = run(
            finetune, tiny_llama(vocab_size=512), chat_tokenizer, ROWS["text"], tmp_path / str(size),
            per_device_eval_batch_size=size, max_steps=1,
        )  # fmt: skip
        metrics = trainer.evaluate()
        assert {"eval_loss", "eval_mean_token_accuracy", "eval_entropy"} <= metrics.keys()
        losses.append(metrics["eval_loss"])
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-6)
