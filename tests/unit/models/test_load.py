"""Loading: what comes back, and the one clear error for each thing that can be wrong with a path."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from finetune.errors import ArgumentError, ModelLoadError
from finetune.models.load import load_config, load_model, load_tokenizer, parse_dtype


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "a": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>").save_pretrained(path)
    return path


def test_loads_float32_by_default_and_the_dtype_asked_for(folder) -> None:
    assert load_model(str(folder)).dtype == torch.float32
    assert load_model(folder, dtype="bfloat16").dtype == torch.bfloat16
    assert load_model(folder, model_init_kwargs={"dtype": torch.float16}).dtype == torch.float16
    given = {"attn_implementation": "eager"}
    assert load_model(folder, model_init_kwargs=given).config._attn_implementation == "eager"
    assert given == {"attn_implementation": "eager"}


def test_classification_heads_may_be_new(folder) -> None:
    model = load_model(folder, auto_class="AutoModelForSequenceClassification", model_init_kwargs={"num_labels": 3})
    assert model.score.out_features == 3


def test_a_loaded_model_passes_through(folder) -> None:
    model = load_model(folder)
    assert load_model(model) is model
    with pytest.warns(UserWarning, match="model_init_kwargs"):
        assert load_model(model, model_init_kwargs={"dtype": "float16"}) is model


def test_tokenizer_from_path_and_from_model(folder) -> None:
    assert load_tokenizer(folder).eos_token == "<eos>"
    assert load_tokenizer(load_model(folder)).eos_token_id == 1
    assert load_config(folder).model_type == "llama"
    with pytest.raises(ModelLoadError, match="processing_class"):
        load_tokenizer(
            LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
                )
            )
        )


def test_unreadable_paths(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelLoadError, match=r"does not exist.*Did you mean"):
        load_model(str(folder) + "x")
    with pytest.raises(ModelLoadError, match="is the file"):
        load_model(folder / "config.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelLoadError, match="holds nothing and no config"):
        load_model(tmp_path / "empty")
    with pytest.raises(ModelLoadError, match="is that the folder you mean"):
        load_model(folder.parent)
    message = "Model 'nobody/there-is-no-such-model' was not found: there is no local folder"
    with pytest.raises(ModelLoadError, match=message):
        load_model("nobody/there-is-no-such-model")
    with pytest.raises(ModelLoadError, match="is empty"):
        load_model(" ")


@pytest.mark.parametrize("damage", ["truncated", "no weights", "bad json"])
def test_damaged_folders(folder, tmp_path, damage: str) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:100])
    elif damage == "no weights":
        weights.unlink()
    else:
        (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"cannot be loaded.*The folder holds"):
        load_model(tmp_path)


def test_weights_of_another_architecture_are_refused(folder, tmp_path) -> None:
    config = BertConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text())))
    with pytest.raises(ModelLoadError, match="of the weights of LlamaForCausalLM"):
        load_model(tmp_path)


def test_wrong_options(folder) -> None:
    with pytest.raises(ArgumentError, match="bfloat16"):
        parse_dtype("bfloat61")
    assert parse_dtype("bf16") == torch.bfloat16 and parse_dtype("torch.float16") == torch.float16
    with pytest.raises(ArgumentError, match="given twice"):
        load_model(folder, dtype="float16", model_init_kwargs={"dtype": "float32"})
    with pytest.raises(ArgumentError, match="AutoModelForCausalLM"):
        load_model(folder, auto_class="AutoModelForCausalML")


@pytest.mark.parametrize("load", [load_model, load_config])
def test_a_folder_with_an_adapter_alone_says_how_to_go_on(tmp_path, load) -> None:
    from peft import LoraConfig, get_peft_model

    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    get_peft_model(LlamaForCausalLM(config), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match=r"holds an adapter.*is_trainable=True.*merge_and_unload"):
        load(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[")
    with pytest.raises(ModelLoadError, match="holds an adapter"):
        load(tmp_path)


def test_only_names_that_were_renamed_are_renamed_back_when_saving() -> None:
    """transformers' ZeRO-3 loader leaves all known renamings on the model, used or not."""
    from types import SimpleNamespace
    from typing import Any

    from finetune.models.load import _forget_unused_conversions

    used, unused = (SimpleNamespace(was_used=lambda value=value: value) for value in (True, False))
    model: Any = SimpleNamespace(_weight_conversions=[used, unused])
    _forget_unused_conversions(model)
    assert model._weight_conversions == [used]
    for value in (None, [object()]):
        model._weight_conversions = value
        _forget_unused_conversions(model)
        assert model._weight_conversions == value
    _forget_unused_conversions(SimpleNamespace())


@pytest.mark.parametrize(
    ("cause", "remedy"),
    [
        ("the package flash_attn seems not to be installed", r"Install .*`attn_implementation='sdpa'`"),
        ("No module named 'timm'", "Install the missing package"),
    ],
)
def test_a_missing_package_is_not_blamed_on_the_folder(folder, monkeypatch, cause, remedy) -> None:
    def fail(*args, **kwargs):
        raise ImportError(cause)

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", fail)
    with pytest.raises(ModelLoadError, match=remedy) as caught:
        load_model(folder, auto_class=LlamaForCausalLM)
    assert "folder holds" not in str(caught.value)
