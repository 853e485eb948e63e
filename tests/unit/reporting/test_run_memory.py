"""Predicted and measured memory of real runs, and the number formats they were found to use."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from finetune import SFTConfig, SFTTrainer, Trainer, TrainingArguments
from finetune.cli.demo import MODEL as DEMO
from finetune.errors import ArgumentError
from finetune.reporting.memory import bytes_of
from finetune.reporting.precision import LivePrecision
from finetune.reporting.report import report_from_run
from finetune.reporting.run_memory import FILE, RunMemory, memory_rows

CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
    tie_word_embeddings=True,
)  # fmt: skip


def trained(folder, trainer_class=Trainer, model=None, **changes):
    torch.manual_seed(0)
    ids = torch.randint(64, (4, 12)).tolist()
    rows = Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])
    values = {"max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True, "report_to": "none"}
    args = TrainingArguments(str(folder), save_strategy="no", disable_tqdm=True, **{**values, **changes})
    trainer = trainer_class(model or LlamaForCausalLM(CONFIG), args, train_dataset=rows)
    trainer.train()
    return trainer


GALORE = {"optim_target_modules": "all-linear", "optim_args": "rank=4"}


@pytest.mark.parametrize("optim", ["adamw_torch", "galore_adamw", "galore_adamw_layerwise", "galore_adafactor"])
def test_what_was_predicted_was_there(optim, tmp_path, capsys):
    changes = {"optim": optim, **(GALORE if "galore" in optim else {})}
    trainer = trained(tmp_path, **changes)
    weights = sum(p.numel() * 4 for p in trainer.model.parameters())
    content = json.loads((tmp_path / FILE).read_text())
    predicted, measured = content["predicted"], content["measured"]
    # Rotary frequencies are buffers. GaLore's step counters and energies are a few bytes for each weight.
    assert 0 <= predicted["weights"] - weights < 200 and measured["weights"] == predicted["weights"]
    assert measured["gradients"] == predicted["gradients"]
    assert measured["moments"] == pytest.approx(predicted["moments"], rel=0.05) and measured["moments"] > 1000
    assert measured["bases"] == predicted.get("bases", 0) and (measured["bases"] > 0) is ("galore" in optim)
    if optim == "galore_adamw_layerwise":
        assert measured["gradients"] < weights / 2
    text = capsys.readouterr().err
    assert "(predicted)" in text and "(measured)" in text
    assert ("GaLore projects 14 weights" in text) is ("galore" in optim)
    trainer.state.save_to_json(str(tmp_path / "trainer_state.json"))
    page = report_from_run(tmp_path).read_text()
    assert "<h2>Memory</h2>" in page and "moments" in page


def test_activations_are_measured_when_memory_is(tmp_path):
    kept = {}
    for name, checkpointing in (("plain", False), ("checkpointed", True)):
        trained(tmp_path / name, skip_memory_metrics=False, gradient_checkpointing=checkpointing)
        kept[name] = json.loads((tmp_path / name / FILE).read_text())["measured"]["activations"]
    trained(tmp_path / "default")
    assert "activations" not in json.loads((tmp_path / "default" / FILE).read_text())["measured"]
    assert 0 < kept["checkpointed"] < kept["plain"] / 2
    # 24 tokens: the logits and their log-probabilities alone are 2 x 24 x 64 floats.
    assert kept["plain"] > 2 * 24 * 64 * 4


def test_the_trace_is_part_of_the_prediction():
    args = SimpleNamespace(device="cpu", skip_memory_metrics=False, world_size=1)
    memory = RunMemory(nn.Linear(2, 2), torch.optim.SGD([nn.Parameter(torch.ones(1))]), args)
    assert memory.predicted == {"weights": 24, "gradients": 24}
    assert (
        "activations not predicted: `max_length`" in memory.start_text()
        and "moments known after" in memory.start_text()
    )
    rows = memory_rows({"predicted": {"weights": 24, "peak": 1024}, "measured": {"weights": 2048}})
    assert rows == [
        {"group": "weights", "predicted": "24 B", "measured": "2.0 KiB"},
        {"group": "peak", "predicted": "1.0 KiB"},
    ]


class Inner(Trainer):
    """Calls the backbone behind autocast's back."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        base = self.model
        hidden = base.model(input_ids=inputs["input_ids"]).last_hidden_state
        loss = base.lm_head(hidden).float().square().mean()
        return (loss, {"loss": loss}) if return_outputs else loss


def test_bf16_that_is_not_live_is_an_error(tmp_path, capsys):
    with pytest.raises(ArgumentError, match=r"`bf16=True`.*float32.*compute_loss"):
        trained(tmp_path, Inner, bf16=True)
    trainer = trained(tmp_path, Inner)
    assert trainer.state.global_step == 1
    capsys.readouterr()
    trained(tmp_path, bf16=True)
    live = "parameters float32; linear layers bfloat16; gradients float32; optimizer float32"
    said = capsys.readouterr().err
    assert f"After the first step\n  dtypes  {live}\n" in said and said.index("After the first") < said.index("Trained")


class Lowered(Trainer):
    """Computes in 16 bits although nobody asked for it."""

    def compute_loss(self, *args, **kwargs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().compute_loss(*args, **kwargs)


def test_autocast_that_nobody_asked_for_is_an_error(tmp_path):
    with pytest.raises(ArgumentError, match=r"float32 and neither `bf16` nor `fp16`.*bfloat16"):
        trained(tmp_path, Lowered)
    trained(tmp_path, Lowered, bf16=True)


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "galore_adamw_8bit"])
def test_an_8_bit_state_that_is_none_is_an_error(optim, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    changes = {"optim": optim, **(GALORE if "galore" in optim else {})}
    tiny = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )  # fmt: skip
    with pytest.raises(ArgumentError, match=rf"`optim={optim}`.*float32.*4,096 values"):
        trained(tmp_path, model=LlamaForCausalLM(tiny), **changes)
    if optim == "adamw_bnb_8bit":
        capsys.readouterr()
        trained(tmp_path, **changes)
        assert "uint8" in capsys.readouterr().err


def test_a_launcher_asks_for_precision_too():
    model = nn.Sequential(nn.Linear(2, 2))
    watch = LivePrecision(SimpleNamespace(bf16=False, fp16=False, mixed_precision="bf16"))
    with pytest.raises(ArgumentError, match="asks for bfloat16"), watch.micro_batch(model):
        model(torch.ones(1, 2))


def test_quantised_states_count_with_what_they_hold():
    class Packed(torch.Tensor):
        """A float tensor on paper, bytes in memory; as torchao's states are."""

        @staticmethod
        def __new__(cls, codes):
            return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

        def __init__(self, codes):
            self.codes, self.scale = codes, torch.ones(4)

        def __tensor_flatten__(self):
            return ["codes", "scale"], None

        __torch_dispatch__ = None

    packed = Packed(torch.zeros(100, dtype=torch.uint8))
    assert bytes_of([packed], set()) == 100 + 16
    optimizer = SimpleNamespace(state={0: {"exp_avg": packed}})
    watch = LivePrecision(SimpleNamespace(bf16=False, fp16=False, optim="adamw_torch_8bit"))
    watch.after_update(nn.Linear(1, 1), optimizer)
    assert watch.text == "optimizer uint8, float32"


def test_precision_leaves_no_hook():
    model = nn.Sequential(nn.Linear(2, 2))
    watch = LivePrecision(SimpleNamespace(bf16=False, fp16=True))
    with pytest.raises(ArgumentError, match="`fp16=True` asks for float16"), watch.micro_batch(model):
        model(torch.ones(1, 2))
    assert not model[0]._forward_hooks
    with watch.micro_batch(model):
        assert not model[0]._forward_hooks


def test_a_traced_run(tmp_path):
    """`SFTTrainer` on one process with memory metrics: the prediction is traced, and the measured share of it fits."""
    rows = Dataset.from_list([{"input_ids": list(range(5, 69))} for _ in range(4)])
    args = SFTConfig(
        str(tmp_path), max_steps=1, per_device_train_batch_size=4, max_length=64, use_cpu=True, save_strategy="no",
        report_to="none", skip_memory_metrics=False, gradient_checkpointing=False,
    )  # fmt: skip
    state = torch.random.get_rng_state()
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype="float32")
    memory = RunMemory(model, torch.optim.AdamW(model.parameters()), args)
    assert torch.equal(torch.random.get_rng_state(), state) and memory.unknown == ""
    SFTTrainer(model, args, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(DEMO)).train()
    content = json.loads((tmp_path / FILE).read_text())
    predicted, measured = content["predicted"], content["measured"]
    assert predicted == memory.predicted and predicted["peak"] > predicted["activations"] > predicted["weights"]
    assert measured["activations"] == pytest.approx(predicted["activations"], rel=0.1)
    several = SimpleNamespace(device="cpu", skip_memory_metrics=False, world_size=2)
    assert "--num_processes" in RunMemory(model, None, several).unknown


def test_the_header_says_who_computes_the_loss(tmp_path, capsys, monkeypatch):
    from finetune.sft import loss_methods as sft

    for reason, text in (
        (None, "loss fused with the head, without logits"),
        ("Liger's `fused_linear_cross_entropy` owns its head already", "loss Liger's fused head"),
        ("its head is odd", "loss from all logits: its head is odd"),
    ):
        if reason is not None:
            monkeypatch.setattr(sft, "unsupported_reason", lambda model, reason=reason: reason)
        args = SFTConfig(str(tmp_path), max_steps=1, use_cpu=True, save_strategy="no", report_to="none")
        rows = Dataset.from_list([{"input_ids": list(range(5, 20))}])
        model = AutoModelForCausalLM.from_pretrained(DEMO, dtype="float32")
        SFTTrainer(model, args, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(DEMO)).train()
        assert text in re.sub(" +", " ", capsys.readouterr().err)
