"""Imports everything once, then forks one training per line of standard input; started by `test_crash.py`.

A line is JSON: {"out", "result", "kill_at", "arguments", "steps"}. The child trains with
`resume_from_checkpoint="auto"` and kills itself with SIGKILL at its `kill_at`-th touch of a file below `out` (opening,
renaming, removing, making a folder, truncating, flushing), which is where a crash could do harm; null lets it end.
Each line is answered with JSON: {"pid"} when the child starts, {"status"} when it is gone.
"""

import importlib.util
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("fixtures", Path(__file__).parents[1] / "conftest.py")
assert spec is not None and spec.loader is not None
fixtures: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fixtures)

import finetune  # noqa: E402

TOUCHES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}


class Touches:
    """Counts the events at which a crash could do harm, and crashes at one of them."""

    def __init__(self, out: str, kill_at: int | None) -> None:
        self.out, self.kill_at, self.count = out, kill_at, 0
        real = os.fsync

        def fsync(descriptor: int) -> None:
            self.touch()
            real(descriptor)

        os.fsync = fsync
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: Any) -> None:
        if event in TOUCHES and any(
            isinstance(a, (str, os.PathLike)) and str(a).startswith(self.out) for a in arguments
        ):
            self.touch()

    def touch(self) -> None:
        self.count += 1
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def train(job: dict[str, Any]) -> None:
    touches = Touches(job["out"], job["kill_at"])
    arguments = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": job["steps"], "save_steps": 1,
        "learning_rate": 1e-2, "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True,
        "save_total_limit": 2, "seed": 5, **job["arguments"],
    }  # fmt: skip
    dataset = fixtures.make_padded_dataset(18)
    trainer = finetune.Trainer(
        model=fixtures.make_tiny_llama(attention_dropout=0.1),
        args=finetune.TrainingArguments(job["out"], **arguments),
        train_dataset=dataset,
    )
    trainer.train(resume_from_checkpoint="auto")
    timed = ("runtime", "per_second", "flos")
    history = [{k: v for k, v in entry.items() if not k.endswith(timed)} for entry in trainer.state.log_history]
    end = {
        "weights": trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict(), "history": history,
        "schedule": trainer.lr_scheduler.state_dict(), "rng": torch.get_rng_state(),
        "callbacks": trainer.state.stateful_callbacks,
    }  # fmt: skip
    torch.save(end, job["result"])
    Path(job["result"]).with_suffix(".touches").write_text(str(touches.count))


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                train(job)
                code = 0
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        print(json.dumps({"pid": pid}), file=answers, flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), file=answers, flush=True)


if __name__ == "__main__":
    main()
