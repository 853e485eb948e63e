"""Two processes save together: complete when both wrote, absent when one failed, and neither waits for ever."""

import contextlib
import os
import types
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from finetune.checkpoint import backends, layout, manager
from finetune.checkpoint.manifest import find_problem, read_manifest
from finetune.checkpoint.store import CheckpointStore
from finetune.errors import CheckpointError

CONFTEST = Path(__file__).parents[1] / "unit" / "checkpoint" / "conftest.py"


def _worker(rank: int, body: Callable[..., None], store: str, arguments: tuple[Any, ...]) -> None:
    import importlib.util

    os.environ.update(OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    patience = timedelta(seconds=30)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=patience)
    spec = importlib.util.spec_from_file_location("tiny", CONFTEST)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(out: str, **options: Any) -> Any:
        tiny = module.TinyRun(Path(out), world_size=2, process_index=rank, should_save=rank == 0, **options)
        torch.manual_seed(rank)
        return tiny

    body(rank, run, *arguments)
    dist.barrier()
    # Not through the interpreter's end: gloo's threads now and then abort it there.
    os._exit(0)


def launch(body: Callable[..., None], tmp_path: Path, *arguments: Any) -> None:
    mp.start_processes(_worker, (body, str(tmp_path / "store"), arguments), nprocs=2, start_method="spawn")


def _all(rank: int, make: Any, out: str) -> None:
    for asynchronous in (False, True):
        folder = f"{out}/{asynchronous}"
        run = make(folder, asynchronous=asynchronous)
        run.train(2)
        run.counter.tokens = 100 + rank
        report = run.save()
        run.writer.wait()
        draws = torch.rand(4)
        assert find_problem(report.path) is None
        manifest = read_manifest(report.path)
        assert manifest is not None and manifest.world_size == 2
        assert {layout.rng_name(r, 2) for r in (0, 1)} | {layout.stateful_name(r, 2) for r in (0, 1)} <= set(
            manifest.files
        )
        other = make(folder)
        path = manager.resolve_resume(True, folder)
        assert path == str(report.path)
        other.train(1)
        manager.load_model(path, accelerator=other.accelerator, model=other.model)
        restored = manager.load_stateful(path, {"counter": other.counter}, rank=rank, world_size=2)
        manager.load_rng_state(path, other.args)
        assert restored == ["counter"] and other.counter.tokens == 100 + rank, "each process its own"
        assert torch.equal(torch.rand(4), draws)
    _failing(rank, make, out)
    _damaged(rank, make, out)


def _failing(rank: int, make: Any, out: str) -> None:
    """Process 1, or process 0, fails; both get an error and the last checkpoint stays."""
    for asynchronous in (False, True):
        for bad in (0, 1):
            folder = f"{out}/bad-{asynchronous}-{bad}"
            run = make(folder, asynchronous=asynchronous)
            run.train(1)
            run.save()

            def fail(path: str, run: Any = run, bad: int = bad) -> None:
                if rank == bad:
                    run.writer.run(lambda: (_ for _ in ()).throw(OSError(28, "No space left on device")))

            run._save_scaler = fail
            run.train(1)
            with pytest.raises(CheckpointError, match="No space left on device") as caught:
                run.save()
                run.writer.wait()
            assert rank == bad or f"Process {bad}" in str(caught.value)
            del run._save_scaler
            dist.barrier()
            assert sorted(p.name for p in Path(folder).iterdir()) == ["checkpoint-1", "latest"]
            dist.barrier()  # the next save begins to write
            run.save()
            run.writer.wait()
            assert find_problem(Path(folder) / "checkpoint-2") is None


def _damaged(rank: int, make: Any, out: str) -> None:
    folder = f"{out}/False"
    dist.barrier()
    if rank == 0:
        (Path(folder) / "checkpoint-2" / "rng_state_1.pth").unlink()
    dist.barrier()
    with pytest.raises(CheckpointError, match=r"rng_state_1\.pth is missing"):
        manager.resolve_resume(True, folder)
    assert manager.resolve_resume("auto", folder) is None
    run = make(folder)
    with pytest.raises(CheckpointError, match=r"rng_state_1\.pth is missing"):
        manager.load_model(f"{folder}/checkpoint-2", accelerator=run.accelerator, model=run.model)


def test_two_processes(tmp_path: Path) -> None:
    launch(_all, tmp_path, str(tmp_path))


def _wait_for_the_other() -> None:
    """A collective, as FSDP and DeepSpeed have between their writes."""
    dist.all_reduce(torch.zeros(999))


def _no_space() -> None:
    raise OSError(28, "No space left on device")


def _shard_fails(rank: int, make: Any, out: str) -> None:
    """A write of a sharded model fails on one process, before or after a collective that the other one enters."""
    import accelerate.utils

    places = ("nothing", "mkdir", "weights", "model", "optimizer")

    def reach(place: str) -> None:
        if (place, rank) == (failing, bad):
            _no_space()

    def gather(*_: Any) -> dict[str, Any]:
        _wait_for_the_other()
        return {}

    def fsdp(place: str, *_: Any, **__: Any) -> None:
        _wait_for_the_other()
        reach(place)

    accelerate.utils.save_fsdp_model = partial(fsdp, "model")
    accelerate.utils.save_fsdp_optimizer = partial(fsdp, "optimizer")
    mkdir = Path.mkdir

    def refusing(self: Path, *options: Any, **more: Any) -> None:
        if not (failing == "mkdir" and self.name == "checkpoint-1" and more.get("exist_ok")):
            return mkdir(self, *options, **more)
        reach("mkdir")

    Path.mkdir = refusing
    for failing in places:
        for bad in (0, 1):
            run = make(f"{out}/fsdp-{failing}-{bad}")
            plugin = SimpleNamespace(fsdp_version=2, state_dict_type="FULL_STATE_DICT")
            run.accelerator.state.fsdp_plugin, run.accelerator.get_state_dict = plugin, gather
            run._save = lambda *_, **__: reach("weights")
            run.train(1)
            _saves_or_fails(run, rank, bad, failing != "nothing")


def _zero_fails(rank: int, make: Any, out: str) -> None:
    """DeepSpeed ends its save with a barrier, also when this process could not write."""

    class Files:
        def save(self, state: Any, path: str) -> None:
            if rank == bad:
                _no_space()

    class Engine:
        checkpoint_engine = Files()
        config = types.MappingProxyType({})

        def save_checkpoint(self, folder: str) -> None:
            self.checkpoint_engine.save({}, folder)
            _wait_for_the_other()

    for bad in (0, 1, None):
        run = make(f"{out}/zero-{bad}")
        run.train(1)
        run.accelerator.state.deepspeed_plugin = SimpleNamespace(zero_stage=2)
        run.accelerator.get_state_dict = lambda _: {}
        engine: Any = Engine()
        engine.module = run.model
        run.save_model = lambda *_, **__: None
        run._save_optimizer_and_scheduler = lambda folder, engine=engine, run=run: backends.save_sharded(
            folder, accelerator=run.accelerator, model=run.model, model_wrapped=engine, optimizer=run.optimizer
        )
        _saves_or_fails(run, rank, bad, bad is not None)
        assert type(engine.checkpoint_engine).save is engine.checkpoint_engine.save.__func__, "as it was"


def _saves_or_fails(run: Any, rank: int, bad: int | None, fails: bool) -> None:
    if not fails:
        assert find_problem(run.save().path) is None
        return
    with pytest.raises(CheckpointError, match="No space left on device") as caught:
        run.save()
    assert rank == bad or f"Process {bad}" in str(caught.value)
    dist.barrier()
    assert not list(run.out.glob("**/checkpoint-1"))


def _sharded_write_fails(rank: int, make: Any, out: str) -> None:
    _shard_fails(rank, make, out)
    _zero_fails(rank, make, out)


def test_failed_write_of_a_sharded_model(tmp_path: Path) -> None:
    launch(_sharded_write_fails, tmp_path, str(tmp_path))


def _background_fails(rank: int, make: Any, out: str) -> None:
    """A background save fails on process 0 alone, in its last step; the run goes on, the same on both."""
    run = make(f"{out}/background", asynchronous=True)
    state = run.events.state
    for tolerant in (True, False):
        run.writer.start_run(tolerant=tolerant)
        run.train(1)
        state.best_global_step = state.global_step
        run.save()
        run.writer.wait()
        before = state.best_model_checkpoint
        assert before == str(run.out / f"checkpoint-{state.global_step}")
        run.train(1)
        state.best_global_step = state.global_step
        raised = contextlib.nullcontext() if tolerant else pytest.raises(CheckpointError, match="No space left on")
        with pytest.MonkeyPatch.context() as patch, raised:
            patch.setattr(CheckpointStore, "commit", lambda *_, **__: _no_space())
            run.save()
            run.writer.wait()
        assert state.best_model_checkpoint == before
        report = run.writer.last
        assert report.step == state.global_step and "No space left on device" in str(report.error)


def _no_file_for_a_message(rank: int, make: Any, out: str) -> None:
    """Processes learn that all have written, or not, without room for another file."""
    write = Path.write_text

    def refusing(self: Path, *more: Any, **options: Any) -> None:
        _no_space() if ".rank" in self.name else write(self, *more, **options)

    run = make(f"{out}/messages", asynchronous=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_text", refusing)
        for step in (1, 2):
            run.train(1).save()
            run.writer.wait()
            assert find_problem(run.out / f"checkpoint-{step}") is None
    assert rank == 1 or not (run.out / ".staging").exists()


def _in_background(rank: int, make: Any, out: str) -> None:
    _no_file_for_a_message(rank, make, out)
    _background_fails(rank, make, out)


def test_saves_in_the_background(tmp_path: Path) -> None:
    launch(_in_background, tmp_path, str(tmp_path))


def _unshared(rank: int, make: Any, out: str) -> None:
    run = make(f"{out}/node{rank}")  # each process has its own disk
    run.train(1)
    with pytest.raises(CheckpointError, match=r"1 of 2 processes|Process 0"):
        run.save()
    assert not (Path(f"{out}/node0") / "checkpoint-1").exists()


def test_folder_that_is_not_shared(tmp_path: Path) -> None:
    launch(_unshared, tmp_path, str(tmp_path))
