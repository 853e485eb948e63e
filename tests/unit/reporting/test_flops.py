from types import SimpleNamespace

import pytest
import torch
from torch import nn

from finetune.reporting import flops


def test_same_count_as_transformers(tiny_llama):
    from transformers import Trainer

    model = tiny_llama()
    inputs = {"input_ids": torch.zeros(2, 7, dtype=torch.long)}
    theirs = Trainer.floating_point_ops(SimpleNamespace(model=model), inputs)
    assert flops.floating_point_ops(model, inputs) == theirs > 0
    assert flops.floating_point_ops(model, {"input_ids": inputs["input_ids"][:1]}) == theirs // 2


def test_parameters_are_counted_once_per_model():
    class Counting(nn.Module):
        calls = 0

        def num_parameters(self, exclude_embeddings):
            assert exclude_embeddings
            Counting.calls += 1
            return 1000

    model = Counting()
    assert [flops.floating_point_ops(model, {"input_ids": torch.zeros(2, 8)}) for _ in range(3)] == [96_000] * 3
    assert Counting.calls == 1


def test_models_and_batches_that_cannot_be_counted():
    plain = nn.Linear(2, 2)
    assert flops.floating_point_ops(plain, {"input_ids": torch.zeros(2)}) == 0
    plain.num_parameters = lambda exclude_embeddings: 5
    assert flops.floating_point_ops(plain, {"pixels": torch.zeros(2)}) == 0
    assert flops.floating_point_ops(plain, [torch.zeros(2)]) == 0
    plain.main_input_name = "pixels"
    assert flops.floating_point_ops(plain, {"pixels": torch.zeros(2)}) == 60


def test_a_models_own_count_is_asked_first():
    model = SimpleNamespace(floating_point_ops=lambda inputs: 7.0)
    assert flops.floating_point_ops(model, {}) == 7


def test_sum_over_processes():
    def reduce(tensor, reduction):
        assert tensor.dtype == torch.float64 and reduction == "sum"
        return tensor * 4

    alone = SimpleNamespace(num_processes=1)
    four = SimpleNamespace(num_processes=4, device=torch.device("cpu"), reduce=reduce)
    assert flops.sum_over_processes(1e17 + 16, alone) == 1e17 + 16
    assert flops.sum_over_processes(1e17 + 16, four) == 4 * (1e17 + 16)


def test_utilisation(monkeypatch):
    assert flops.model_flops_utilization(1e12, 1.0, "cpu") is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert flops.model_flops_utilization(989e12, 4.0, "cuda:0") == pytest.approx(0.25)
    assert flops.model_flops_utilization(989e12, 4.0, "cuda:0", num_devices=2) == pytest.approx(0.125)
    assert flops.model_flops_utilization(1.0, 0.0, "cuda:0") is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A40", 150e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("Tesla T4", 65e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA T400 4GB", None),
        ("?", None),
    ],
)
def test_peaks(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert flops.peak_flops_per_second("cuda") == peak
