"""Options of loading: which act, which are left out, and what is said."""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

import finetune
from finetune.models.load_options import options_of_config, warn_of_unused_options, without_device_map

MAP = {"device_map": "auto", "dtype": "float32"}


def arguments(world_size: int = 1, deepspeed_plugin: Any = None) -> Any:
    return SimpleNamespace(world_size=world_size, deepspeed_plugin=deepspeed_plugin)


@pytest.mark.parametrize(
    ("args", "said"), [(arguments(2), "2 processes train"), (arguments(1, object()), "DeepSpeed places the model")]
)
def test_a_device_map_is_left_out_where_each_process_has_its_device(args: Any, said: str) -> None:
    given = dict(MAP)
    with pytest.warns(UserWarning, match=rf"`model_init_kwargs\['device_map'\]` is 'auto', and {said}"):
        assert without_device_map(given, args) == {"dtype": "float32"}
    assert given == MAP


def test_one_process_keeps_its_device_map() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert without_device_map(MAP, arguments()) == MAP
        assert without_device_map({"device_map": None}, arguments(2)) == {"device_map": None}
        assert without_device_map({"dtype": "auto"}, arguments(2)) == {"dtype": "auto"}


@pytest.mark.parametrize("kind", ["sft", "classification"])
def test_both_trainers_leave_it_out(
    kind: str, tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import finetune.sequence_classification.build as classification_build
    import finetune.sft.build as sft_build
    from finetune.sequence_classification.labels import SINGLE, Task

    tiny_llama(512).save_pretrained(tmp_path / "model")
    folder, options = str(tmp_path / "model"), {"use_cpu": True, "model_init_kwargs": {"device_map": "cpu"}}
    seen: list[Any] = []
    for module in (sft_build, classification_build):
        monkeypatch.setattr(module, "load_model", lambda *_, model_init_kwargs, **__: seen.append(model_init_kwargs))

    def load() -> dict[str, Any]:
        if kind == "sft":
            args = finetune.SFTConfig(str(tmp_path), **options)
            sft_build.load_model_for_sft(args, folder, sft_build.SFTTokenizer(chat_tokenizer, [], False), None, None)
        else:
            args = finetune.SequenceClassificationConfig(str(tmp_path), **options)
            config = classification_build.config_of(folder, args)
            task = Task(SINGLE, ("a", "b"))
            classification_build.load_classifier(folder, config, args, task, None)
        return seen[-1]

    assert load()["device_map"] == "cpu"
    monkeypatch.setattr("finetune.TrainingArguments.world_size", 2)
    with pytest.warns(UserWarning, match="device_map"):
        assert "device_map" not in load()


def test_options_without_effect_are_named_once_with_a_remedy() -> None:
    with pytest.warns(UserWarning) as caught:
        warn_of_unused_options(object(), {"dtype": "auto"}, object())
    (said,) = [str(each.message) for each in caught]
    assert "drop `model_init_kwargs` and `quantization_config`" in said
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_unused_options(object(), {}, None)


def test_a_loaded_classifier_warns_too(tiny_bert: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    args = finetune.SequenceClassificationConfig(str(tmp_path), use_cpu=True, model_init_kwargs={"dtype": "float32"})
    rows = Dataset.from_dict({"input_ids": [[1, 2], [3, 4], [5, 6]], "label": [0, 1, 2]})
    with pytest.warns(UserWarning, match="no effect of `model_init_kwargs`"):
        finetune.SequenceClassificationTrainer(tiny_bert(), args, train_dataset=rows, processing_class=chat_tokenizer)


def test_the_configuration_is_read_from_where_the_weights_are() -> None:
    given = {"revision": "v2", "dtype": "auto", "token": None, "subfolder": "inner"}
    assert options_of_config(given) == {"revision": "v2", "subfolder": "inner"}
    assert options_of_config(None) == {}
