"""Trains a tiny model without Liger's kernels and with several choices of them; one process of a group, or alone.

TRITON_INTERPRET=1 accelerate launch --config_file FILE run_liger.py OUT '{"backend": "fsdp2", "cases": ["plain"]}'

Leaves `OUT/report.json`: for each case its losses and gradient norms, who computed the loss, and which of Liger's
functions were called.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fixtures = load(HERE.parent / "conftest.py")
ARGUMENTS: dict[str, Any] = {
    "per_device_train_batch_size": 1,
    "max_steps": 2,
    "learning_rate": 1e-2,
    "max_grad_norm": 0.5,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "log_level": "error",
    "bf16": False,
    "padding_free": False,
}
LIGER: dict[str, Any] = {
    "plain": None,
    "fused_head": {},
    "own_head": {"fused_linear_cross_entropy": False},
    "cross_entropy": {"cross_entropy": True},
}
CASES = {**LIGER, **{f"lora_{name}": config for name, config in LIGER.items()}}
FUNCTIONS = {
    "fused_linear_cross_entropy": "LigerFusedLinearCrossEntropyFunction",
    "cross_entropy": "LigerCrossEntropyFunction",
    "rms_norm": "LigerRMSNormFunction",
    "swiglu": "LigerSiLUMulFunction",
    "rope": "LigerRopeFunction",
}


def count_calls(calls: dict[str, int]) -> None:
    """Lets every call of Liger's functions count, under the name that `liger_kernel_config` has for it."""
    from liger_kernel import ops

    for name, function in FUNCTIONS.items():
        cls: Any = getattr(ops, function)
        forward = cls.forward

        def counting(*args: Any, _name: str = name, _forward: Any = forward, **kwargs: Any) -> Any:
            calls[_name] = calls.get(_name, 0) + 1
            return _forward(*args, **kwargs)

        cls.forward = staticmethod(counting)


def train(name: str, out: Path, backend: str) -> tuple[Any, str]:
    import finetune

    arguments = {**ARGUMENTS, "gradient_accumulation_steps": 2 if backend == "one" else 1}
    arguments |= {"ddp_backend": "gloo"} if backend.startswith("zero") else {"use_cpu": True}
    if CASES[name] is not None:
        arguments |= {"use_liger_kernel": True, "liger_kernel_config": CASES[name]}
    lora: Any = None
    if name.startswith("lora"):
        from peft import LoraConfig

        lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    who: list[str] = []

    class Ask(finetune.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            who.append(trainer.describe_loss())

    trainer: Any = finetune.SFTTrainer(
        model=fixtures.make_tiny_llama(512, num_hidden_layers=1),
        args=finetune.SFTConfig(str(out), **arguments),
        train_dataset=fixtures.make_token_rows(8, seed=3),
        processing_class=fixtures.make_chat_tokenizer(),
        peft_config=lora,
        callbacks=[Ask()],
    )
    if trainer.accelerator.state.deepspeed_plugin is not None:
        # Otherwise small weights, which all of these are, are never divided.
        trainer.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"].update(
            stage3_param_persistence_threshold=0
        )
    trainer.train()
    return trainer, who[-1]


def main(out: Path, options: dict[str, Any]) -> None:
    from accelerate.state import AcceleratorState, GradientState

    load(HERE / "triton_shim.py").install()
    load(HERE / "cpu_shim.py").install(options["backend"])
    calls: dict[str, int] = {}
    count_calls(calls)
    report: dict[str, Any] = {}
    for name in options["cases"]:
        torch.manual_seed(0)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        calls.clear()
        trainer, head = train(name, out / name, options["backend"])
        history = trainer.state.log_history
        report[name] = {
            "losses": [entry["loss"] for entry in history if "loss" in entry],
            "grad_norms": [entry["grad_norm"] for entry in history if "grad_norm" in entry],
            "head": head,
            "calls": sorted(calls),
            "processes": trainer.accelerator.num_processes,
            "kind": str(trainer.accelerator.distributed_type).rsplit(".", 1)[-1],
        }
        if trainer.is_world_process_zero():
            (out / "report.json").write_text(json.dumps(report, indent=1))
        trainer.accelerator.free_memory()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    # Not through the interpreter's end: gloo's threads now and then abort it there.
    sys.stdout.flush()
    os._exit(0)
