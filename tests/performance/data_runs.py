"""One side of the comparisons of data preparation: from rows of chats to a first step or to packed rows."""

import tempfile
from pathlib import Path
from typing import Any

from harness import Pause, clock, clocked, since
from training import arguments, classes
from workloads import chat_file, chats, make_llama, tokenizer


def first_step(side: str, settings: dict[str, Any], pause: Pause) -> None:
    """Measures from a file of chats to the end of the first optimizer step, once: for a new process in every round.

    The side "bare" is the floor: the tokenizer at work on all rows, a model, and one step of a plain loop. A cold side
    gets an empty cache, a warm one the cache of the rounds before.
    """
    from datasets import load_dataset
    from transformers import TrainerCallback

    source = chat_file(settings["rows"])
    cache = settings.get("cache") or tempfile.mkdtemp(prefix="bench_first_step_")
    tokenizer()  # made once, outside the clock
    if side == "bare":
        pause(clocked(lambda: bare_first_step(load_dataset, source, cache, settings["warm"])))

    class FirstStep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            pause(since(begin))

    begin = clock()
    rows = load_dataset("json", data_files=str(source), split="train", cache_dir=cache)
    trainer = classes(side)[0](
        model=make_llama("tiny", 8192),
        args=arguments(side, {"max_steps": 1, "max_length": 512, "bf16": False, **settings["args"]}),
        train_dataset=rows,
        processing_class=tokenizer(),
        callbacks=[FirstStep()],
    )
    trainer.train()


def bare_first_step(load_dataset: Any, source: Path, cache: str, warm: bool) -> None:
    """Does the least that leads to a first step: reads the file, tokenises (cold), makes the model, takes one step."""
    import torch

    rows = load_dataset("json", data_files=str(source), split="train", cache_dir=cache)
    made = tokenizer()
    chosen = rows if not warm else rows.select(range(8))
    encoded = encode(made, chosen["messages"])
    model = make_llama("tiny", 8192)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = [torch.tensor(each.ids[:512]) for each in encoded[:8]]
    batch = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    model(input_ids=batch, labels=batch).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def encode(made: Any, messages: Any) -> Any:
    """Returns the encodings of chats: the template's text written by hand, the tokenizers library at its fastest."""
    texts = [
        "".join(f"<|im_start|>{each['role']}\n{each['content']}<|im_end|>\n" for each in chat) for chat in messages
    ]
    return made.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)


def prepare_rows(side: str, settings: dict[str, Any], pause: Pause) -> None:
    """Measures tokenising, masking and packing of chats that lie in memory: what the constructor does with rows.

    The side "tokenizer alone" is the floor: the tokenizers library on all cores, no template, masks or packing.
    """
    if side == "tokenizer alone":
        alone, messages = tokenizer(), chats(settings["rows"])
        while True:
            pause(clocked(lambda: {"encodings": len(encode(alone, messages))}))
    import datasets

    datasets.disable_progress_bars()
    datasets.disable_caching()
    table = {"messages": chats(settings["rows"])}
    trainer_class, _ = classes(side)
    made_tokenizer, model = tokenizer(), make_llama("tiny", 8192)
    small = datasets.Dataset.from_dict({"messages": table["messages"][:4]})
    args = arguments(side, {"bf16": False, "max_length": 1024, **settings["args"]})

    def build(rows: Any) -> Any:
        return trainer_class(model=model, args=args, train_dataset=rows, processing_class=made_tokenizer)

    build(small)  # imports, and what the constructor does besides
    while True:
        rows = datasets.Dataset.from_dict(table)
        measured = clocked(lambda: {"trainer": build(rows)})  # noqa: B023
        trainer = measured.pop("trainer")
        fixed = clocked(lambda: build(small) and None)["seconds"]
        packed = trainer.train_dataset
        tokens = int(sum(len(each) for each in packed["input_ids"]))
        pause({**measured, "fixed_seconds": fixed, "packed_rows": len(packed), "tokens": tokens})
