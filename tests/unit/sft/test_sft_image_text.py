"""`SFTTrainer` on text with models that take images too: the whole model is loaded, trained and saved."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset

import finetune
from finetune.kernels.attention import use_packed_attention
from finetune.models.architecture import language_model_class, takes_images
from finetune.models.load import load_model, load_processing_class

TEXTS = ["the cat sat on a mat", "the red sun went down over hills", "birds sang to rivers that ran past"]
ROWS = [{"prompt": text[:8], "completion": text[8:]} for text in TEXTS * 2]
TEXT: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SPECIAL = {"image_token_id": 508, "video_token_id": 509, "vision_start_token_id": 510, "vision_end_token_id": 511}


def qwen25() -> Any:
    """A model that `AutoModelForCausalLM` does not know."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [0]}
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, **SPECIAL)
    )


def qwen35() -> Any:
    """A model of which `AutoModelForCausalLM` loads the text part alone."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25}
    linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
    linear |= {"linear_num_value_heads": 2, "layer_types": ["linear_attention", "full_attention"], "head_dim": 16}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"patch_size": 4, "num_position_embeddings": 16}
    return transformers.Qwen3_5ForConditionalGeneration(
        transformers.Qwen3_5Config(
            text_config={**TEXT, "rope_parameters": rope, **linear}, vision_config=vision, **SPECIAL
        )
    )


def llava() -> Any:
    """A model whose processor needs no torchvision."""
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4, "projection_dim": 32}
    text = {"model_type": "llama", **TEXT}
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=508, vision_feature_layer=-1)
    )


def llama4() -> Any:
    """A model that transformers lists as a backbone, and that has none by the usual name."""
    text = {**TEXT, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 2}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 4, "vision_output_dim": 32, "projector_input_dim": 32}
    vision |= {"projector_output_dim": 32}
    tokens = {"image_token_index": 508, "boi_token_index": 509, "eoi_token_index": 510}
    return transformers.Llama4ForConditionalGeneration(
        transformers.Llama4Config(text_config=text, vision_config=vision, **tokens)
    )


MODELS = {"qwen2.5": qwen25, "qwen3.5": qwen35, "llava": llava, "llama4": llama4}


def save(kind: str, folder: Path) -> Any:
    torch.manual_seed(0)
    model = MODELS[kind]()
    model.save_pretrained(folder)
    return model


def config(out: Path, **overrides: Any) -> finetune.SFTConfig:
    defaults: dict[str, Any] = {"per_device_train_batch_size": 2, "max_steps": 2, "learning_rate": 1e-2}
    defaults |= {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    return finetune.SFTConfig(str(out), **{**defaults, "max_length": 64, **overrides})


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"padding_free": False}], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_the_whole_model_is_trained_and_saved(
    kind: str, options: dict[str, Any], chat_tokenizer: Any, tmp_path: Path
) -> None:
    original = save(kind, tmp_path / "base")
    trainer = finetune.SFTTrainer(
        str(tmp_path / "base"), config(tmp_path / "out", **options), None, Dataset.from_list(ROWS),
        processing_class=chat_tokenizer,
    )  # fmt: skip
    assert type(trainer.model) is type(original)
    trainer.train()
    assert len(losses(trainer)) == 2 and all(map(math.isfinite, losses(trainer)))
    trainer.save_model()
    name = type(original).__name__
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [name]
    saved, trained = type(original).from_pretrained(tmp_path / "out").state_dict(), trainer.model.state_dict()
    before = original.state_dict()
    assert set(saved) == set(before)
    assert all(torch.equal(saved[key], trained[key]) for key in before)
    changed = {key for key in before if not torch.equal(saved[key], before[key])}
    assert changed and not any("visual" in key or "vision" in key for key in changed)


def test_without_padding_the_losses_are_the_same(chat_tokenizer: Any, tmp_path: Path) -> None:
    save("qwen2.5", tmp_path / "base")
    found = {}
    for padding_free in (True, False):
        args = config(tmp_path / "out", padding_free=padding_free, optim="sgd")
        trainer = finetune.SFTTrainer(
            str(tmp_path / "base"), args, None, Dataset.from_list(ROWS), processing_class=chat_tokenizer
        )
        trainer.train()
        found[padding_free] = losses(trainer)
    assert found[True] == pytest.approx(found[False], abs=1e-5)


def test_a_model_whose_state_runs_through_a_row_keeps_its_padding(chat_tokenizer: Any, tmp_path: Path) -> None:
    save("qwen3.5", tmp_path / "base")
    trainer = finetune.SFTTrainer(
        str(tmp_path / "base"), config(tmp_path / "out"), None, Dataset.from_list(ROWS), processing_class=chat_tokenizer
    )
    assert not trainer.padding_free


def test_each_part_gets_its_own_attention_back() -> None:
    model = qwen25()
    model.config._attn_implementation = {"": "sdpa", "text_config": "sdpa", "vision_config": "eager"}
    use_packed_attention(model).remove()
    parts = [model.config, model.config.get_text_config(), model.config.vision_config]
    assert [part._attn_implementation for part in parts] == ["sdpa", "sdpa", "eager"]


def test_the_class_follows_the_configuration() -> None:
    for make in MODELS.values():
        model = make()
        settings = model.config
        settings.architectures = [type(model).__name__]
        assert language_model_class(settings) == "AutoModelForImageTextToText" and takes_images(settings)
    text = transformers.LlamaConfig(architectures=["LlamaForCausalLM"])
    assert language_model_class(text) == "AutoModelForCausalLM" and not takes_images(text)
    gemma = transformers.Gemma3Config(architectures=["Gemma3ForConditionalGeneration"])
    assert language_model_class(gemma) == "AutoModelForCausalLM" and takes_images(gemma)
    translator = transformers.T5Config(architectures=["T5ForConditionalGeneration"])
    assert language_model_class(translator) == "AutoModelForCausalLM"
    remote = transformers.PretrainedConfig(
        architectures=["TheirModel"], auto_map={"AutoModelForImageTextToText": "x.Y"}
    )
    assert language_model_class(remote) == "AutoModelForImageTextToText"


def test_the_text_part_alone_can_be_asked_for(tmp_path: Path) -> None:
    save("qwen3.5", tmp_path)
    assert type(load_model(tmp_path, auto_class="AutoModelForCausalLM")).__name__ == "Qwen3_5ForCausalLM"


def test_the_processor_is_loaded_and_saved_with_the_model(chat_tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoProcessor, CLIPImageProcessorPil, LlavaProcessor

    save("llava", tmp_path / "base")
    chat_tokenizer.add_tokens(["<image>"], special_tokens=True)
    images = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    LlavaProcessor(images, chat_tokenizer, patch_size=4).save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        processor = load_processing_class(tmp_path / "base")
    assert type(processor).__name__ == "LlavaProcessor"
    trainer = finetune.SFTTrainer(
        str(tmp_path / "base"), config(tmp_path / "out", eos_token="</s>"), None, Dataset.from_list(ROWS)
    )
    assert type(trainer.processing_class).__name__ == "LlavaProcessor"
    trainer.train()
    trainer.save_model()
    saved = AutoProcessor.from_pretrained(tmp_path / "out")
    assert type(saved).__name__ == "LlavaProcessor" and saved.tokenizer.eos_token == "</s>"


def test_without_a_processor_the_tokenizer_is_used_and_that_is_said(chat_tokenizer: Any, tmp_path: Path) -> None:
    save("qwen2.5", tmp_path / "base")
    chat_tokenizer.save_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match=r"processor of .* cannot be made .*no processor.*`processing_class`"):
        trainer = finetune.SFTTrainer(str(tmp_path / "base"), config(tmp_path), None, Dataset.from_list(ROWS))
    assert trainer.processing_class.get_vocab() == chat_tokenizer.get_vocab()


def test_a_plan_counts_all_weights(tmp_path: Path, capsys: Any) -> None:
    from finetune.cli.plan import run_plan

    model = save("qwen3.5", tmp_path)
    run_plan(["--model", str(tmp_path), "--max_length", "16"])
    count = sum(parameter.numel() for parameter in model.parameters())
    shown = capsys.readouterr().out
    assert "Qwen3_5ForConditionalGeneration" in shown and f"{count / 1e6:,.1f}M parameters" in shown


def test_ddp_looks_for_the_parts_that_text_leaves_idle(tmp_path: Path) -> None:
    from finetune.distributed.accelerator import _ddp_kwargs

    args = config(tmp_path, gradient_checkpointing=True)
    assert _ddp_kwargs(args, qwen25()).find_unused_parameters
    text = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))
    assert not _ddp_kwargs(args, text).find_unused_parameters
    reentrant = config(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    assert not _ddp_kwargs(reentrant, qwen25()).find_unused_parameters


def test_smoothed_labels_are_shifted_as_the_models_own_loss_does(tmp_path: Path) -> None:
    from finetune.engine.setup import label_smoother

    args = config(tmp_path, label_smoothing_factor=0.1)
    smoother = label_smoother(args, qwen25())
    assert smoother is not None and smoother.shift_labels
    settings = {"vocab_size": 32, "d_model": 8, "d_ff": 8, "d_kv": 4, "num_layers": 1, "num_heads": 2}
    translator = label_smoother(args, transformers.T5ForConditionalGeneration(transformers.T5Config(**settings)))
    assert translator is not None and not translator.shift_labels
