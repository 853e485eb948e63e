import json
import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.checkpoint import layout, weights
from finetune.checkpoint.writer import CheckpointWriter
from finetune.errors import CheckpointError


def arguments(**kwargs: Any) -> Any:
    return SimpleNamespace(should_save=True, to_dict=lambda: {"lr": 0.1, "path": Path("x"), **kwargs})


def llama(seed: int = 0, **overrides: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "max_position_embeddings": 16,
    }  # fmt: skip
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **overrides}))


def equal(left: Any, right: Any) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(5, 3)
        self.head = torch.nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("view", torch.arange(10.0)[:4])


def roundtrip(folder: Path, model: Any, other: Any, **kwargs: Any) -> None:
    weights.write_model(folder, None, model=model, args=arguments(), **kwargs)
    weights.load_weights(folder, other)


def test_pretrained_model(tmp_path: Path) -> None:
    model, other = llama(), llama(seed=1)
    roundtrip(tmp_path, model, other)
    assert equal(model, other)
    assert equal(type(model).from_pretrained(tmp_path), model)


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model, other = llama(tie_word_embeddings=True), llama(seed=1, tie_word_embeddings=True)
    roundtrip(tmp_path, model, other)
    assert equal(model, other) and other.lm_head.weight is other.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(tmp_path / layout.WEIGHTS)


def test_plain_module_with_shared_and_viewed_tensors(tmp_path: Path) -> None:
    model, other = Tied(), Tied()
    roundtrip(tmp_path, model, other)
    assert equal(model, other)
    assert sorted(load_file(tmp_path / layout.WEIGHTS)) == ["embed.weight", "view"]


def test_compiled_and_wrapped_models_are_saved_under_their_own_names(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    weights.write_model(tmp_path / "c", None, model=torch.compile(model), args=arguments())  # type: ignore[arg-type]
    weights.write_model(tmp_path / "d", None, model=torch.nn.DataParallel(model), args=arguments())
    gathered = {f"module._orig_mod.{k}": v for k, v in model.state_dict().items()}
    weights.write_model(tmp_path / "g", gathered, model=model, args=arguments())
    for name in "cdg":
        assert sorted(load_file(tmp_path / name / layout.WEIGHTS)) == ["0.bias", "0.weight"]


def test_compiled_pretrained_model_loads_again(tmp_path: Path) -> None:
    model, other = llama(), torch.compile(llama(seed=1))
    roundtrip(tmp_path, torch.compile(model), other)
    assert equal(model, other._orig_mod)


def test_shards(tmp_path: Path) -> None:
    model, other = llama(), llama(seed=1)
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(layout.find_weights(tmp_path).full) > 2
    weights.load_weights(tmp_path, other)
    assert equal(model, other)


def test_model_whose_names_on_disk_differ(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    def mixtral(seed: int) -> Any:
        torch.manual_seed(seed)
        return MixtralForCausalLM(
            MixtralConfig(
                vocab_size=16,
                hidden_size=8,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                num_local_experts=2,
                max_position_embeddings=8,
            )
        )

    model, other = mixtral(0), mixtral(1)
    weights.write_model(tmp_path, None, model=model, args=arguments())
    assert set(load_file(tmp_path / layout.WEIGHTS)) != set(model.state_dict()), "else this tests nothing"
    weights.load_weights(tmp_path, other)
    assert equal(model, other)


def test_old_pickled_weights_are_loaded_safely(tmp_path: Path) -> None:
    model, other = llama(), llama(seed=1)
    torch.save(model.state_dict(), tmp_path / layout.PICKLED_WEIGHTS)
    weights.load_weights(tmp_path, other)
    assert equal(model, other)
    (tmp_path / layout.PICKLED_WEIGHTS).write_bytes(pickle.dumps(os.system))
    with pytest.raises(CheckpointError, match="could run code"):
        weights.load_weights(tmp_path, other)


class TestWrongModel:
    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            ({"num_hidden_layers": 3}, r"`model\.layers\.2\..* missing"),
            ({"num_hidden_layers": 1}, r"`model\.layers\.1\..* not in this model"),
            ({"hidden_size": 8}, "size mismatch|does not fit"),
            ({"tie_word_embeddings": True}, ""),
        ],
    )
    def test_is_an_error(self, tmp_path: Path, overrides: dict[str, Any], message: str) -> None:
        llama().save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match=message):
            weights.load_weights(tmp_path, llama(**overrides))

    def test_entirely_other_names(self, tmp_path: Path) -> None:
        save_file({"a": torch.ones(2)}, tmp_path / layout.WEIGHTS)
        with pytest.raises(CheckpointError):
            weights.load_weights(tmp_path, torch.nn.Linear(2, 2))
        with pytest.raises(CheckpointError):
            weights.load_weights(tmp_path, llama())

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="holds no weights"):
            weights.load_weights(tmp_path, llama())
        with pytest.raises(CheckpointError, match="cannot be read"):
            weights.load_weights(tmp_path / "missing", llama())

    def test_damaged_file(self, tmp_path: Path) -> None:
        llama().save_pretrained(tmp_path)
        os.truncate(tmp_path / layout.WEIGHTS, 900)
        with pytest.raises(CheckpointError, match="damaged"):
            weights.load_weights(tmp_path, llama())

    def test_tensor_that_did_not_arrive(self, tmp_path: Path) -> None:
        class Stubborn(torch.nn.Linear):
            def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
                super()._load_from_state_dict(*args, **kwargs)
                with torch.no_grad():
                    self.weight[0, 0] += 1

        weights.write_model(tmp_path, None, model=torch.nn.Linear(2, 2), args=arguments())
        with pytest.raises(CheckpointError, match="`weight` in the model differs"):
            weights.load_weights(tmp_path, Stubborn(2, 2))


class TestAdapters:
    def make(self, seed: int = 0, r: int = 4, name: str = "default", **kwargs: Any) -> Any:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=r, target_modules=kwargs.pop("targets", ["q_proj"]), **kwargs)
        model = get_peft_model(llama(seed=7), config, adapter_name=name)
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_()
        return model

    def test_roundtrip(self, tmp_path: Path) -> None:
        model, other = self.make(), self.make(seed=1)
        roundtrip(tmp_path, model, other)
        assert equal(model, other) and all("lora" not in n or p.requires_grad for n, p in other.named_parameters())
        assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == [layout.ADAPTER_WEIGHTS]

    @pytest.mark.parametrize("name", ["default", "mine"])
    def test_saved_trained_modules_and_named_adapters(self, tmp_path: Path, name: str) -> None:
        model = self.make(name=name, modules_to_save=["lm_head"])
        other = self.make(seed=1, name=name, modules_to_save=["lm_head"])
        roundtrip(tmp_path, model, other)
        assert equal(model, other)

    def test_two_adapters(self, tmp_path: Path) -> None:
        from peft import LoraConfig

        pair = [self.make(), self.make(seed=1)]
        for seed, model in enumerate(pair):
            model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"]))
            torch.manual_seed(seed)
            for parameter in (p for n, p in model.named_parameters() if "second" in n):
                parameter.data.normal_()
        roundtrip(tmp_path, *pair)
        assert equal(*pair)

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"r": 8}, "does not fit"),
            ({"targets": ["q_proj", "v_proj"]}, "did not load.*missing"),
            ({"targets": ["v_proj"]}, "did not load"),
        ],
    )
    def test_adapter_that_does_not_load_is_an_error(self, tmp_path: Path, kwargs: Any, message: str) -> None:
        weights.write_model(tmp_path, None, model=self.make(), args=arguments())
        with pytest.raises(CheckpointError, match=message):
            weights.load_weights(tmp_path, self.make(**kwargs))

    def test_adapter_for_a_model_without_one(self, tmp_path: Path) -> None:
        weights.write_model(tmp_path, None, model=self.make(), args=arguments())
        with pytest.raises(CheckpointError, match="`peft_config`"):
            weights.load_weights(tmp_path, llama())

    def test_full_weights_for_a_model_with_an_adapter(self, tmp_path: Path) -> None:
        weights.write_model(tmp_path, None, model=llama(), args=arguments())
        with pytest.raises(CheckpointError):
            weights.load_weights(tmp_path, self.make())


def test_arguments_are_plain_and_tokenizer_is_saved(tmp_path: Path) -> None:
    saved: list[str] = []
    tokenizer = SimpleNamespace(save_pretrained=saved.append)
    weights.write_model(tmp_path / "a", None, model=Tied(), args=arguments(), processing_class=tokenizer)
    collator = SimpleNamespace(tokenizer=tokenizer)
    weights.write_model(tmp_path / "b", None, model=Tied(), args=arguments(), data_collator=collator)
    assert saved == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert torch.load(tmp_path / "a" / layout.TRAINING_ARGS, weights_only=True) == {"lr": 0.1, "path": "x"}


def test_process_that_does_not_save_writes_nothing(tmp_path: Path) -> None:
    args = arguments()
    args.should_save = False
    weights.write_model(tmp_path / "a", None, model=Tied(), args=args)
    assert not (tmp_path / "a").exists()


def test_background_write_is_of_the_state_at_the_save(tmp_path: Path) -> None:
    model, before = llama(tie_word_embeddings=True), llama(tie_word_embeddings=True)
    writer = CheckpointWriter(asynchronous=True)
    with writer.collecting():
        weights.write_model(tmp_path, None, model=model, args=arguments(), writer=writer)
    assert not (tmp_path / layout.WEIGHTS).exists()
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(1)
    writer.launch(lambda error: None)
    writer.wait()
    other = llama(seed=1, tie_word_embeddings=True)
    weights.load_weights(tmp_path, other)
    assert equal(before, other) and "lm_head.weight" not in load_file(tmp_path / layout.WEIGHTS)


def test_transformers_loads_what_we_write_and_the_other_way_round(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    def theirs(model: Any) -> Any:
        args = TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to="none")
        return Trainer(model=model, args=args)

    for ours, other in ((llama(), llama(seed=1)), (TestAdapters().make(), TestAdapters().make(seed=1))):
        folder = tmp_path / type(ours).__name__
        weights.write_model(folder / "ours", None, model=ours, args=arguments())
        theirs(other)._load_from_checkpoint(str(folder / "ours"))
        assert equal(ours, other)
        with torch.no_grad():
            next(p for p in other.parameters() if p.requires_grad).add_(1)
        theirs(other).save_model(str(folder / "theirs"))
        weights.load_weights(folder / "theirs", ours)
        assert equal(ours, other)


def test_index_with_a_lost_shard(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path, max_shard_size="5KB")
    weight_map = json.loads((tmp_path / layout.WEIGHTS_INDEX).read_text())["weight_map"]
    (tmp_path / next(iter(weight_map.values()))).unlink()
    with pytest.raises(CheckpointError, match="missing or damaged"):
        weights.load_weights(tmp_path, llama())


def test_gathered_weights_without_the_adapter_are_refused(tmp_path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    gathered = dict(model.state_dict())
    weights.write_model(tmp_path / "whole", gathered, model=model, args=arguments())
    base = {name: tensor for name, tensor in gathered.items() if "lora_" not in name}
    with pytest.raises(CheckpointError, match="without a tensor"):
        weights.write_model(tmp_path / "lost", base, model=model, args=arguments())


def test_config_names_the_format_of_gathered_weights(tmp_path) -> None:
    masters = {name: tensor.clone() for name, tensor in llama().state_dict().items()}
    weights.write_model(tmp_path, masters, model=llama().bfloat16(), args=arguments())
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"


class WritesItself(torch.nn.Module):
    """A hand-written model with a `save_pretrained` of its own, as old as the script it is from."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder, self.head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)

    def save_pretrained(self, path: str, **kwargs: Any) -> None:
        torch.save(self.encoder.state_dict(), Path(path) / "encoder.pt")


class WritesByName(WritesItself):
    """One that takes what it is to write by name, and is trusted with it."""

    def save_pretrained(self, path: str, *, state_dict: Any = None, is_main_process: bool = True) -> None:  # type: ignore[override]
        save_file(dict(self.state_dict() if state_dict is None else state_dict), Path(path) / "model.safetensors")
        (Path(path) / "own.txt").write_text(str(is_main_process))


@pytest.mark.parametrize("background", [False, True])
def test_a_save_pretrained_of_ones_own_loses_no_weights(tmp_path: Path, background: bool) -> None:
    for kind, files in ((WritesItself, {"model.safetensors"}), (WritesByName, {"model.safetensors", "own.txt"})):
        model, other, folder = kind(), kind(seed=1), tmp_path / kind.__name__
        writer = CheckpointWriter(asynchronous=background)
        with writer.collecting():
            weights.write_model(folder, None, model=model, args=arguments(), writer=writer)
        writer.launch(lambda error: None)
        writer.wait()
        assert {path.name for path in folder.iterdir()} == {*files, layout.TRAINING_ARGS}
        weights.load_weights(folder, other)
        assert equal(model, other)
