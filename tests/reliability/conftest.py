"""The same run without a Trainer as in `tests/unit/checkpoint`."""

import importlib.util
from pathlib import Path

_PATH = Path(__file__).parents[1] / "unit" / "checkpoint" / "conftest.py"
_SPEC = importlib.util.spec_from_file_location("tiny_run_of_unit_tests", _PATH)
assert _SPEC is not None and _SPEC.loader is not None
_module = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_module)
tiny_run, run_class, _same = _module.tiny_run, _module.run_class, _module._same
