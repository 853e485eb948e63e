"""The predicted peak against the allocator's own record of a real training, on CPU."""

import gc
from contextlib import ExitStack, nullcontext

import pytest
import torch
from datasets import Dataset
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig, GPT2Config, LlamaConfig

from finetune import SFTConfig, SFTTrainer
from finetune.cli.demo import MODEL
from finetune.kernels import head_pass
from finetune.kernels.fused_head import fuse_head
from finetune.models.activation import activation_checkpointing
from finetune.optim.registry import build_optimizer
from finetune.reporting import planned_step
from finetune.reporting.memory_estimate import sharded
from finetune.reporting.memory_trace import GROUPS
from finetune.reporting.planned_step import PlannedStep, mixed_dtype

MODELS = {
    "llama": LlamaConfig(
        vocab_size=1500,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        tie_word_embeddings=True,
    ),
    "gpt2": GPT2Config(vocab_size=800, n_embd=96, n_layer=3, n_head=4, n_positions=256, bos_token_id=0, eos_token_id=0),
    "gemma3": Gemma3TextConfig(
        vocab_size=2000,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
    ),
}


def arguments(folder, **changes):
    values = {"per_device_train_batch_size": 4, "max_length": 128, "use_cpu": True, "gradient_checkpointing": False}
    return SFTConfig(str(folder), **{**values, **changes})


def predicted(config, args):
    with PlannedStep(config, args, autocast=mixed_dtype(args)) as step:
        return step.trace()


def highest(record):
    """Returns the highest sum of what torch's CPU allocator had given out within `record`, in bytes.

    Collect garbage before recording: what others had allocated and is freed within counts as less than nothing.
    """
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def measured(config, args):
    """Returns the peak of two real updates, from the making of the model on, without any code of the plan."""
    ids = torch.randint(0, config.vocab_size, (args.per_device_train_batch_size, args.max_length))
    gc.collect()
    with ExitStack() as stack, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        model = AutoModelForCausalLM.from_config(config).train()
        stack.enter_context(activation_checkpointing(model, args.gradient_checkpointing))
        stack.enter_context(fuse_head(model, entropy=True))
        optimizer = build_optimizer(args, model)
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=bool(args.bf16)):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            del loss
            clip = getattr(optimizer, "clip_grad_norm", None)
            clip(1.0) if clip else torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return highest(record)


GALORE = {"optim_target_modules": "all-linear", "optim_args": "rank=8"}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "changes",
    [
        {"optim": "adamw_torch"},
        {"optim": "galore_adamw_layerwise", **GALORE},
        {"optim": "adamw_torch", "gradient_checkpointing": True, "bf16": True},
    ],
    ids=["adamw", "galore-layerwise", "checkpointing-bf16"],
)
def test_peak_is_within_ten_percent(name, changes, tmp_path):
    args = arguments(tmp_path, **changes)
    guess = predicted(MODELS[name], args).peak()[0]
    real = measured(MODELS[name], args)
    assert guess == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("bf16", [False, True])
def test_equal_chunks_of_the_head_are_traced_once_and_the_plan_is_the_same(bf16, tmp_path, monkeypatch):
    calls = []
    softmax = head_pass.HeadPass._softmax_and_gradient
    count = lambda self, *args: (calls.append(1), softmax(self, *args))[1]  # noqa: E731
    monkeypatch.setattr(head_pass.HeadPass, "_softmax_and_gradient", count)
    # 512 tokens are 9 chunks, the last one shorter, of 8 blocks.
    monkeypatch.setitem(head_pass._CHUNK_BYTES, "cpu", 61 * 1500 * (2 if bf16 else 4))
    monkeypatch.setitem(head_pass._BLOCK_BYTES, "cpu", 8 * 1500 * 4)
    args = arguments(tmp_path, optim="adamw_torch", bf16=bf16)
    short = predicted(MODELS["llama"], args)
    assert len(calls) == 2 * 3 * 3
    monkeypatch.setattr(planned_step, "repeats_skipped", nullcontext)
    whole = predicted(MODELS["llama"], args)
    assert len(calls) > 2 * 3 * 3 + 2 * 64
    assert short.peak() == whole.peak()
    assert {group: short.largest(group) for group in GROUPS} == {group: whole.largest(group) for group in GROUPS}


def tracked_by_torch(config, args, ranks):
    """Returns the FSDP2 peak of torch's own tracker, in a group of `ranks` processes of which only one exists."""
    import torch.distributed as dist
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        options = {
            "mesh": dist.init_device_mesh("cpu", (ranks,)),
            "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16),
        }
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = AutoModelForCausalLM.from_config(config).train()
            for layer in model.model.layers:
                fully_shard(layer, **options)
            fully_shard(model, **options)
            optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
            ids = torch.zeros(args.per_device_train_batch_size, args.max_length, dtype=torch.long)
            tracker = FSDPMemTracker(model, optimizer)
            tracker.track_inputs((ids,))
            with tracker:
                for update in range(2):
                    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    if update == 0:
                        tracker.reset_mod_stats()
            (snapshot,) = tracker.get_tracker_snapshot("peak").values()
        return next(size for name, size in snapshot.items() if str(name).endswith("Total"))
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_fsdp2_agrees_with_torchs_own_tracker(tmp_path, monkeypatch):
    monkeypatch.setattr(planned_step, "unsupported_reason", lambda model: "the tracker runs the plain loss")
    config = MODELS["llama"]
    args = arguments(tmp_path, optim="adamw_torch", bf16=True, max_grad_norm=0.0)
    with PlannedStep(config, args, autocast=torch.bfloat16) as step:
        trace = step.trace()
    with PlannedStep(config, args, torch.bfloat16) as narrow:
        row = sharded("fsdp2", 8, trace, narrow.trace(), step.sizes)
    assert row.peak == pytest.approx(tracked_by_torch(config, args, 8), rel=0.1)


def test_peak_of_a_whole_sft_run(tmp_path):
    """The demonstration model through `SFTTrainer`: what the trainer adds to a bare step is within the ten percent."""
    config = AutoConfig.from_pretrained(MODEL)
    args = arguments(tmp_path, max_steps=2, save_strategy="no", report_to="none", log_level="error", disable_tqdm=True)
    rows = Dataset.from_list([{"input_ids": torch.randint(5, 1500, (args.max_length,)).tolist()} for _ in range(8)])
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer).train()
    assert predicted(config, args).peak()[0] == pytest.approx(highest(record), rel=0.1)
