"""How long training stands still for a checkpoint: 135M parameters with AdamW, weights and optimizer state.

    python tests/performance/bench_checkpoint.py --fast --out results/checkpoint.json

The stall is the time that training stands still because of a save. transformers writes before it goes on: from the
end of a step to the event `on_save`. finetune copies and writes in the background (`async_save`): the time until it
goes on, and the time that the next optimizer step waits for the copy, both as its summary reports them; with
`async_save=False` it writes as transformers does. A step has 256 tokens. All write to the same disk; files are removed
after each save. `--fast` leaves the synchronous save out.
"""

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import Bench, Pause, clock, reset_peak, resident_mib, since
from machine import peaks
from training import library_of, load_library
from workloads import make_llama


def work(side: str, settings: dict[str, Any], pause: Pause) -> None:
    import torch
    from transformers import TrainerCallback

    folder = Path(tempfile.mkdtemp(prefix="bench_checkpoint_"))
    if library_of(side) == "finetune":
        from finetune import Trainer, TrainingArguments
    else:
        from transformers import Trainer, TrainingArguments

    class Saves(TrainerCallback):
        """Asks for a checkpoint after every step, and measures until the next step begins."""

        begin: Any = None
        stalls: list[float] | None = None
        measured: dict[str, Any] | None = None

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step > 1:
                control.should_save = True
                reset_peak()
                self.begin = clock()

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.measured = since(self.begin)
            if self.stalls is None:
                self.finish(state.global_step)

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            # The step before this one was saved, and this one has waited for the copy.
            if self.stalls and self.measured is not None:
                self.measured["seconds"] = self.stalls[-1]
                self.finish(state.global_step)

        def finish(self, step: int) -> None:
            measured, self.measured = self.measured, None
            assert measured is not None
            started = time.perf_counter()
            newest = folder / f"checkpoint-{step}"
            # The clock has stopped: wait until the background write is over, so that it disturbs nobody else.
            while not (newest / "trainer_state.json").exists() or list(folder.glob("*.tmp*")) or _growing(newest):
                time.sleep(0.1)
                if time.perf_counter() - started > 120:
                    break
            size = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file()) / 2**20
            written = time.perf_counter() - started
            pause({**measured, "written_seconds": written, "mib": size, "peak_mib": resident_mib("VmHWM")})
            shutil.rmtree(newest, ignore_errors=True)

    # One of the package's own, so to speak: finetune copies at once when callbacks of others could change weights.
    Saves.__module__ = "finetune.performance"
    ids = torch.arange(3, 259)
    rows = [{"input_ids": ids, "labels": ids} for _ in range(64)]
    options: dict[str, Any] = {"async_save": settings["async_save"]} if "async_save" in settings else {}
    args = TrainingArguments(
        str(folder),
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        per_device_train_batch_size=1,
        max_steps=50,
        save_strategy="no",
        **options,
    )
    try:
        saves = Saves()
        trainer: Any = Trainer(
            model=make_llama("135m", 49152),
            args=args,
            train_dataset=rows,  # pyright: ignore[reportArgumentType]
            callbacks=[saves],
        )
        if library_of(side) == "finetune":
            saves.stalls = trainer._writer.stalls
        trainer.train()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _growing(folder: Path) -> bool:
    """Returns whether the folder's files grew within a fifth of a second."""

    def size() -> int:
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

    before = size()
    time.sleep(0.2)
    return size() != before


def main() -> None:
    bench = Bench("checkpoint", "Stall per checkpoint, 135M parameters with AdamW", work, __doc__, load_library)
    sides = {
        "transformers": {},
        "finetune": {"async_save": True},
        "finetune synchronous": {"async_save": False},
    }
    if bench.fast:
        sides.pop("finetune synchronous")
    case = bench.case("save", sides, pairs=5)
    if not bench.fast:
        case.ratio("seconds", "transformers", "finetune synchronous")
    theirs = case.result["sides"]["transformers"]["seconds"]["median"]
    copied = case.result["sides"]["transformers"]["mib"]["median"] * 2**20
    copy = 2 * copied / (peaks()["gb_per_second"] * 1e9)
    case.bar(
        "seconds that training stands still, as a share of transformers'",
        case.shares("seconds", "transformers"),
        at_most=0.1,
        floor={
            "best_possible": copy / theirs,
            "seconds": copy,
            "bytes": 2 * copied,
            "says": f"copying {copied / 1e9:.2f} GB with nothing beside it takes {copy:.2f} s at the measured peak; "
            "only what the next step hides of it can be less",
        },
    )
    bench.finish()


if __name__ == "__main__":
    main()
