import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from finetune.control.state import TrainerState
from finetune.hub import card, repo

HISTORY = [
    {"loss": 2.5, "epoch": 0.5, "step": 5},
    {
        "eval_loss": 2.0,
        "eval_accuracy": 0.5,
        "eval_runtime": 1.0,
        "eval_steps_per_second": 3.0,
        "epoch": 1.0,
        "step": 10,
    },
    {"loss": 1.5, "epoch": 1.5, "step": 15},
    {"eval_loss": 1.25, "eval_accuracy": 0.75, "epoch": 2.0, "step": 20},
    {"train_runtime": 3.0, "train_loss": 2.0, "step": 20},
]


class TinyForCausalLM:
    model_tags = ["mine"]

    def __init__(self, name):
        self.config = SimpleNamespace(_name_or_path=name)


def arguments(folder, **changes):
    values = {
        "output_dir": str(folder),
        "learning_rate": 2e-5,
        "train_batch_size": 4,
        "eval_batch_size": 8,
        "seed": 42,
        "world_size": 2,
        "gradient_accumulation_steps": 3,
        "optim": "adamw_torch",
        "optim_args": None,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 10,
        "max_steps": -1,
        "num_train_epochs": 2.0,
        "mixed_precision": "bf16",
        "label_smoothing_factor": 0.0,
        "hub_token": "hf_secret",
    }
    return SimpleNamespace(**{**values, **changes})


class FakeTrainer:
    create_model_card = card.create_model_card
    _tag_names = ["trl", "sft"]

    def __init__(self, folder, name="org/base", first=True):
        self.args, self.first, self.hub_model_id = arguments(folder), first, "me/model"
        self.model = TinyForCausalLM(name)
        self.state = TrainerState(log_history=HISTORY)
        self.train_dataset = [1] * 1200
        self.eval_dataset = {"easy": [1, 2], "stream": iter([])}

    def is_world_process_zero(self):
        return self.first


def written(folder):
    text = Path(folder, "README.md").read_text()
    _, metadata, body = text.split("---\n", 2)
    return yaml.safe_load(metadata), body


def test_the_card_says_what_how_and_with_which_result(tmp_path):
    FakeTrainer(tmp_path).create_model_card(dataset="org/data", tags="mytag", license="mit", language="en")
    metadata, body = written(tmp_path)
    assert metadata["base_model"] == "org/base" and metadata["datasets"] == ["org/data"]
    assert metadata["library_name"] == "transformers" and metadata["pipeline_tag"] == "text-generation"
    assert metadata["tags"] == ["mytag", "generated_from_trainer", "trl", "sft", "mine"]
    assert (metadata["license"], metadata["language"]) == ("mit", ["en"])
    result = metadata["model-index"][0]["results"][0]
    assert {metric["name"]: metric["value"] for metric in result["metrics"]} == {"Loss": 1.25, "Accuracy": 0.75}
    assert result["dataset"]["type"] == "org/data"
    assert "- training: 1,200 rows" in body and "- evaluation easy: 2 rows" in body
    assert "| 2.5000 | 1.0000 | 10 | 2.0000 | 0.5000 |" in body and "| 1.5000 | 2.0000 | 20 | 1.2500 | 0.7500 |" in body
    assert "- total_train_batch_size: 24" in body and "- mixed_precision_training: bf16" in body
    assert 'model="me/model"' in body and "- torch: " in body


def test_no_token_and_no_path_of_this_machine(tmp_path):
    FakeTrainer(tmp_path / "out", name=str(tmp_path)).create_model_card()
    metadata, body = written(tmp_path / "out")
    assert "base_model" not in metadata and "a local model" in body
    assert "hf_secret" not in body and str(tmp_path) not in body
    assert "model-index" not in metadata  # results without a dataset are refused by the Hub


def test_other_processes_write_nothing(tmp_path):
    FakeTrainer(tmp_path, first=False).create_model_card()
    assert not (tmp_path / "README.md").exists()


def test_a_second_card_keeps_tags_and_licence(tmp_path):
    trainer = FakeTrainer(tmp_path)
    trainer.create_model_card(tags=["first"], license="mit")
    trainer.create_model_card(tags=["second"])
    metadata, _ = written(tmp_path)
    assert metadata["tags"][0] == "second" and "first" in metadata["tags"] and metadata["license"] == "mit"


@pytest.mark.parametrize("text", ["# By hand\n", "---\ntags: [mine]\n---\n# By hand\n", "---\n: [\n---\nx"])
def test_a_card_by_hand_is_left_alone(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    FakeTrainer(tmp_path).create_model_card()
    assert (tmp_path / "README.md").read_text() == text


def test_the_card_that_peft_writes_is_replaced(tmp_path):
    (tmp_path / "README.md").write_text("---\nlibrary_name: peft\ntags: [lora]\n---\nempty template")
    trainer = FakeTrainer(tmp_path)
    trainer.model.peft_config = {"default": object()}
    trainer.create_model_card()
    metadata, body = written(tmp_path)
    assert metadata["library_name"] == "peft" and "lora" in metadata["tags"] and "adapter for [org/base]" in body


def test_data_sets_of_the_hub_are_recognised_and_files_are_not(tmp_path):
    from datasets import Dataset

    trainer = FakeTrainer(tmp_path)
    trainer.train_dataset = Dataset.from_dict({"a": [1]})
    trainer.train_dataset.info.builder_name = "squad"
    trainer.train_dataset.info.config_name = "plain"
    trainer.eval_dataset = Dataset.from_dict({"a": [1]})
    trainer.eval_dataset.info.builder_name = "json"
    described = card.describe(trainer)
    assert described.datasets == ["squad"] and described.dataset_args == ["plain"]
    assert described.rows == {"training": 1, "evaluation": 1}


def test_sft_arguments(tmp_path):
    card.create_sft_model_card(FakeTrainer(tmp_path), model_name="tiny", dataset_name="org/data", tags="x")
    metadata, _ = written(tmp_path)
    assert (metadata["model_name"], metadata["datasets"]) == ("tiny", ["org/data"])


def test_without_history():
    assert card.evaluations([]) == ([], {})
    assert "## Results" not in card.render(card.Card(model_name="m"))


def test_signatures_are_those_of_transformers():
    import transformers

    for name, ours in {
        "create_model_card": card.create_model_card,
        "push_to_hub": repo.push_to_hub,
        "init_hf_repo": repo.init_hf_repo,
        "_push_from_checkpoint": repo._push_from_checkpoint,
        "_finish_current_push": repo._finish_current_push,
    }.items():
        theirs = inspect.signature(getattr(transformers.Trainer, name)).parameters
        mine = inspect.signature(ours).parameters
        assert [(p.name, p.default, p.kind) for p in mine.values()] == [
            (p.name, p.default, p.kind) for p in theirs.values()
        ], name
