"""What the environment variables say, read the same way everywhere."""

import os

import pytest

from finetune import environment
from finetune.errors import ArgumentError


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "PMI_RANK", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name in ("MV2_COMM_WORLD_RANK", *(name for name in os.environ if name.startswith("ACCELERATE_"))):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("word", ["y", "Yes", "t", "TRUE", " on ", "1", True, 1])
def test_true_words(word) -> None:
    assert environment.parse_bool("x", word) is True


@pytest.mark.parametrize("word", ["n", "No", "f", "FALSE", "off", "0", False, 0])
def test_false_words(word) -> None:
    assert environment.parse_bool("x", word) is False


@pytest.mark.parametrize("word", ["maybe", ""])
def test_other_words_are_refused_with_the_name(word: str, monkeypatch) -> None:
    with pytest.raises(ArgumentError, match=f"`x='{word}'` must be true or false"):
        environment.parse_bool("x", word)
    monkeypatch.setenv("ACCELERATE_USE_CPU", word)
    with pytest.raises(ArgumentError, match="ACCELERATE_USE_CPU"):
        environment.launched_on_cpu()


def test_what_the_launcher_was_told(monkeypatch) -> None:
    assert not environment.launched_on_cpu()
    assert not environment.launched_sharding("fsdp")
    assert environment.launched_precision() == "no"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "True")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "BF16")
    assert environment.launched_on_cpu()
    assert environment.launched_sharding("fsdp") and environment.launched_sharding("FSDP")
    assert not environment.launched_sharding("deepspeed")
    assert environment.launched_precision() == "bf16"


def test_place_among_the_processes(monkeypatch) -> None:
    assert (environment.rank(), environment.world_size()) == (0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (environment.rank(), environment.world_size()) == (3, 4)
    assert not environment.was_launched(), "accelerate forms no group from RANK alone"
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert environment.was_launched()


def test_alone_against_orders(monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert not environment.is_alone_against_orders()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert environment.is_alone_against_orders()
    for name in ("RANK", "LOCAL_RANK", "MV2_COMM_WORLD_RANK"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "0")
            assert not environment.is_alone_against_orders()


def test_a_world_that_is_not_whole(monkeypatch) -> None:
    environment.require_whole_world(1, "there is none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    environment.require_whole_world(2, "there is none")
    with pytest.raises(ArgumentError, match=r"started 2 processes, but there is none.*use_cpu=True"):
        environment.require_whole_world(1, "there is none")


def test_a_variable_for_a_block(monkeypatch) -> None:
    monkeypatch.delenv("FINETUNE_TEST", raising=False)
    with pytest.raises(KeyError), environment.temporarily("FINETUNE_TEST", "1"):
        assert os.environ["FINETUNE_TEST"] == "1"
        raise KeyError
    assert "FINETUNE_TEST" not in os.environ
    monkeypatch.setenv("FINETUNE_TEST", "0")
    with environment.temporarily("FINETUNE_TEST", "1"):
        del os.environ["FINETUNE_TEST"]
    assert os.environ["FINETUNE_TEST"] == "0"
