"""Resuming a run over 1,000,000 rows at 90 %: seconds from the model in memory to the end of the first step.

    python tests/performance/bench_resume.py --fast --out results/resume.json

A tiny model; each side writes the checkpoint once, in a run that is told that its first step is the one at 90 %.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from harness import Bench, Pause, clock, since
from training import library_of, load_library
from workloads import make_llama

ROWS, BATCH = 1_000_000, 8


def work(side: str, settings: dict[str, Any], pause: Pause) -> None:
    import numpy as np
    from datasets import Dataset
    from transformers import TrainerCallback, default_data_collator

    if library_of(side) == "finetune":
        from finetune import Trainer, TrainingArguments
    else:
        from transformers import Trainer, TrainingArguments
    ids = np.random.default_rng(0).integers(3, 128, (ROWS, 8))
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    folder = Path(tempfile.mkdtemp(prefix="bench_resume_"))

    class Stop(TrainerCallback):
        """Ends every run after one step, and makes the first run's step the one at 90 % of the epoch."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            state.global_step = max(state.global_step, int(ROWS / BATCH * 0.9) - 1)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = True

    def trainer(**options: Any) -> Any:
        shared = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "num_train_epochs": 1}
        args = TrainingArguments(str(folder), **shared, per_device_train_batch_size=BATCH, **options)
        return Trainer(
            model=make_llama("tiny", 128),
            args=args,
            train_dataset=rows,  # pyright: ignore[reportArgumentType]
            data_collator=default_data_collator,
            callbacks=[Stop()],
        )

    try:
        trainer(save_strategy="steps", save_steps=int(ROWS / BATCH * 0.9)).train()
        checkpoint = next(folder.glob("checkpoint-*"))
        while True:
            resumed = trainer(save_strategy="no")
            begin = clock()
            try:
                resumed.train(resume_from_checkpoint=str(checkpoint))
            finally:
                measured = since(begin)
            pause({**measured, "step": resumed.state.global_step})
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    bench = Bench("resume", "Resuming a run over 1M rows at 90 %", work, __doc__, load_library)
    sides: dict[str, dict[str, Any]] = {"transformers": {}, "finetune": {}}
    case = bench.case("resume", sides, pairs=5 if bench.fast else 7)
    case.ratio("seconds", "transformers")
    seconds = case.values("finetune", "seconds")
    case.bar("seconds to the first step after the model is loaded", seconds, at_most=2.0)
    bench.finish()


if __name__ == "__main__":
    main()
