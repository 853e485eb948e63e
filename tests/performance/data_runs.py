"""One side of the comparisons of data preparation: from rows of chats to a first step or to packed rows."""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import Pause, clocked
from training import arguments, classes
from workloads import chat_file, chats, make_llama, tokenizer

ROOT = Path(tempfile.gettempdir())


def first_step(side: str, settings: dict[str, Any], pause: Pause) -> None:
    """Measures whole programs: a fresh process each, from its first line to the end of the first optimizer step."""
    source = chat_file(settings["rows"])
    tokenizer()  # made once, outside the clock
    folder = Path(tempfile.mkdtemp(prefix="bench_first_step_", dir=ROOT))
    try:
        while True:
            if not settings["warm"]:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
            elif not (folder / "filled").exists():
                _program(side, source, folder, settings)
                (folder / "filled").touch()
            pause(_program(side, source, folder, settings))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _program(side: str, source: Path, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    order = {"side": side, "source": str(source), "cache": str(folder), "args": settings.get("args", {})}
    begin = time.perf_counter()
    answer = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), json.dumps(order)], capture_output=True, text=True, check=False
    )
    if answer.returncode:
        raise RuntimeError(answer.stderr[-3000:])
    # The libraries print their own dictionaries around it.
    line = next(line for line in answer.stdout.splitlines() if line.startswith("RESULT "))
    inside = json.loads(line.removeprefix("RESULT "))
    return {"process_seconds": time.perf_counter() - begin, **inside}


def _run_program(order: dict[str, Any]) -> None:
    begin, cpu = time.perf_counter(), time.process_time()
    trainer_class, _ = classes(order["side"])
    from datasets import load_dataset
    from transformers import TrainerCallback

    imported = time.perf_counter()

    class FirstStep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            now = time.perf_counter()
            # Without the imports, which have a benchmark of their own.
            found = {"seconds": now - imported, "with_imports_seconds": now - begin}
            sys.stdout.write("\nRESULT " + json.dumps({**found, "cpu_seconds": time.process_time() - cpu}) + "\n")
            control.should_training_stop = True

    rows = load_dataset("json", data_files=order["source"], split="train", cache_dir=order["cache"])
    trainer = trainer_class(
        model=make_llama("tiny", 8192),
        args=arguments(order["side"], {"max_steps": 1, "max_length": 512, "bf16": False, **order["args"]}),
        train_dataset=rows,
        processing_class=tokenizer(),
        callbacks=[FirstStep()],
    )
    trainer.train()


def prepare_rows(side: str, settings: dict[str, Any], pause: Pause) -> None:
    """Measures tokenising, masking and packing of chats that lie in memory: what the constructor does with rows."""
    import datasets

    datasets.disable_progress_bars()
    datasets.disable_caching()
    table = {"messages": chats(settings["rows"])}
    trainer_class, _ = classes(side)
    made_tokenizer, model = tokenizer(), make_llama("tiny", 8192)
    small = datasets.Dataset.from_dict({"messages": table["messages"][:4]})
    args = arguments(side, {"bf16": False, "max_length": 1024, **settings["args"]})

    def build(rows: Any) -> Any:
        return trainer_class(model=model, args=args, train_dataset=rows, processing_class=made_tokenizer)

    build(small)  # imports, and what the constructor does besides
    while True:
        rows = datasets.Dataset.from_dict(table)
        measured = clocked(lambda: {"trainer": build(rows)})  # noqa: B023
        trainer = measured.pop("trainer")
        fixed = clocked(lambda: build(small) and None)["seconds"]
        packed = trainer.train_dataset
        tokens = int(sum(len(each) for each in packed["input_ids"]))
        pause({**measured, "fixed_seconds": fixed, "packed_rows": len(packed), "tokens": tokens})


if __name__ == "__main__":
    _run_program(json.loads(sys.argv[1]))
