"""Value types that stand in for those of transformers."""

import json
import subprocess
import sys

import numpy as np
import pytest
import transformers
from transformers import debug_utils, trainer_utils, training_args

from finetune import compat
from finetune.errors import ArgumentError

ENUMERATIONS = [
    (compat.IntervalStrategy, trainer_utils.IntervalStrategy),
    (compat.SaveStrategy, trainer_utils.SaveStrategy),
    (compat.HubStrategy, trainer_utils.HubStrategy),
    (compat.SchedulerType, trainer_utils.SchedulerType),
    (compat.FSDPOption, trainer_utils.FSDPOption),
    (compat.HPSearchBackend, trainer_utils.HPSearchBackend),
    (compat.OptimizerNames, training_args.OptimizerNames),
    (compat.DebugOption, debug_utils.DebugOption),
    (compat.ParallelMode, training_args.ParallelMode),
]


@pytest.mark.parametrize(("ours", "theirs"), ENUMERATIONS)
def test_enumerations_have_the_members_of_transformers(ours, theirs):
    assert {member.name: member.value for member in ours} == {member.name: member.value for member in theirs}


@pytest.mark.parametrize(("ours", "theirs"), ENUMERATIONS[:-1])
def test_string_enumerations_are_interchangeable(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == other == mine.value
        assert theirs(mine) is other
        assert ours(other) is mine
        assert {mine.value: 1}[mine] == 1
        assert json.loads(json.dumps(mine)) == mine.value
        assert f"{mine}" == str(mine) == mine.value


def test_an_unknown_member_names_the_nearest():
    with pytest.raises(ArgumentError, match="Did you mean `steps`"):
        compat.IntervalStrategy("step")


def test_result_types_have_the_fields_of_transformers():
    for name in ("EvalLoopOutput", "PredictionOutput", "TrainOutput", "BestRun"):
        assert getattr(compat, name)._fields == getattr(trainer_utils, name)._fields
    assert compat.TrainOutput(3, 0.5, {}) == trainer_utils.TrainOutput(3, 0.5, {})


@pytest.mark.parametrize("extra", [{}, {"inputs": np.zeros(2)}, {"losses": np.ones(2)}, {"inputs": 1, "losses": 2}])
def test_eval_prediction_unpacks_like_that_of_transformers(extra):
    ours = compat.EvalPrediction(np.arange(2), np.arange(3), **extra)
    theirs = trainer_utils.EvalPrediction(np.arange(2), np.arange(3), **extra)
    assert [np.asarray(item).tolist() for item in ours] == [np.asarray(item).tolist() for item in theirs]
    with pytest.raises(IndexError):
        ours[len(list(theirs))]


def test_log_levels_are_those_of_transformers():
    assert training_args.trainer_log_levels == compat.LOG_LEVELS
    assert compat.library_verbosity() == transformers.logging.get_verbosity()


def test_importing_the_arguments_imports_neither_torch_nor_transformers():
    code = "import sys, finetune.sft.config; print({'torch', 'transformers', 'trl'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
