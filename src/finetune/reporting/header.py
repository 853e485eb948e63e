"""What a run will do, printed once at its start, and what it did, printed once at its end. First process only."""

import logging
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch

from finetune.files import format_bytes
from finetune.optim.fused_backward import describe_optimizer
from finetune.reporting.flops import model_flops_utilization
from finetune.reporting.memory import expected_state_bytes, memory_use, peak_device_bytes, peak_rss_bytes
from finetune.reporting.precision import LivePrecision
from finetune.reporting.run_memory import RunMemory
from finetune.wrappers import unwrap_optimizer

logger = logging.getLogger(__name__)


def start_lines(
    *,
    model: Any,
    args: Any,
    optimizer: Any,
    plan: Any,
    state: Any,
    world_size: int | None = None,
    memory: RunMemory | None = None,
    loss: str = "",
    activations: str = "",
) -> list[str]:
    """Returns the header of a run, one `name  value` per line. `loss` says how it is computed,
    `activations` whether they are kept.

    `plan` is a `StepPlan` (`max_steps`, `num_train_epochs`, `num_examples`, `total_batch_size`, `accumulation`).
    """
    world = args.world_size if world_size is None else world_size
    rows = [
        ("model", _model_name(model)),
        ("parameters", _parameter_text(model)),
        ("device", _device_text(args, world)),
        ("dtypes", _dtype_text(model, args)),
        ("batch", _batch_text(plan, world)),
        ("length", _length_text(plan, state, args)),
        ("optimizer", _optimizer_text(model, optimizer, args)),
        *([("", described)] if (described := describe_optimizer(optimizer)) else []),
        *([("loss", loss)] if loss else []),
        *([("activations", activations)] if activations else []),
        *([("memory", memory.start_text())] if memory is not None else []),
        ("output", str(args.output_dir)),
    ]
    width = max(len(name) for name, _ in rows)
    return [f"  {name:<{width}}  {text}" for name, text in rows]


def end_lines(
    *,
    metrics: dict[str, Any],
    state: Any,
    args: Any,
    optimizer: Any = None,
    model: Any = None,
    stalls: Sequence[float] = (),
    memory: RunMemory | None = None,
    precision: LivePrecision | None = None,
) -> list[str]:
    """Returns the summary of a finished run: time, rates, loss, memory, what saving cost, and the best checkpoint.

    `stalls`: seconds that training paused for each checkpoint.
    """
    runtime = float(metrics.get("train_runtime", 0.0))
    rates = [
        f"{metrics[f'train_{unit}_per_second']:,.4g} {unit}/s"
        for unit in ("samples", "steps", "tokens")
        if f"train_{unit}_per_second" in metrics
    ]
    rows = [("steps", f"{state.global_step:,} in {_duration(runtime)}" + "".join(f", {rate}" for rate in rates))]
    if "train_loss" in metrics:
        rows.append(("train loss", f"{metrics['train_loss']:.4g} (mean over this run)"))
    evaluated = [entry for entry in state.log_history if "eval_loss" in entry]
    if evaluated:
        first, last = evaluated[0]["eval_loss"], evaluated[-1]["eval_loss"]
        rows.append(("eval loss", f"{first:.4g} -> {last:.4g}" if len(evaluated) > 1 else f"{last:.4g}"))
    rows.append(("memory", _memory_text(model, optimizer)))
    if memory is not None:
        rows.append(("", memory.end_text()))
    if precision is not None and precision.text:
        rows.append(("dtypes", precision.text))
    share = model_flops_utilization(state.total_flos, runtime, args.device, args.world_size) if runtime else None
    if share is not None:
        rows.append(("utilisation", f"{share:.1%} of the 16-bit peak (model FLOPs)"))
    if stalls:
        rows.append(("checkpoints", f"{len(stalls)} (training paused at most {max(stalls):.2g} s each)"))
    if state.best_model_checkpoint:
        rows.append(("best", f"{state.best_metric:.4g} in {state.best_model_checkpoint}"))
    width = max(len(name) for name, _ in rows)
    return [f"  {name:<{width}}  {text}" for name, text in rows]


def start_observers(trainer: Any, run: Any) -> None:
    """Gives `run` those who watch its first update: what it holds in memory, and in which number formats."""
    announce = partial(_write_row, "dtypes") if _speaks(trainer, run) else None
    run.memory = RunMemory(trainer.model, run.optimizer, trainer.args)
    run.precision = LivePrecision(trainer.args, announce)
    run.observers = [run.precision, run.memory]


def log_start(trainer: Any, run: Any) -> None:
    """Writes the header of `run` to standard error, once `start_observers` was called.

    Nothing in a hyperparameter search.
    """
    if not _speaks(trainer, run):
        return
    lines = start_lines(
        model=trainer.model, args=trainer.args, optimizer=run.optimizer, plan=run.plan, state=trainer.state,
        memory=run.memory, loss=getattr(trainer, "describe_loss", str)(),
        activations=getattr(trainer, "describe_activations", str)(),
    )  # fmt: skip
    _write("Training", lines)


def log_end(trainer: Any, run: Any, metrics: dict[str, Any], stalls: Sequence[float] = ()) -> None:
    """Writes the summary of `run` to standard error, and its memory to the run's folder."""
    run.memory.finish(trainer.model, run.optimizer)
    if run.trial is None and getattr(trainer.args, "should_save", False):
        try:
            run.memory.write(trainer.args.output_dir)
        except OSError as error:
            logger.warning("The memory of the run was not written into `%s`: %s", trainer.args.output_dir, error)
    if _speaks(trainer, run):
        lines = end_lines(
            metrics=metrics, state=trainer.state, args=trainer.args, optimizer=run.optimizer, model=trainer.model,
            stalls=stalls, memory=run.memory, precision=run.precision,
        )  # fmt: skip
        _write("Trained", lines)


def _speaks(trainer: Any, run: Any) -> bool:
    speaks = trainer.is_world_process_zero() and trainer.args.get_process_log_level() <= logging.WARNING
    return run.trial is None and speaks


def _write(title: str, lines: Iterable[str]) -> None:
    print("\n".join([title, *lines]), file=sys.stderr, flush=True)


def _write_row(name: str, text: str) -> None:
    _write("After the first step", [f"  {name}  {text}"])


def _model_name(model: Any) -> str:
    config = getattr(model, "config", None)
    source = getattr(config, "_name_or_path", "") or ""
    return f"{type(model).__name__} from {source}" if source else type(model).__name__


def _parameter_text(model: Any) -> str:
    total = sum(_numel(parameter) for parameter in model.parameters())
    trained = sum(_numel(parameter) for parameter in model.parameters() if parameter.requires_grad)
    share = "all" if trained == total else f"{trained / max(total, 1):.2%}"
    return f"{_count(total)}, trained: {_count(trained)} ({share})"


def _numel(parameter: Any) -> int:
    # ZeRO-3 leaves an empty tensor behind and keeps the true size beside it.
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _device_text(args: Any, world: int) -> str:
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else counted(torch.get_num_threads(), "thread")
    return f"{device} ({name})" + (f", {world} processes" if world > 1 else "")


def _dtype_text(model: Any, args: Any) -> str:
    counts = memory_use(model).dtypes
    stored = ", ".join(f"{name} {_count(count)}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))
    compute = {"bf16": "bfloat16", "fp16": "float16", "fp8": "float8"}.get(args.mixed_precision)
    return f"stored {stored or 'nothing'}; " + (f"computed in {compute} (autocast)" if compute else "no autocast")


def _batch_text(plan: Any, world: int) -> str:
    total, accumulation = plan.total_batch_size, plan.accumulation
    per_device = total // max(world * accumulation, 1)
    return (
        f"{counted(total, 'row')} = {per_device} per device x {accumulation} accumulated x {counted(world, 'process')}"
    )


def _length_text(plan: Any, state: Any, args: Any) -> str:
    epochs = args.num_train_epochs if args.max_steps < 0 else plan.max_steps / max(plan.updates_per_epoch, 1)
    text = f"{counted(plan.max_steps, 'step')}, {counted(epochs, 'epoch')}, {counted(plan.num_examples, 'row')}"
    return text + (f", continuing at step {state.global_step:,}" if state.global_step else "")


def _optimizer_text(model: Any, optimizer: Any, args: Any) -> str:
    # One wrapper only: what ZeRO's optimizer holds is divided, and does not follow from the size of the weights.
    inner = getattr(optimizer, "optimizer", optimizer)
    name = type(inner).__name__
    rate = f"learning rate {args.learning_rate:g}, {args.lr_scheduler_type!s}"
    held = memory_use(model, inner).optimizer
    if held:
        return f"{name}, {rate}, state {format_bytes(held)}"
    expected = expected_state_bytes(model, inner)
    if expected is None:
        return f"{name}, {rate}"
    return f"{name}, {rate}, state about {format_bytes(expected)} after the first step"


def _memory_text(model: Any, optimizer: Any) -> str:
    device = peak_device_bytes()
    peak = f"device peak {format_bytes(device)}, " if device is not None else ""
    text = f"{peak}process peak {format_bytes(peak_rss_bytes())}"
    if model is not None:
        held = memory_use(model, unwrap_optimizer(optimizer))
        text += f"; parameters {format_bytes(held.parameters)}, optimizer {format_bytes(held.optimizer)}"
    return text


def _count(number: int) -> str:
    """Returns a count for people.

    >>> _count(999), _count(134_515_008), _count(7_000_000_000)
    ('999', '134.5M', '7.0B')
    """
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(number)


def counted(number: float, what: str) -> str:
    """Returns a number of things.

    >>> counted(1, "thread"), counted(2, "process"), counted(1200, "step"), counted(0.5, "epoch")
    ('1 thread', '2 processes', '1,200 steps', '0.5 epochs')
    """
    text = f"{number:,.4g}" if isinstance(number, float) else f"{number:,}"
    return f"{text} {what}" + ("" if text == "1" else "es" if what.endswith("s") else "s")


def _duration(seconds: float) -> str:
    """Returns a time for people.

    >>> _duration(3.21), _duration(75), _duration(7322)
    ('3.2 s', '1 min 15 s', '2 h 2 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
