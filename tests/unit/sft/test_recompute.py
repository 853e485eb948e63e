"""Whether activations are kept: what is measured, and each reason to recompute them anyway."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import finetune
from finetune.kernels.attention import backbone_of
from finetune.models.activation import activation_checkpointing
from finetune.sft import recompute
from finetune.wrappers import unwrap_peft

ARGS: dict[str, Any] = {
    "gradient_checkpointing": None,
    "world_size": 1,
    "n_gpu": 0,
    "activation_offloading": False,
    "activation_checkpointing_kwargs": None,
    "device": "cpu",
}


def decide(model: Any, longest_row: int | None = 64, num_rows: int = 2, fsdp: bool = False, **changed: Any) -> Any:
    args = SimpleNamespace(**{**ARGS, **changed})
    return recompute.decide(
        model, args, num_rows=num_rows, longest_row=longest_row, autocast=nullcontext(), fsdp_recomputes=fsdp
    )


def kept_really(model: Any, rows: int, length: int) -> int:
    """Bytes of all storages that the graph of one pass holds, counted by hand, without those of the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = backbone_of(unwrap_peft(model))(input_ids=torch.ones(rows, length, dtype=torch.long), use_cache=False)
    del output
    return sum(size for pointer, size in found.items() if pointer not in weights)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_longer_and_more_rows_are_foreseen(attention: str, tiny_llama: Any) -> None:
    model = tiny_llama(attn_implementation=attention)
    foreseen, real = recompute.kept_bytes(model)(3, 200), kept_really(model, 3, 200)
    assert foreseen == pytest.approx(real, rel=0.1)


def test_measuring_leaves_the_model_and_the_generators_alone(tiny_llama: Any) -> None:
    model = tiny_llama(attention_dropout=0.3).eval()
    before, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    recompute.kept_bytes(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


def test_recomputing_keeps_less(tiny_llama: Any) -> None:
    model = tiny_llama()
    kept = recompute.kept_bytes(model)(2, 128)
    with activation_checkpointing(model):
        assert recompute.kept_bytes(model)(2, 128) < kept / 2


def test_small_activations_are_kept_and_large_ones_are_not(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    trained = 12 * sum(p.numel() for p in model.parameters())
    needed = recompute.kept_bytes(model)(2, 64)
    monkeypatch.setattr(recompute, "free_bytes", lambda device: trained + 4 * needed + 4)
    assert not decide(model).recomputes
    assert decide(model, longest_row=65).recomputes
    assert decide(model, num_rows=3).recomputes
    monkeypatch.setattr(recompute, "free_bytes", lambda device: trained // 2)
    assert decide(model).recomputes, "gradients and moments do not fit themselves"


def test_what_was_asked_for_decides(tiny_llama: Any) -> None:
    model = tiny_llama()
    assert decide(model, gradient_checkpointing=True).recomputes
    assert not decide(model, gradient_checkpointing=False, world_size=2).recomputes


@pytest.mark.parametrize(
    "changed",
    [
        {"world_size": 2},
        {"n_gpu": 2},
        {"activation_offloading": True},
        {"activation_checkpointing_kwargs": {"use_reentrant": False}},
        {"longest_row": None},
        {"device": "mps"},
    ],
    ids=str,
)
def test_recomputed_where_little_is_known(changed: dict[str, Any], tiny_llama: Any) -> None:
    assert decide(tiny_llama(), **changed).recomputes


def test_fsdp_recomputes_itself(tiny_llama: Any) -> None:
    assert not decide(tiny_llama(), world_size=2, fsdp=True).recomputes


def test_a_model_that_cannot_be_measured_is_recomputed() -> None:
    decision = decide(torch.nn.Linear(2, 2))
    assert decision.recomputes
    assert "could not be measured" in str(decision)


def test_longest_row() -> None:
    from datasets import Dataset

    rows = Dataset.from_list([{"input_ids": [1] * n} for n in (3, 9, 4)])
    assert recompute.longest_row(rows, 1024) == 9
    assert recompute.longest_row(iter([]), 1024) == 1024
    assert recompute.longest_row(iter([]), None) is None


def test_both_ways_train_the_same_and_say_which(
    tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ends = []
    for name, chosen in (("unset", None), ("always", True), ("never", False)):
        trainer = finetune.SFTTrainer(
            tiny_llama(vocab_size=512, attention_dropout=0.1),
            finetune.SFTConfig(
                str(tmp_path / name), max_steps=3, use_cpu=True, report_to="none", gradient_checkpointing=chosen
            ),
            train_dataset=[{"text": f"the cat sat on the mat {'and slept ' * (i % 4)}"} for i in range(24)],
            processing_class=chat_tokenizer,
        )
        trainer.train()
        assert trainer.args.gradient_checkpointing is chosen
        ends.append(trainer.model.state_dict())
        said = {"unset": "kept: at most", "always": "recomputed:", "never": "kept: `gradient_checkpointing`"}[name]
        assert said in capfd.readouterr().err
    for other in ends[1:]:
        assert all(torch.equal(ends[0][key], other[key]) for key in other)
