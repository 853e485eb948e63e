"""`finetune plan`: what it reads, prints and refuses. How right it is: tests/numerics/test_memory_estimate.py."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.cli.demo import MODEL
from finetune.cli.main import main
from finetune.cli.plan import KNOWN_CONFIGS, read_config
from finetune.errors import ModelLoadError

# From the models' cards: parameters without counting tied weights twice.
PARAMETERS = {
    "google/gemma-2b": 2_506_172_416,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
}


@pytest.mark.parametrize("name", KNOWN_CONFIGS)
def test_built_in_configurations_are_the_published_models(name):
    config, source = read_config(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert source == "built-in table of configurations"


def test_a_file_a_folder_and_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    AutoConfig.from_pretrained(MODEL).save_pretrained(tmp_path)
    assert read_config(str(tmp_path / "config.json"))[0].hidden_size == 128
    assert read_config(str(tmp_path))[1] == "folder"
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ModelLoadError, match="not a model configuration"):
        read_config(str(tmp_path / "other.json"))
    with pytest.raises(ModelLoadError, match=r"--model config\.json.*google/gemma-2b"):
        read_config(str(tmp_path / "absent" / "model"))


def test_the_whole_command(capsys):
    words = ["plan", "--model", str(MODEL), "--max_length", "64", "--num_processes", "4", "--use_cpu"]
    assert main([*words, "--optim", "galore_adamw_layerwise", "--optim_target_modules", "all-linear"]) == 0
    text, said = capsys.readouterr()
    assert said.startswith("Tracing a training step of ")
    assert "LlamaForCausalLM, 1.0M parameters, 1.0M trained; float32" in text and "fused loss" in text
    assert "one device" in text and "DDP x 4" in text and "GaLore projects 28 weights" in text
    assert "FSDP2: `optim=galore_adamw_layerwise` needs whole weight matrices" in text
    assert "ZeRO-1, ZeRO-2, ZeRO-3: " in text
    assert main([*words, "--optim", "adamw_torch", "--use_peft", "--lora_target_modules", "all-linear"]) == 0
    text = capsys.readouterr().out
    assert "0.2M trained" in text and "refused" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--model"),
        (["--model", str(MODEL), "--max_length", "none"], "`max_length`"),
        (["--model", str(MODEL), "--use_peft", "--load_in_4bit"], "quantized"),
        (["--model", str(MODEL), "--num_processes", "0"], "`num_processes` is 0"),
        (["--model", str(MODEL), "--optim", "galore_adamw"], "optim_target_modules"),
    ],
)
def test_refusals(words, message, capsys):
    assert main(["plan", *words, "--use_cpu"]) != 0
    assert message in capsys.readouterr().err


def test_an_optimizer_that_needs_values_is_named(capsys, monkeypatch):
    def refuse(self, *_):
        raise NotImplementedError

    monkeypatch.setattr(torch.optim.Adagrad, "step", refuse)
    assert main(["plan", "--model", str(MODEL), "--optim", "adagrad", "--max_length", "16", "--use_cpu"]) != 0
    assert "`optim=adagrad` asks for values" in capsys.readouterr().err
