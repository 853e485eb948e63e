import pytest
import torch
from torch import nn

from finetune.errors import ArgumentError
from finetune.optim.groups import parameter_groups, partition, target_weight_names


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 4)})
        self.mlp = nn.ModuleDict({"up": nn.Linear(4, 8)})
        self.ln = nn.LayerNorm(4)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 10)

    def get_output_embeddings(self):
        return self.head


ALL = [f"layers.{i}.{m}.weight" for i in range(2) for m in ("attn.q", "attn.k", "mlp.up")]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", ALL),
        ("all_linear", ALL),
        (["attn", "mlp"], ALL),
        ([r".*.attn.*", r".*.mlp.*"], ALL),
        ([r"layers\.0\..*"], ALL[:3]),
        (["layers.1.attn.q"], [ALL[3]]),
        (r".*\.up", [ALL[2], ALL[5]]),
        (["q", "layers.0.mlp.up"], [ALL[0], ALL[2], ALL[3]]),
    ],
)
def test_targets(targets, expected):
    assert target_weight_names(Model(), targets, "galore_adamw") == expected


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["atn.q"], ["`optim_target_modules`", "`atn.q`", "Did you mean"]),
        (["attn", "mpl"], ["`mpl`", "Did you mean `"]),
        ("attn", ["`attn`", "layers.*.attn.q"]),
        (None, ["`optim=galore_adamw`", "None"]),
        (3, ["Given: 3"]),
        ([], ["Given: []"]),
        (["("], ["not a regular expression"]),
        (["embed"], ["`embed`"]),
    ],
)
def test_target_errors(targets, words):
    with pytest.raises(ArgumentError) as error:
        target_weight_names(Model(), targets, "galore_adamw")
    assert all(word in str(error.value) for word in words)


def test_frozen_weights_are_not_targets():
    model = Model()
    model.layers[0].requires_grad_(False)
    assert target_weight_names(model, "all-linear", "galore_adamw") == ALL[3:]
    model.requires_grad_(False)
    with pytest.raises(ArgumentError, match="no linear layer"):
        target_weight_names(model, "all-linear", "galore_adamw")


def test_learning_rates_by_pattern_first_match_wins():
    model = Model()
    groups = parameter_groups(model, 0.1, learning_rates={r"layers\.0": 1e-4, r"layers\.\d\.attn": 1e-5})
    seen = [(g["weight_decay"], g.get("lr"), len(g["params"])) for g in groups]
    # decayed: embed and head, three linears of block 0, two of block 1; the `up` of block 1 keeps the usual rate
    assert seen == [(0.1, None, 3), (0.1, 1e-4, 3), (0.1, 1e-5, 2), (0.0, None, 4), (0.0, 1e-4, 5), (0.0, 1e-5, 2)]
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_learning_rate_pattern_without_match_is_an_error():
    with pytest.raises(ArgumentError, match="`emebd`"):
        parameter_groups(Model(), 0.1, learning_rates={"emebd": 1e-4})


def test_given_decay_names_win():
    model = Model()
    groups = parameter_groups(model, 0.1, decay_names=["head.bias"])
    assert [len(g["params"]) for g in groups] == [1, len(list(model.parameters())) - 1]
    assert groups[0]["params"][0] is model.head.bias


def test_a_model_that_is_one_linear_layer():
    assert target_weight_names(nn.Linear(4, 4), "all-linear", "galore_adamw") == ["weight"]


def test_partition_splits_each_group_and_keeps_its_keys():
    a, b, c = (nn.Parameter(torch.ones(1)) for _ in range(3))
    groups = partition(
        [{"params": [a, b], "lr": 1}, {"params": [c], "lr": 2}], [([b], {"rank": 4}), ([c], {"bits": 8})]
    )
    assert groups == [
        {"params": [a], "lr": 1},
        {"params": [b], "lr": 1, "rank": 4},
        {"params": [c], "lr": 2, "bits": 8},
    ]
