import pytest
import torch

from finetune.errors import ArgumentError
from finetune.optim.options import OptimOptions


def test_typed_values():
    options = OptimOptions("rank=64, scale = 0.1, flag=True, name=std, lr@a.*b=1e-3", "x")
    assert options.take("rank", int, 1) == 64
    assert options.take("scale", float, 1.0) == 0.1
    assert options.take("flag", bool, False) is True
    assert options.choice("name", ("std", "left"), "left") == "std"
    assert options.take("absent", int, 7) == 7
    assert options.learning_rates == {"a.*b": 1e-3}
    options.finish()


def test_a_mapping_is_read_too():
    assert OptimOptions({"rank": 8}).take("rank", int, 1) == 8


def test_signature_types_follow_the_defaults():
    kwargs = OptimOptions("momentum=1, nesterov=true, foreach=none").for_signature(torch.optim.SGD)
    assert kwargs == {"momentum": 1.0, "nesterov": True, "foreach": None}
    assert type(kwargs["momentum"]) is float


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rank", ["`rank` is not `key=value`"]),
        ("rank=x", ["`rank=x` must be an integer"]),
        ("flag=maybe", ["true or false"]),
        ("name=sdt", ["Did you mean `std`"]),
        ("rnak=1", ["`rnak`", "Did you mean `rank`"]),
        ("lr=1", ["`learning_rate`"]),
        ("lr@q=fast", ["`lr@q=fast` must be a number"]),
    ],
)
def test_errors(text, words):
    with pytest.raises(ArgumentError) as error:
        options = OptimOptions(text, "x")
        options.take("rank", int, 1)
        options.take("flag", bool, False)
        options.choice("name", ("std", "left"), "std")
        options.finish()
    assert all(word in str(error.value) for word in words)
