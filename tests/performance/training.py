"""One side of a training comparison: a run that stops after every few steps and says how long they took."""

import tempfile
from typing import Any

import numpy as np
from harness import OURS, Case, Pause, clock, reset_peak, resident_mib, since
from machine import floor_seconds, peaks, training_work
from workloads import SHAPES, lengths, make_llama, token_rows, tokenizer

LIBRARIES = ("trl", "transformers", "finetune")


def library_of(side: str) -> str:
    """Returns which library a side runs: "trl best" is `trl`."""
    return side.split()[0]


def classes(side: str) -> tuple[Any, Any]:
    """Returns (trainer class, arguments class) of a side."""
    library = library_of(side)
    if library == "trl":
        from trl import SFTConfig, SFTTrainer
    elif library == "finetune":
        from finetune import SFTConfig, SFTTrainer
    else:
        from transformers import Trainer as SFTTrainer
        from transformers import TrainingArguments as SFTConfig
    return SFTTrainer, SFTConfig


def load_library(side: str) -> None:
    """Imports what a side needs; one that runs no library, like "bare loop", needs torch and the model."""
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

    torch.ones(1)  # the first tensor starts threads
    if library_of(side) in LIBRARIES:
        classes(side)


def arguments(side: str, overrides: dict[str, Any]) -> Any:
    """Returns the side's own defaults with `overrides`; nothing is reported, saved or drawn."""
    options: dict[str, Any] = {
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 1,
        "learning_rate": 1e-4,
        **overrides,
    }
    return classes(side)[1](tempfile.mkdtemp(prefix="bench_"), **options)


class Windows:
    """A callback that measures windows of `steps` optimizer steps and waits after each until it is asked again."""

    def __new__(cls, *given: Any, **options: Any) -> Any:
        from transformers import TrainerCallback

        made = type("Windows", (_Windows, TrainerCallback), {})
        return made(*given, **options)


class _Windows:
    def __init__(self, steps: int, pause: Pause, ledger: bool = False) -> None:
        self.steps, self.pause, self.ledger, self.left = steps, pause, ledger, 0
        self.clock: Any = None
        self.profiler: Any = None
        self.base = resident_mib()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.base = resident_mib()
        self._restart()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.left -= 1
        if self.left:
            return
        measure = since(self.clock)
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        tokens = [entry["num_tokens"] for entry in state.log_history if "num_tokens" in entry]
        if tokens and state.global_step > self.steps:
            # The log is one window behind: tokens of all steps but this window's.
            measure["tokens_per_step"] = tokens[-1] / (state.global_step - self.steps)
        extra = {"losses": losses, "base_mib": self.base, "peak_rss_mib": resident_mib("VmHWM")}
        if self.profiler is not None:
            self.profiler.__exit__(None, None, None)
            extra["ledger_mib"] = ledger_peak(self.profiler)
        self.pause({**measure, **extra, "peak_mib": extra["peak_rss_mib"] - self.base, "steps": self.steps})
        self._restart()

    def _restart(self) -> None:
        self.left = self.steps
        if self.ledger:
            import torch

            activities = [torch.profiler.ProfilerActivity.CPU]
            self.profiler = torch.profiler.profile(activities=activities, profile_memory=True)
            self.profiler.__enter__()
        reset_peak()
        self.clock = clock()


def ledger_peak(profiler: Any) -> float:
    """Returns the MiB by which torch's allocator rose at most above where the profiled window began.

    Exact and free of the allocator's habits, unlike resident memory: temporaries inside operators count too.
    """
    events = [each for each in profiler.profiler.kineto_results.events() if each.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak / 2**20


def train(side: str, settings: dict[str, Any], pause: Pause) -> None:
    """Trains in windows. `settings`: shape, vocab_size, rows, steps (per window), args (overrides), seed."""

    rows = token_rows(settings["rows"], vocab_size=settings["vocab_size"], length=settings.get("length"))
    model = make_llama(settings["shape"], settings["vocab_size"])
    trainer_class, _ = classes(side)
    args = arguments(side, {"max_steps": 10_000, "num_train_epochs": 1, **settings["args"]})
    options: dict[str, Any] = {"processing_class": tokenizer(settings["vocab_size"])}
    if library_of(side) == "transformers":
        rows, options = for_transformers(rows), {"data_collator": padding_collator}
    callbacks = [Windows(settings["steps"], pause, settings.get("ledger", False))]
    trainer = trainer_class(model=model, args=args, train_dataset=rows, callbacks=callbacks, **options)
    trainer.train()


def training_floor(
    case: Case, against: str, ours: str = OURS, measured: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Returns how fast the steps of `ours` could be on this machine, and the ratio to `against` at that floor.

    Counted is what the side's settings ask for and nothing else (see `machine.training_work`): the products of the
    tokens that are no padding, the head for the supervised ones, AdamW's bytes. `measured` are the machine's peaks.
    """
    measured = measured or peaks()
    settings = case.result["settings"]["sides"][ours]
    args, shape = settings["args"], SHAPES[settings["shape"]]
    width, layers = shape["hidden_size"], shape["num_hidden_layers"]
    heads = shape["num_attention_heads"]
    keys = shape.get("num_key_value_heads", heads) * (width // heads)
    counts = np.full(1, settings["length"]) if "length" in settings else lengths(settings["rows"])
    drawn = case.rounds[-1][ours].get("tokens_per_step")
    tokens = drawn or float(counts.mean()) * args["per_device_train_batch_size"]
    operations, moved = training_work(
        blocks=layers * (2 * width * width + 2 * width * keys + 3 * width * shape["intermediate_size"]),
        head=settings["vocab_size"] * width,
        layers=layers,
        width=width,
        tokens=tokens,
        supervised=0.4 * tokens,
        context=float((counts**2).sum() / counts.sum()),
        recomputed=args.get("gradient_checkpointing", True),
    )
    dtype = "bfloat16" if args["bf16"] else "float32"
    seconds = floor_seconds(operations, moved, dtype, measured)
    theirs, mine = (float(np.mean(case.values(side, "seconds"))) / settings["steps"] for side in (against, ours))
    peak, speed = measured[f"{dtype}_gflops"], measured["gb_per_second"]
    return {
        "operations": operations,
        "bytes": moved,
        "seconds": seconds,
        "best_possible": theirs / seconds,
        "ours_over_floor": mine / seconds,
        "says": f"{operations / 1e9:.3g} GFLOP at the measured {peak:.0f} GFLOP/s ({dtype}) and {moved / 1e9:.2g} GB "
        f"at {speed:.0f} GB/s take {seconds:.2g} s a step; ours takes {mine:.2g} s, {against} {theirs:.2g} s",
    }


def for_transformers(rows: Any) -> Any:
    """Returns rows with labels, which is what the plain Trainer wants."""

    def label(row: dict[str, Any]) -> dict[str, Any]:
        pairs = zip(row["input_ids"], row["completion_mask"], strict=True)
        return {"labels": [token if kept else -100 for token, kept in pairs]}

    return rows.map(label, remove_columns=["completion_mask"])


def padding_collator(features: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns a padded batch, as transformers' own collator for token classification would."""
    import torch

    width = max(len(each["input_ids"]) for each in features)
    filled = {"input_ids": 0, "labels": -100}
    batch: dict[str, Any] = {
        name: torch.tensor([each[name] + [fill] * (width - len(each[name])) for each in features])
        for name, fill in filled.items()
    }
    counts = torch.tensor([len(each["input_ids"]) for each in features])
    batch["attention_mask"] = (torch.arange(width) < counts[:, None]).long()
    return batch
