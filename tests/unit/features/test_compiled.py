"""Layers compiled in place: few graphs, the same numbers, names and calls as before."""

import pytest
import torch
from datasets import Dataset
from safetensors import safe_open
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from finetune import SFTConfig, SFTTrainer
from finetune.cli.demo import MODEL
from finetune.errors import ArgumentError
from finetune.features.compiled import compiled_blocks, length_bucket, repeated_blocks


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def llama(layers=6):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1536, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2
        )
    )


def is_compiled(module):
    return module.__dict__.get("_compiled_call_impl") is not None


def loss_of(model, length):
    ids = torch.arange(2 * length).reshape(2, length) % 60
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    return model(input_ids=ids, labels=ids, attention_mask=mask, use_cache=False).loss


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_equal_layers_share_graphs_whatever_the_length(backend):
    model = llama().train()
    wanted = [loss_of(model, length) for length in (8, 16, 24, 32)]
    names = list(model.state_dict())
    with compiled_blocks(model, backend=backend) as count:
        assert all(is_compiled(layer) for layer in model.model.layers) and not is_compiled(model)
        found = [loss_of(model, length) for length in (8, 16, 24, 32)]
        found[0].backward()
        # One for the first length, one for every other.
        assert count.logs() == {"compiled_graphs": 2.0}
        assert list(model.state_dict()) == names
    torch.testing.assert_close(torch.stack(found), torch.stack(wanted))
    assert not any(is_compiled(module) for module in model.modules())


def test_calls_return_after_an_error_and_keep_what_the_user_compiled():
    model = llama(2)
    model.model.layers[1].compile(backend="eager")
    mine = model.model.layers[1].__dict__["_compiled_call_impl"]
    with pytest.raises(KeyError), compiled_blocks(model, backend="eager"):
        assert model.model.layers[1].__dict__["_compiled_call_impl"] is not mine
        raise KeyError
    assert not is_compiled(model.model.layers[0]) and model.model.layers[1].__dict__["_compiled_call_impl"] is mine


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x):
        return self.inner(x).relu()


def test_a_model_without_layers_is_compiled_whole():
    model = Plain()
    assert repeated_blocks(model) == []
    with compiled_blocks(model, backend="eager") as count:
        assert is_compiled(model)
        model(torch.ones(1, 2))
        assert count.logs() == {"compiled_graphs": 1.0}
    with (
        pytest.raises(ArgumentError, match=r"'inductr'.*Did you mean `inductor`"),
        compiled_blocks(model, backend="inductr"),
    ):
        pass


def test_outermost_lists_count():
    inner = nn.ModuleList([nn.Linear(1, 1)])
    model = nn.ModuleDict({"a": nn.ModuleList([inner, nn.Linear(2, 2)]), "ab": nn.ModuleList([nn.Linear(3, 3)])})
    assert repeated_blocks(model) == [inner, model["a"][1], model["ab"][0]]


def test_buckets():
    assert [length_bucket(n) for n in (None, 64, 512, 513, 4096)] == [64, 64, 64, 128, 512]
    # No row is padded beyond the positions that the model has.
    assert [length_bucket(*pair) for pair in ((500, 512), (100, 120), (40, 40), (None, 40), (7, 7))] == [
        64,
        16,
        8,
        8,
        1,
    ]


def test_sft_pads_to_few_lengths_and_saves_plain_names(tmp_path):
    make = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(5, 1500, (n,), generator=make).tolist()} for n in (10, 70, 20, 90, 30, 50)]
    losses = {}
    for backend in (None, "eager"):
        args = SFTConfig(
            str(tmp_path), max_steps=6, per_device_train_batch_size=1, max_length=128, logging_steps=1, use_cpu=True,
            torch_compile_backend=backend, save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = SFTTrainer(
            llama(4), args, train_dataset=Dataset.from_list(rows), processing_class=AutoTokenizer.from_pretrained(MODEL)
        )
        seen = set()
        compute = trainer.compute_loss

        def watched(model, inputs, *rest, seen=seen, compute=compute, **more):
            seen.add(inputs["input_ids"].shape[1])
            return compute(model, inputs, *rest, **more)

        trainer.compute_loss = watched
        trainer.train()
        losses[backend] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert seen == {64, 128}
    assert trainer.state.log_history[-2]["compiled_graphs"] == 2.0
    assert losses["eager"] == pytest.approx(losses[None], rel=1e-4)
    trainer.save_model(str(tmp_path / "saved"))
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        assert sorted(file.keys()) == sorted(trainer.model.state_dict()) and not any(
            "_orig" in name for name in trainer.model.state_dict()
        )
