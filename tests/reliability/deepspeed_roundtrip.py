"""Saves, trains on, restores, trains on again, then plants a bomb; one process, ZeRO stage in the arguments.

    python deepspeed_roundtrip.py FOLDER STAGE PORT

Prints JSON: the losses after the save and after the restore, and what loading the bomb raised.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

folder, stage, port = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")

import deepspeed  # noqa: E402
import torch  # noqa: E402

from finetune.checkpoint import backends  # noqa: E402
from finetune.errors import CheckpointError  # noqa: E402


class Bomb:
    def __reduce__(self) -> Any:
        return (os.system, (f"touch {folder / 'executed'}",))


def engine() -> tuple[Any, Any]:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
    }
    return model, deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def train(wrapped: Any, generator: torch.Generator) -> list[float]:
    losses = []
    for _ in range(3):
        loss = wrapped(torch.randn(2, 8, generator=generator)).square().sum()
        wrapped.backward(loss)
        wrapped.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    deepspeed.init_distributed("gloo")
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=2)))
    generator = torch.Generator().manual_seed(0)
    model, wrapped = engine()
    train(wrapped, generator)
    backends.save_sharded(folder, accelerator=accelerator, model=model, model_wrapped=wrapped, optimizer=None)
    state = generator.get_state()
    report: dict[str, Any] = {"before": train(wrapped, generator)}
    other, restored = engine()
    backends.load_sharded_weights(folder, accelerator=accelerator, model=other, model_wrapped=restored)
    generator.set_state(state)
    report["after"] = train(restored, generator)
    for path in folder.glob("global_step*/*.pt"):
        torch.save({**torch.load(path, weights_only=False), "bomb": Bomb()}, path)
    try:
        backends.load_sharded_weights(folder, accelerator=accelerator, model=other, model_wrapped=restored)
    except CheckpointError as error:
        report["error"] = str(error)
    report["executed"] = (folder / "executed").exists()
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
