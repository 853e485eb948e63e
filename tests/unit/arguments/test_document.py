"""`help(SFTConfig)`: every field is in it, and it costs nothing before it is asked for."""

import dataclasses
import pydoc

import pytest

from finetune.arguments import TrainingArguments, base
from finetune.sequence_classification.config import SequenceClassificationConfig
from finetune.sft.config import SFTConfig


@pytest.mark.parametrize("cls", [TrainingArguments, SFTConfig, SequenceClassificationConfig])
def test_help_has_every_field_with_its_help_text(cls):
    shown = pydoc.plain(pydoc.render_doc(cls))
    flat = " ".join(shown.replace("|  ", " ").split())
    for field in dataclasses.fields(cls):
        if field.init:
            assert f" {field.name} (" in flat
            assert " ".join(field.metadata["help"].split()) in flat


def test_a_field_is_shown_with_type_and_default():
    assert "max_length (int | None, default 1024): Longest sequence in tokens" in SFTConfig.__doc__
    assert "optim (OptimizerNames | str, default 'adamw_torch" in SFTConfig.__doc__
    assert SFTConfig.__doc__.index("\nArgs:") < SFTConfig.__doc__.index("\nRaises:")


def test_fields_of_a_users_class_are_in_its_docstring_too():
    @dataclasses.dataclass
    class Mine(SFTConfig):
        """Mine."""

        flavour: str = "plain"

    @dataclasses.dataclass
    class Undocumented(SFTConfig):
        flavour: str = "plain"

    assert Mine.__doc__.startswith("Mine.\n\nArgs:\n")
    assert "flavour (str, default 'plain'):" in Mine.__doc__
    assert Undocumented.__doc__.startswith("Undocumented(output_dir")


def test_the_section_is_written_when_it_is_read(monkeypatch):
    calls = []
    monkeypatch.setattr(base, "with_fields", lambda cls, doc: calls.append(cls) or f"{doc} With fields.")

    @dataclasses.dataclass
    class Mine(TrainingArguments):
        """Mine."""

    assert calls == []
    assert Mine.__doc__ == "Mine. With fields."
