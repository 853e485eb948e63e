"""The load-balancing loss of mixtures of experts: weighted, divided and logged as by TRL 1.16."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset

import finetune
from finetune.sft.experts import own_weight_is_zero

TEXTS = ["the cat sat on a mat", "the red sun went down over hills", "birds sang to rivers that ran past"]
OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 3,
    "max_steps": 3,
    "optim": "sgd",
    "learning_rate": 0.5,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "max_length": 32,
    "padding_free": False,
}


def mixture(family: str) -> Any:
    import transformers

    shared = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    shared |= {"num_key_value_heads": 2, "num_experts_per_tok": 2}
    own: dict[str, Any] = {
        "Mixtral": {"intermediate_size": 48, "num_local_experts": 4},
        "Qwen3Moe": {"intermediate_size": 48, "moe_intermediate_size": 48, "num_experts": 4, "head_dim": 8},
        "JetMoe": {"intermediate_size": 48, "kv_channels": 8, "num_local_experts": 4, "aux_loss_coef": 0.5},
    }[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**shared, **own)
    return getattr(transformers, f"{family}ForCausalLM")(config)


def mixture_with_images() -> Any:
    """Its forward reads the weight of the auxiliary loss from the config of its text part."""
    import transformers

    text = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "router_aux_loss_coef": 1.0}
    text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "max_position_embeddings": 64}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    vision = {"hidden_size": 32, "intermediate_size": 32, "depth": 1, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    special = {"image_token_id": 508, "video_token_id": 509, "vision_start_token_id": 510, "vision_end_token_id": 511}
    torch.manual_seed(0)
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision, **special)
    return transformers.Qwen3VLMoeForConditionalGeneration(config)


def run(library: Any, model: Any, tokenizer: Any, out: Path, **options: Any) -> Any:
    rows = Dataset.from_list([{"text": text} for text in TEXTS * 4])
    args = library.SFTConfig(str(out), **{**OPTIONS, **options})
    trainer = library.SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return trainer


@pytest.mark.parametrize(("family", "coefficient"), [("Mixtral", None), ("Mixtral", 0.5), ("Qwen3Moe", 0.5)])
def test_the_auxiliary_loss_is_trls(family: str, coefficient: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    model = mixture(family)
    before = model.router_aux_loss_coef
    other = copy.deepcopy(model)
    theirs = run(trl, other, copy.deepcopy(chat_tokenizer), tmp_path / "a", router_aux_loss_coef=coefficient)
    ours = run(finetune, model, chat_tokenizer, tmp_path / "b", router_aux_loss_coef=coefficient)
    for mine, trls in zip(ours.state.log_history[:-1], theirs.state.log_history[:-1], strict=True):
        for name in ("loss", "grad_norm", "aux_loss"):
            assert mine[name] == pytest.approx(trls[name], rel=2e-5, abs=1e-5), (name, mine, trls)
    assert (ours.router_aux_loss_coef, ours.aux_loss_enabled) == (theirs.router_aux_loss_coef, theirs.aux_loss_enabled)
    assert model.router_aux_loss_coef == before


@pytest.mark.parametrize("coefficient", [None, 0.5])
def test_the_auxiliary_loss_of_a_model_that_takes_images_too_is_trls(
    coefficient: float | None, chat_tokenizer: Any, tmp_path: Path
) -> None:
    model, options = mixture_with_images(), {"router_aux_loss_coef": coefficient, "save_strategy": "steps"}
    other = copy.deepcopy(model)
    theirs = run(trl, other, copy.deepcopy(chat_tokenizer), tmp_path / "a", router_aux_loss_coef=coefficient)
    ours = run(finetune, model, chat_tokenizer, tmp_path / "b", **options, save_steps=2)
    for mine, trls in zip(ours.state.log_history[:-1], theirs.state.log_history[:-1], strict=True):
        for name in ("loss", "grad_norm", "aux_loss"):
            assert mine[name] == pytest.approx(trls[name], rel=2e-5, abs=1e-5), (name, mine, trls)
    assert model.config.text_config.router_aux_loss_coef == 1.0
    saved = json.loads((tmp_path / "b" / "checkpoint-2" / "config.json").read_text())
    assert saved["text_config"]["router_aux_loss_coef"] == 1.0


def test_a_config_that_is_saved_in_training_holds_its_weight() -> None:
    """Checkpoints are written by another thread while the next step runs, compiled or not."""
    model = mixture_with_images()
    config, ids = model.config.text_config, torch.arange(12)[None]
    options = {"input_ids": ids, "labels": ids, "output_router_logits": True, "use_cache": False}
    weighted = model(**options)
    with own_weight_is_zero(model):
        losses = [run_model(**options).loss for run_model in (model, torch.compile(model, backend="eager"))]
        assert config.to_dict()["router_aux_loss_coef"] == 1.0
        assert json.loads(model.config.to_json_string())["text_config"]["router_aux_loss_coef"] == 1.0
        assert copy.deepcopy(model.config).text_config.router_aux_loss_coef == 1.0
    assert type(config.router_aux_loss_coef) is float
    for loss in losses:
        torch.testing.assert_close(loss, weighted.loss - weighted.aux_loss)


def test_a_weight_by_another_name_is_divided_as_well(chat_tokenizer: Any, tmp_path: Path) -> None:
    """JetMoE's, which TRL neither reads nor divides by the micro-batches."""
    model, logs = mixture("JetMoe"), []
    model.config.output_router_logits = True
    for coefficient in (0.0, None, 0.25):
        tokenizer, out = copy.deepcopy(chat_tokenizer), tmp_path / str(coefficient)
        trainer = run(
            finetune, copy.deepcopy(model), tokenizer, out, max_steps=1, router_aux_loss_coef=coefficient,
            gradient_accumulation_steps=4,
        )  # fmt: skip
        logs.append(trainer.state.log_history[0])
    assert logs[1]["loss"] - logs[0]["loss"] == pytest.approx(0.5 * logs[1]["aux_loss"], abs=1e-3)
    assert logs[2]["loss"] - logs[0]["loss"] == pytest.approx(0.25 * logs[2]["aux_loss"], abs=1e-3)
    assert model.aux_loss_coef == 0.5


def test_zero_switches_it_off(chat_tokenizer: Any, tmp_path: Path) -> None:
    with_it = run(finetune, mixture("Mixtral"), copy.deepcopy(chat_tokenizer), tmp_path / "a", router_aux_loss_coef=0.5)
    without = run(finetune, mixture("Mixtral"), chat_tokenizer, tmp_path / "b", router_aux_loss_coef=0.0)
    assert with_it.state.log_history[0]["loss"] > without.state.log_history[0]["loss"] + 0.4
    assert "aux_loss" not in without.state.log_history[0]


@pytest.mark.parametrize("options", [{"label_smoothing_factor": 0.1}, {"loss_type": "dft"}, {"padding_free": True}])
def test_label_smoothing_keeps_it(options: dict[str, Any], chat_tokenizer: Any, tmp_path: Path) -> None:
    logs = []
    for coefficient in (0.0, 0.5):
        tokenizer, out = copy.deepcopy(chat_tokenizer), tmp_path / str(coefficient)
        settings = {**options, "max_steps": 1, "router_aux_loss_coef": coefficient}
        logs.append(run(finetune, mixture("Mixtral"), tokenizer, out, **settings).state.log_history[0])
    assert logs[1]["loss"] - logs[0]["loss"] == pytest.approx(0.5 * logs[1]["aux_loss"], abs=1e-3)


def test_it_is_the_mean_over_the_micro_batches(chat_tokenizer: Any, tmp_path: Path) -> None:
    """Rows of equal length: two micro-batches of two rows have the loss of one of four, but for the balance itself."""
    losses = []
    for size, accumulation in ((4, 1), (2, 2)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer = run(
            finetune, mixture("Mixtral"), copy.deepcopy(chat_tokenizer), tmp_path / str(size), max_steps=1,
            router_aux_loss_coef=1.0, **options,
        )  # fmt: skip
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=0.1)  # a balance of 4 experts, 2 per token, is near 2


def test_predictions_are_the_logits_alone(chat_tokenizer: Any, tmp_path: Path) -> None:
    rows = Dataset.from_list([{"text": text} for text in TEXTS])
    args = finetune.SFTConfig(str(tmp_path), **OPTIONS, per_device_eval_batch_size=3)
    trainer = finetune.SFTTrainer(
        mixture("Mixtral"), args, None, rows, rows, chat_tokenizer, compute_metrics=lambda pair: {"seen": 1.0}
    )
    output = trainer.predict(trainer.eval_dataset)
    assert output.predictions.shape[0] == 3 and output.predictions.shape[2] == 512


def test_a_model_without_experts_is_refused(tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(finetune.ArgumentError, match="router_aux_loss_coef"):
        run(finetune, tiny_llama(vocab_size=512), chat_tokenizer, tmp_path, router_aux_loss_coef=0.1)
