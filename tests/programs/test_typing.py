"""A user's script under a type checker: fields have their types, and misspelt names are flagged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """\
from finetune import SequenceClassificationConfig, SequenceClassificationTrainer, SFTConfig, SFTTrainer, Trainer
from finetune import TrainingArguments

args = SFTConfig("out", learning_rate=1e-4, packing=True, max_length=512, eval_strategy="steps")
rate: float = args.learning_rate
trainer = SFTTrainer(model="model", args=args, train_dataset=[], tokenizer=None)
longest: int | None = trainer.args.max_length
classifier = SequenceClassificationTrainer(model="model", args={"seed": 1}, train_dataset=[])
names: list[str] | None = classifier.args.class_names
plain = Trainer(args=TrainingArguments("out", bf16=True))
result = trainer.train().training_loss
SFTConfig("out", learning_rat=1e-4)  # wrong
SFTConfig("out", learning_rate="fast")  # wrong
args.max_lenght  # wrong
trainer.args.max_lenght  # wrong
classifier.args.class_nams  # wrong
plain.args.max_length  # wrong
SFTTrainer(model="model", train_datasets=[])  # wrong
SequenceClassificationTrainer(model="model", train_datasets=[])  # wrong
Trainer(train_datasets=[])  # wrong
"""


@pytest.mark.slow
def test_a_type_checker_sees_the_fields_and_flags_misspelt_names(tmp_path: Path) -> None:
    pytest.importorskip("basedpyright")
    import finetune

    source = str(Path(finetune.__file__).parents[1])
    (tmp_path / "script.py").write_text(SCRIPT)
    settings = {"typeCheckingMode": "standard", "pythonVersion": "3.10", "extraPaths": [source]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable, "--outputjson", "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)["generalDiagnostics"]
    flagged = {each["range"]["start"]["line"] for each in found if each["severity"] == "error"}
    wrong = {number for number, line in enumerate(SCRIPT.splitlines()) if line.endswith("# wrong")}
    assert flagged == wrong, [each["message"] for each in found if each["severity"] == "error"]
