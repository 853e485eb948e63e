import json
from types import SimpleNamespace

import numpy as np
import pytest

from finetune.control.state import TrainerState
from finetune.reporting import metrics_io

METRICS = {
    "epoch": 2.0,
    "train_loss": 0.123456789,
    "train_runtime": 3725.987,
    "total_flos": 5.5e12,
    "train_mem_cpu_alloc_delta": 5 << 20,
    "train_samples": 12,
    "note": "text",
}


class Owner:
    log_metrics = metrics_io.log_metrics
    save_metrics = metrics_io.save_metrics
    save_state = metrics_io.save_state
    metrics_format = metrics_io.metrics_format

    def __init__(self, folder, first=True):
        self.args, self.state, self.first = SimpleNamespace(output_dir=str(folder)), TrainerState(global_step=3), first

    def is_world_process_zero(self):
        return self.first


def test_same_text_as_transformers(tmp_path, capsys):
    from transformers import trainer_pt_utils

    owner = Owner(tmp_path)
    assert owner.metrics_format(METRICS) == trainer_pt_utils.metrics_format(METRICS)
    owner.log_metrics("train", METRICS)
    mine = capsys.readouterr().out
    trainer_pt_utils.log_metrics(owner, "train", METRICS)
    assert mine == capsys.readouterr().out and "0:01:02.05" not in mine and "1:02:05.98" in mine


def test_same_files_as_transformers(tmp_path):
    from transformers import trainer_pt_utils

    (tmp_path / "theirs").mkdir()
    mine, theirs = Owner(tmp_path / "mine"), Owner(tmp_path / "theirs")
    for owner, save_metrics, save_state in (
        (mine, metrics_io.save_metrics, metrics_io.save_state),
        (theirs, trainer_pt_utils.save_metrics, trainer_pt_utils.save_state),
    ):
        save_metrics(owner, "train", METRICS)
        save_metrics(owner, "eval", {"eval_loss": 1.0, "epoch": 3.0})
        save_metrics(owner, "test", {"test_loss": 1.0}, combined=False)
        save_state(owner)
    files = sorted(path.name for path in (tmp_path / "mine").iterdir())
    assert files == [
        "all_results.json",
        "eval_results.json",
        "test_results.json",
        "train_results.json",
        "trainer_state.json",
    ]
    for name in files:
        assert (tmp_path / "mine" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name


def test_numpy_values_are_written_and_the_old_file_survives_what_cannot_be(tmp_path):
    owner = Owner(tmp_path)
    owner.save_metrics("eval", {"eval_accuracy": np.float32(0.5), "eval_matrix": np.eye(2)})
    with pytest.raises(TypeError, match="`object` cannot be written"):
        owner.save_metrics("eval", {"eval_accuracy": object()})
    expected = {"eval_accuracy": 0.5, "eval_matrix": [[1, 0], [0, 1]]}
    assert json.loads((tmp_path / "all_results.json").read_text()) == expected
    assert json.loads((tmp_path / "eval_results.json").read_text()) == expected


def test_other_processes_are_silent(tmp_path, capsys):
    owner = Owner(tmp_path / "out", first=False)
    owner.log_metrics("train", METRICS)
    owner.save_metrics("train", METRICS)
    owner.save_state()
    assert not (tmp_path / "out").exists() and capsys.readouterr().out == ""


def test_no_metrics(tmp_path, capsys):
    Owner(tmp_path).log_metrics("eval", {})
    assert capsys.readouterr().out == "***** eval metrics *****\n"


def test_signatures_are_those_of_transformers():
    import inspect

    from transformers import Trainer

    for name in ("log_metrics", "save_metrics", "save_state"):
        theirs = [(p.name, p.default) for p in inspect.signature(getattr(Trainer, name)).parameters.values()]
        assert [(p.name, p.default) for p in inspect.signature(getattr(Owner, name)).parameters.values()] == theirs
