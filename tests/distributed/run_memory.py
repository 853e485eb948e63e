"""Trains two steps and writes what each process holds: weights, gradients, optimizer state, and the most at any moment.

accelerate launch --config_file FILE run_memory.py OUT '{"backend": "zero2", "bf16": false}'

Leaves `OUT/rank-N.json`. Every tensor of the process is counted, its memory once; none of what is inside a kernel is.
"""

import gc
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
# Wide enough that ZeRO-3 divides every matrix: it keeps weights below 100,000 values whole.
MODEL: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
BUCKET = 3_000_000
ARGUMENTS: dict[str, Any] = {
    "per_device_train_batch_size": 1,
    "max_length": 32,
    "max_steps": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "log_level": "error",
    "padding_free": False,
    "gradient_checkpointing": False,
    "max_grad_norm": 1.0,
}


def storages(tensors: Any) -> dict[int, int]:
    """Returns the bytes of each memory in which `tensors` lie on this process, by address."""
    found: dict[int, int] = {}
    for tensor in tensors:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        for each in (local, getattr(tensor, "ds_tensor", None)):
            if each is not None and each.device.type == "cpu" and each.untyped_storage().nbytes():
                found[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
    return found


def everything() -> dict[int, int]:
    tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    return storages(each for each in tensors if not issubclass(type(each), torch._subclasses.FakeTensor))


class Census:
    """Counts the tensors of a training when told to; `report` holds the largest numbers."""

    def __init__(self, trainer: Any, before: dict[int, int]) -> None:
        self.trainer, self.report = trainer, {"peak": 0, "gradients": 0}
        self.before = sum(before.values())

    def peak(self, *_: Any) -> None:
        """Notes the most gradients, and the most of everything, so far."""
        gradients = self.gradients()
        buckets, whole = self.buckets(), sum(gradients.values())
        self.report["gradients"] = max(self.report["gradients"], whole + buckets)
        # Python's list of objects lacks what only C++ holds (gradients, buckets), and what was there before the run.
        found = {**everything(), **gradients, **self.weights(), **self.optimizer_state(), **self.copies()}
        self.report["peak"] = max(self.report["peak"], sum(found.values()) + buckets - self.before)

    def weights(self) -> dict[int, int]:
        return storages([*self.trainer.model.parameters(), *self.trainer.model.buffers()])

    def optimizer_state(self) -> dict[int, int]:
        """Returns moments, and the optimizer's own copy of the weights where it has one."""
        optimizer = self.trainer.optimizer
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        owned = [p for group in optimizer.param_groups for p in group["params"]]
        engine = getattr(self.trainer.model_wrapped, "optimizer", None)
        for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):  # ZeRO's float32 weights
            owned += tensors_in(getattr(engine, name, None))
        return storages([*tensors_in(dict(optimizer.state)), *owned])

    def copies(self) -> dict[int, int]:
        """Returns the gradients that ZeRO copies for its optimizer inside a step."""
        engine = getattr(self.trainer.model_wrapped, "optimizer", None)
        names = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
        owned = [tensor for name in names for tensor in tensors_in(getattr(engine, name, None))]
        return storages([tensor.grad for tensor in owned if tensor.grad is not None])

    def gradients(self) -> dict[int, int]:
        found = storages([p.grad for p in self.trainer.model.parameters() if p.grad is not None])
        inner = getattr(self.trainer.model_wrapped, "optimizer", None)  # DeepSpeed's, with gradients of its own
        for name in ("averaged_gradients", "grad_partitions_flat_buffer", "ipg_buckets"):
            found |= storages(tensors_in(getattr(inner, name, None)))
        return found

    def buckets(self) -> int:
        """Returns the bytes of DDP's buckets, which it copies gradients to."""
        reducer = getattr(self.trainer.model_wrapped, "reducer", None)
        if reducer is None:
            return 0
        return sum(bucket.buffer().nbytes for bucket in reducer._get_zeros_like_grad_buckets())

    def at_rest(self) -> None:
        """Notes weights and optimizer state between two steps."""
        self.peak()
        weights = self.weights()
        self.report["weights"] = sum(weights.values())
        self.report["moments"] = sum(size for key, size in self.optimizer_state().items() if key not in weights)


def tensors_in(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for member in value.values():
            yield from tensors_in(member)
    elif isinstance(value, (list, tuple)):
        for member in value:
            yield from tensors_in(member)
    elif hasattr(value, "buffer"):
        yield from tensors_in(value.buffer)


def counted(step: Any, census: Census) -> Any:
    def count_and_step(*args: Any, **kwargs: Any) -> Any:
        census.peak()
        return step(*args, **kwargs)

    return count_and_step


def watch(trainer: Any, before: dict[int, int]) -> Census:
    import finetune

    census = Census(trainer, before)

    class Watch(finetune.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if trainer.state.global_step:  # the second step: everything is allocated
                for layer in trainer.model.modules():
                    if type(layer).__name__ in ("LlamaDecoderLayer", "Linear"):
                        layer.register_forward_hook(census.peak)
                        layer.register_full_backward_hook(census.peak)
                optimizer = trainer.model_wrapped.optimizer if trainer.is_deepspeed_enabled else trainer.optimizer
                for each in (optimizer, optimizer.optimizer):  # the wrapper, and torch's inside
                    each.step = counted(each.step, census)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if trainer.state.global_step == 2:
                census.at_rest()

    trainer.add_callback(Watch())
    return census


def main(out: Path, options: dict[str, Any]) -> None:
    import finetune

    load(HERE / "cpu_shim.py").install(options["backend"])
    arguments = {**ARGUMENTS, "bf16": options["bf16"]}
    arguments |= {"ddp_backend": "gloo"} if options["backend"].startswith("zero") else {"use_cpu": True}
    rows = [{"input_ids": list(range(5, 37)), "labels": list(range(5, 37))} for _ in range(8)]
    tokenizer = fixtures.make_chat_tokenizer()
    before = everything()
    trainer = finetune.SFTTrainer(
        model=fixtures.make_tiny_llama(**MODEL),
        args=finetune.SFTConfig(str(out), **arguments),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    if trainer.accelerator.state.deepspeed_plugin is not None:
        # The default of 5e8 elements, taken whole, would hide everything else.
        zero = trainer.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero.update(reduce_bucket_size=BUCKET)
    census = watch(trainer, before)
    trainer.train()
    report = {**census.report, "processes": trainer.accelerator.num_processes}
    report["kind"] = str(trainer.accelerator.distributed_type).rsplit(".", 1)[-1]
    (out / f"rank-{trainer.accelerator.process_index}.json").write_text(json.dumps(report))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    # Not through the interpreter's end: gloo's threads now and then abort it there.
    sys.stdout.flush()
    os._exit(0)
