"""What a trainer costs per step over a bare PyTorch loop: a tiny model, so that nothing else counts.

    python tests/performance/bench_loop_overhead.py --fast --out results/loop_overhead.json

The bare loop does what the others are asked to do and nothing more: batches from a DataLoader, forward, backward,
clipping, AdamW (fused, as both trainers' default), a linear schedule, and every 10 steps the mean loss on the host.
The floor is the same loop on accelerate, as its documentation writes it: both trainers stand on it.

The speed of a shared machine wanders over seconds by more than the overhead. So the sides take turns every 20 steps,
which meets the same speed, and a round's difference is only one of sixty: reported are the medians of ten blocks of
rounds, and their spread.
"""

import itertools
import tempfile
from typing import Any

import numpy as np
from harness import OURS, Bench, Case, Pause, clock, since, summary
from training import Windows, arguments, library_of, load_library
from workloads import make_llama

BATCH, LENGTH, VOCABULARY = 4, 16, 128
BLOCKS = 10
ON_ACCELERATE = "bare loop on accelerate"


def rows() -> list[dict[str, Any]]:
    """Returns 512 rows of 16 tokens."""
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (512, LENGTH), generator=generator)
    return [{"input_ids": each, "labels": each.clone()} for each in ids]


def collate(features: list[dict[str, Any]]) -> dict[str, Any]:
    import torch

    return {name: torch.stack([each[name] for each in features]) for name in features[0]}


def bare(steps: int, pause: Pause, accelerator: Any = None) -> None:
    """Trains for ever in a plain loop, in windows of `steps`; with an accelerator, on objects that it prepared."""
    import torch
    from torch.utils.data import DataLoader

    model = make_llama("tiny", VOCABULARY)
    model.config.use_cache = False
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / 1e6))
    data = rows()
    loader = DataLoader(data, batch_size=BATCH, shuffle=True, collate_fn=collate)  # pyright: ignore[reportArgumentType]
    backward, clip = torch.Tensor.backward, torch.nn.utils.clip_grad_norm_
    if accelerator is not None:
        model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
        backward, clip = accelerator.backward, accelerator.clip_grad_norm_
    total, losses = torch.zeros(()), []
    begin, done = clock(), 0
    for _ in itertools.count():
        for batch in loader:
            count = (batch["labels"][:, 1:] != -100).sum()
            loss = model(**batch, num_items_in_batch=count).loss
            backward(loss)
            clip(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss.detach()
            done += 1
            if done % 10 == 0:
                losses.append(total.item() / 10)
                total.zero_()
            if done % steps == 0:
                pause({**since(begin), "losses": losses})
                begin = clock()


def work(side: str, settings: dict[str, Any], pause: Pause) -> None:
    if side == "bare loop":
        bare(settings["steps"], pause)
    if side == ON_ACCELERATE:
        from accelerate import Accelerator

        bare(settings["steps"], pause, Accelerator(cpu=True))
    options = {
        "max_steps": 1_000_000,
        "per_device_train_batch_size": BATCH,
        "logging_steps": 10,
        **settings.get("args", {}),
    }
    if library_of(side) == "finetune":
        from finetune import Trainer, TrainingArguments
    else:
        from transformers import Trainer, TrainingArguments
    made: Any = arguments("transformers", options) if library_of(side) != "finetune" else None
    if made is None:
        made = TrainingArguments(
            tempfile.mkdtemp(prefix="bench_loop_"),
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            seed=1,
            learning_rate=1e-4,
            **options,
        )
    trainer: Any = Trainer(
        model=make_llama("tiny", VOCABULARY),
        args=made,
        train_dataset=rows(),  # pyright: ignore[reportArgumentType]
        data_collator=collate,
        callbacks=[Windows(settings["steps"], pause)],
    )
    # Both print each log as a line when there is no progress bar; the bare loop prints nothing.
    for callback in list(trainer.callback_handler.callbacks):
        if "Printer" in type(callback).__name__:
            trainer.remove_callback(type(callback))
    trainer.train()


def overheads(case: Case, side: str, steps: int) -> list[float]:
    """Returns a side's milliseconds per step over the bare loop: the median of each tenth of the rounds."""
    each = [(one[side]["seconds"] - one["bare loop"]["seconds"]) / steps * 1000 for one in case.rounds]
    return [float(np.median(block)) for block in np.array_split(each, min(BLOCKS, len(each)))]


def main() -> None:
    bench = Bench(
        "loop_overhead", "Overhead per step over a bare loop, tiny model", work, __doc__, imports=load_library
    )
    steps = 20
    # Two threads wait for each other longer than they compute on a model so small, and the waiting varies most.
    one_thread = {"OMP_NUM_THREADS": "1"}
    names = ("bare loop", ON_ACCELERATE, "transformers", OURS)
    sides = {name: {"steps": steps, "env": one_thread} for name in names}
    case = bench.case("tiny model", sides, pairs=60 if bench.fast else 500, settings={"steps": steps})
    found = {side: overheads(case, side, steps) for side in names[1:]}
    case.result["overhead_ms_per_step"] = {side: summary(each) for side, each in found.items()}
    shares = [ours / theirs for ours, theirs in zip(found[OURS], found["transformers"], strict=True)]
    case.ratio("seconds", "transformers")
    case.losses_agree(1e-5, "transformers")
    least, ours, theirs = (summary(found[side])["median"] for side in (ON_ACCELERATE, OURS, "transformers"))
    says = (
        f"accelerate alone, in a loop as its documentation writes it, takes {least:.2g} ms a step more than the bare "
        f"loop; ours takes {ours:.2g} ms, transformers {theirs:.2g} ms"
    )
    floor = {"seconds": least / 1000, "says": says}
    text = "overhead over the bare loop, ms per step"
    case.bar(text, found[OURS], at_most=0.3, floor={**floor, "best_possible": least})
    of_theirs = {**floor, "best_possible": least / theirs}
    case.bar("the same as a share of transformers'", shares, at_most=0.3, floor=of_theirs)
    bench.finish()


if __name__ == "__main__":
    main()
