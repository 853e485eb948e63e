"""`SFTTrainer` with adapters, quantized weights, prompt tuning and tokens that are new to the vocabulary."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, PromptTuningConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

import finetune

TEXTS = ["the cat sat on a mat", "the red sun went down over hills", "birds sang to rivers that ran past"]
ROWS = [{"prompt": text[:8], "completion": text[8:]} for text in TEXTS * 4]
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def config(out: Path, **overrides: Any) -> finetune.SFTConfig:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "max_length": 64,
    }
    return finetune.SFTConfig(str(out), **{**defaults, **overrides})


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], **options)


def train(model: Any, tokenizer: Any, out: Path, peft_config: Any = None, resume: Any = None, **options: Any) -> Any:
    settings = {name: options.pop(name) for name in ("quantization_config",) if name in options}
    trainer = finetune.SFTTrainer(
        model,
        config(out, **options),
        None,
        Dataset.from_list(ROWS),
        None,
        tokenizer,
        peft_config=peft_config,
        **settings,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_lora_is_saved_alone_and_merges_to_the_same_model(tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    tiny_llama(512).save_pretrained(tmp_path / "base")
    chat_tokenizer.save_pretrained(tmp_path / "base")
    trainer = train(str(tmp_path / "base"), None, tmp_path / "out", lora())
    assert losses(trainer)[-1] < losses(trainer)[0]
    trainer.save_model()
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "out" / "model.safetensors").exists()
    trainer.model.eval()
    trained = trainer.model(input_ids=IDS).logits
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, trained, rtol=1e-5, atol=1e-6)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=IDS).logits, trained, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not isinstance(plain, PeftModel)
    torch.testing.assert_close(plain(input_ids=IDS).logits, trained, rtol=1e-4, atol=1e-5)


def test_a_resumed_adapter_goes_on_exactly(tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    whole = train(tiny_llama(512), copy.deepcopy(chat_tokenizer), tmp_path / "a", lora(lora_dropout=0.1), **options)
    checkpoint = str(tmp_path / "a" / "checkpoint-3")
    again = train(tiny_llama(512), chat_tokenizer, tmp_path / "b", lora(lora_dropout=0.1), resume=checkpoint, **options)
    expected = dict(whole.model.named_parameters())
    for name, parameter in again.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    assert losses(again) == losses(whole)


def test_a_loaded_adapter_goes_on_training(tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    first = train(tiny_llama(512), copy.deepcopy(chat_tokenizer), tmp_path / "a", lora())
    first.save_model()
    loaded = PeftModel.from_pretrained(tiny_llama(512), tmp_path / "a", is_trainable=True)
    again = train(loaded, chat_tokenizer, tmp_path / "b")
    assert losses(again)[0] < losses(first)[0] and losses(again)[-1] < losses(first)[-1]
    assert all("lora" in name for name, parameter in again.model.named_parameters() if parameter.requires_grad)


def test_qlora_from_a_folder(tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    tiny_llama(512, hidden_size=64).save_pretrained(tmp_path / "base")
    chat_tokenizer.save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    trainer = train(str(tmp_path / "base"), None, tmp_path / "out", lora(), quantization_config=quantization)
    weight = trainer.model.get_base_model().model.layers[0].mlp.up_proj.weight
    assert type(weight).__name__ == "Params4bit" and weight.dtype == torch.uint8
    assert losses(trainer)[-1] < losses(trainer)[0]
    trainer.save_model()
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_qlora_leaves_the_dtypes_of_the_base_alone(tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    tiny_llama(512, hidden_size=64).save_pretrained(tmp_path / "base")
    chat_tokenizer.save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype="bfloat16")
    trainer = train(
        str(tmp_path / "base"), None, tmp_path / "out", lora(), quantization_config=quantization,
        model_init_kwargs={"dtype": "bfloat16"},
    )  # fmt: skip
    base = trainer.model.get_base_model()
    kept = (base.get_input_embeddings(), base.get_output_embeddings(), base.model.norm)
    assert {module.weight.dtype for module in kept} == {torch.bfloat16}
    assert losses(trainer)[-1] < losses(trainer)[0]
    trainer.save_model()
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantization)
    given = PeftModel.from_pretrained(reloaded, tmp_path / "out", is_trainable=True)
    for name, parameter in given.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.half()
    again = train(given, chat_tokenizer, tmp_path / "again", max_steps=1)
    assert {p.dtype for p in again.model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("name", ["model_init_kwargs", "quantization_config"])
def test_options_of_loading_have_no_effect_on_a_loaded_model_and_that_is_said(
    name: str, tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=rf"loaded already.*no effect of `{name}`") as caught:
        trainer = train(tiny_llama(512), chat_tokenizer, tmp_path, max_steps=1, **{name: {"load_in_4bit": True}})
    assert sum("no effect" in str(each.message) for each in caught) == 1
    assert len(losses(trainer)) == 1


def test_prompt_tuning_trains_its_virtual_tokens_alone(tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_llama(512)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    virtual = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    trainer = train(model, chat_tokenizer, tmp_path, virtual, learning_rate=0.3, max_steps=12)
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert not trainer.data_collator.padding_free
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    loss = trainer.evaluate(Dataset.from_list(ROWS[:4]))["eval_loss"]
    output = trainer.predict(Dataset.from_list(ROWS[:4]))  # through the logits, which the virtual tokens have too
    assert output.metrics["test_loss"] == pytest.approx(loss, rel=1e-5)
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_prompt_tuning_without_padding_is_refused(tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    virtual = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    for options in ({"padding_free": True}, {"packing": True}):
        with pytest.raises(finetune.ArgumentError, match="virtual"):
            train(tiny_llama(512), copy.deepcopy(chat_tokenizer), tmp_path, virtual, **options)


def test_weights_pass_the_virtual_tokens(tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    virtual = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8], "token_weights": [1.0, 0.5, 0.25, 2.0]}]
    trainer = finetune.SFTTrainer(
        tiny_llama(512), config(tmp_path), None, Dataset.from_list(rows), processing_class=chat_tokenizer,
        peft_config=virtual,
    )  # fmt: skip
    (batch,) = trainer.get_train_dataloader()
    with trainer.model_features():
        fused = trainer.compute_loss(trainer.model, dict(batch))
        plain, _ = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    torch.testing.assert_close(fused, plain)


@pytest.mark.parametrize("peft_config", [None, lora()])
def test_a_cloned_template_brings_its_tokens_and_is_saved(
    peft_config: Any, tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path
) -> None:
    tiny_llama(400).save_pretrained(tmp_path / "base")
    chat_tokenizer.save_pretrained(tmp_path / "base")
    other = copy.deepcopy(chat_tokenizer)
    other.add_tokens(["<|done|>"], special_tokens=True)
    other.eos_token = "<|done|>"
    other.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}[A]{% generation %}{{ m['content'] }}<|done|>"
        "{% endgeneration %}{% else %}[Q]{{ m['content'] }}{% endif %}{% endfor %}"
    )
    other.save_pretrained(tmp_path / "other")
    chats = [{"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]}
             for r in ROWS]  # fmt: skip
    args = config(tmp_path / "out", chat_template_path=str(tmp_path / "other"), assistant_only_loss=True)
    trainer = finetune.SFTTrainer(str(tmp_path / "base"), args, None, Dataset.from_list(chats), peft_config=peft_config)
    done = trainer.processing_class.convert_tokens_to_ids("<|done|>")
    assert done in trainer.train_dataset["labels"][0]
    embedding = trainer.model.get_input_embeddings().weight
    assert embedding.shape[0] > done and embedding.shape[0] % 64 == 0
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    trainer.save_model()
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert saved.chat_template == other.chat_template and saved.eos_token == "<|done|>"
    assert trainer.model.config.eos_token_id == done
    if peft_config is None:
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").get_input_embeddings().weight.shape[0] > done
    else:
        trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
        assert any("lm_head" in name for name in trained) and any("token_adapter" in name for name in trained)
