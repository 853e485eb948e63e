"""Interrupts and resumes trainings of all processes and compares each end with that of the uninterrupted run.

python -m torch.distributed.run --nproc_per_node=2 run_resume.py OUT
"""

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]


def load(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fixtures = load("fixtures", TESTS / "conftest.py")
helpers = load("resume_helpers", TESTS / "trajectories" / "test_resume.py")
signals = load("resume_signals", TESTS / "trajectories" / "test_resume_signals.py")


def stream() -> Any:
    return fixtures.make_padded_dataset(18).to_iterable_dataset(num_shards=2).shuffle(seed=1, buffer_size=6)


def llama_rows() -> Any:
    return fixtures.make_padded_dataset(18)


CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "plain": (fixtures.make_tiny_llama, llama_rows, {}),
    "dropout": (fixtures.make_tiny_bert, signals.make_classified, {"ddp_find_unused_parameters": False}),
    "length grouped": (fixtures.make_tiny_llama, llama_rows, {"train_sampling_strategy": "group_by_length"}),
    "stream": (fixtures.make_tiny_llama, stream, {"max_steps": 6}),
    "background saves": (fixtures.make_tiny_llama, llama_rows, {"async_save": True}),
    "layerwise GaLore": (
        fixtures.make_tiny_llama,
        llama_rows,
        {
            "optim": "galore_adamw_layerwise",
            "optim_target_modules": [r".*attn.*", r".*mlp.*"],
            "optim_args": "rank=4, update_proj_gap=2, scale=0.25",
        },
    ),
    # One process gets a signal in an evaluation; the other has to leave it at the same batch.
    "signal": (
        fixtures.make_tiny_bert,
        signals.make_classified,
        {**signals.EVERY_TWO, "ddp_find_unused_parameters": False},
    ),
}


def main(out: Path) -> None:
    from accelerate import PartialState

    found: dict[str, str] = {}
    for name, (model, data, options) in CASES.items():
        folder = out / name.replace(" ", "_")
        whole = helpers.build(model, data(), folder / "whole", **options)
        whole.train()
        if name == "signal":
            sent = [signals.Signal("on_prediction_step", 4, process=1)]
            cut = signals.cut_and_resumed(model, data(), folder / "cut", sent, stop=4, **options)
        else:
            cut = helpers.interrupted_and_resumed(model, data(), folder / "cut", 3, **options)
        try:
            helpers.assert_equal(helpers.everything(cut), helpers.everything(whole))
            found[name] = "equal"
        except AssertionError as error:
            found[name] = str(error)
    state = PartialState()
    found["processes"] = str(state.num_processes)
    (out / f"report_{state.process_index}.json").write_text(json.dumps(found))
    whole.end()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # Not through the interpreter's end: gloo's threads now and then abort it there.
    sys.stdout.flush()
    os._exit(0)
