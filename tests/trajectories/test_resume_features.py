"""Exact resume with each feature that has a state of its own."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import finetune

spec = importlib.util.spec_from_file_location("resume_helpers", Path(__file__).with_name("test_resume.py"))
assert spec is not None and spec.loader is not None
helpers: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(helpers)

GALORE: dict[str, Any] = {
    "optim_target_modules": [r".*attn.*", r".*mlp.*"],
    "optim_args": "rank=4, update_proj_gap=3, scale=0.25",
}
CASES: dict[str, dict[str, Any]] = {
    "neftune": {"neftune_noise_alpha": 5.0},
    "length grouped": {"train_sampling_strategy": "group_by_length"},
    "galore_adamw": {"optim": "galore_adamw", **GALORE},
    "galore_adamw_layerwise": {"optim": "galore_adamw_layerwise", **GALORE},
    "galore_adafactor": {"optim": "galore_adafactor", **GALORE},
    "adafactor": {"optim": "adafactor"},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "bf16": {"bf16": True},
}


@pytest.mark.parametrize("case", CASES)
def test_trainer(case: str, tiny_llama: Any, padded_dataset: Any, tmp_path: Path) -> None:
    dataset = padded_dataset(18)
    whole = helpers.build(tiny_llama, dataset, tmp_path / "whole", **CASES[case])
    whole.train()
    resumed = helpers.interrupted_and_resumed(tiny_llama, dataset, tmp_path / "cut", 5, **CASES[case])
    helpers.assert_equal(helpers.everything(resumed), helpers.everything(whole))


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_with_a_shuffle_buffer(workers: int, tiny_llama: Any, padded_dataset: Any, tmp_path: Path) -> None:
    def stream() -> Any:
        return padded_dataset(18).to_iterable_dataset(num_shards=2).shuffle(seed=1, buffer_size=6)

    options = {"max_steps": 10, "dataloader_num_workers": workers}
    whole = helpers.build(tiny_llama, stream(), tmp_path / "whole", **options)
    whole.train()
    resumed = helpers.interrupted_and_resumed(tiny_llama, stream(), tmp_path / "cut", 6, **options)
    helpers.assert_equal(helpers.everything(resumed), helpers.everything(whole))


def test_early_stopping_goes_on_counting(tiny_llama: Any, padded_dataset: Any, tmp_path: Path) -> None:
    dataset = padded_dataset(18)
    options: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "learning_rate": 0.0,
        "load_best_model_at_end": True,
        "num_train_epochs": 3,
        "restore_callback_states_from_checkpoint": True,
    }

    def build(out: Path, *more: Any) -> finetune.Trainer:
        stopper = finetune.EarlyStoppingCallback(early_stopping_patience=4)
        return helpers.build(tiny_llama, dataset, out, [stopper, *more], **options)

    whole = build(tmp_path / "whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "cut", helpers.Interrupt(3)).train()
    resumed = build(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert whole.state.global_step == 5
    assert resumed.state.global_step == 5
    helpers.assert_equal(helpers.everything(resumed)["history"], helpers.everything(whole)["history"])


SFT: dict[str, dict[str, Any]] = {
    "padding-free": {},
    "padded": {"padding_free": False},
    "packed": {"packing": True, "max_length": 40},
    "lora": {"peft": True},
}


@pytest.mark.parametrize("case", SFT)
def test_sft(case: str, tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    from datasets import Dataset

    options = dict(SFT[case])
    use_peft = options.pop("peft", False)
    rows = Dataset.from_list([{"text": f"the cat sat on a mat {'and saw the sun ' * (i % 4)}"} for i in range(24)])

    def build(out: Path, *callbacks: Any) -> finetune.SFTTrainer:
        config: Any = None
        if use_peft:
            from peft import LoraConfig

            config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", lora_dropout=0.1)
        return finetune.SFTTrainer(
            tiny_llama(vocab_size=512),
            finetune.SFTConfig(str(out), **{**helpers.COMMON, "num_train_epochs": 3, **options}),
            train_dataset=rows,
            processing_class=chat_tokenizer,
            peft_config=config,
            callbacks=list(callbacks),
        )

    whole = build(tmp_path / "whole")
    whole.train()
    at = whole.state.global_step // 2
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "cut", helpers.Interrupt(at)).train()
    torch.manual_seed(99)
    resumed = build(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    helpers.assert_equal(helpers.everything(resumed), helpers.everything(whole))
