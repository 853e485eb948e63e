"""Models, tokenizers and rows for the benchmarks: random, the same for the same seed, made without a network."""

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
CACHE = HERE / "results" / "cache"
SHAPES: dict[str, dict[str, int]] = {
    # parameters with vocabulary 8k: tiny 0.3M, narrow 1.5M, small 12.5M; the vocabulary study has a shape of its own.
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "narrow": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 4},
    "small": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6},
    "wide_head": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2, "num_attention_heads": 4},
    # SmolLM2-135M's shape.
    "135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
}


def make_llama(shape: str = "small", vocab_size: int = 8192, seed: int = 0, **overrides: Any) -> Any:
    """Returns a Llama with random weights and a tied head."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = {
        **SHAPES[shape],
        "vocab_size": vocab_size,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **overrides}))


def lengths(count: int, seed: int = 0, median: float = 90.0, sigma: float = 0.7, longest: int = 1024) -> np.ndarray:
    """Returns log-normal token counts: median 90 (about 70 words), mean 115, the 95th percentile 285."""
    drawn = np.random.default_rng(seed).lognormal(np.log(median), sigma, count)
    return np.clip(drawn.round(), 8, longest).astype(int)


def token_rows(
    count: int, *, vocab_size: int, seed: int = 0, prompt_share: float = 0.6, length: int | None = None
) -> Any:
    """Returns a dataset of token ids with a completion mask: the first 60 % of each row are the prompt."""
    from datasets import Dataset

    generator = np.random.default_rng(seed)
    counts = lengths(count, seed) if length is None else np.full(count, length)
    ids = [generator.integers(3, vocab_size, each).tolist() for each in counts]
    masks = [[0] * round(each * prompt_share) + [1] * (each - round(each * prompt_share)) for each in counts]
    return Dataset.from_dict({"input_ids": ids, "completion_mask": masks})


def words(count: int, seed: int = 0) -> list[str]:
    """Returns invented words of 2 to 12 letters, for a text whose tokens are as long as those of a real one."""
    chooser = random.Random(seed)
    syllables = [a + b + c for a in "bcdfghklmnprstvw" for b in "aeiou" for c in ("", "n", "r", "s", "l", "t")]
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(chooser.choices(syllables, k=chooser.choice([1, 1, 2, 2, 3, 4])))[:12]] = None
    return list(found)


def chats(count: int, seed: int = 0) -> list[list[dict[str, str]]]:
    """Returns chats of one to three turns, log-normal in length: about 70 words, 60 % of them the user's."""
    vocabulary = words(6000)
    generator = np.random.default_rng(seed)
    # Word frequencies fall like 1 / rank, as in language.
    weights = 1 / np.arange(1, len(vocabulary) + 1)
    cumulative = np.cumsum(weights / weights.sum())
    totals = np.clip(generator.lognormal(np.log(70), 0.7, count).round(), 6, 700).astype(int)
    turns = generator.integers(1, 4, count)
    drawn = np.searchsorted(cumulative, generator.random(int(totals.sum())))
    rows: list[list[dict[str, str]]] = []
    at = 0
    for total, number in zip(totals, turns, strict=True):
        text = [vocabulary[index] for index in drawn[at : at + total]]
        at += total
        share = max(2, total // number)
        messages: list[dict[str, str]] = []
        for turn in range(number):
            part = text[turn * share : (turn + 1) * share if turn < number - 1 else total] or ["yes", "no"]
            cut = max(1, round(len(part) * 0.6))
            messages.append({"role": "user", "content": " ".join(part[:cut])})
            messages.append({"role": "assistant", "content": " ".join(part[cut:] or ["yes"])})
        rows.append(messages)
    return rows


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{{ '\n' }}{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer(vocab_size: int = 8192) -> Any:
    """Returns a byte-level BPE tokenizer with a chat template, trained on the invented text once and kept on disk."""
    from transformers import PreTrainedTokenizerFast

    if vocab_size > 8192:
        return _word_tokenizer(vocab_size)
    folder = CACHE / f"tokenizer_{vocab_size}"
    if not (folder / "tokenizer.json").exists():
        _train_tokenizer(vocab_size, folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _word_tokenizer(vocab_size: int) -> Any:
    """Returns a tokenizer whose vocabulary is only large: the rows that go with it are token ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    named = {"<pad>": 0, "<s>": 1, "</s>": 2}
    vocabulary = {**named, **{f"w{index}": index for index in range(len(named), vocab_size)}}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def _train_tokenizer(vocab_size: int, folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    bpe.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    text = [message["content"] for chat in chats(4000, seed=99) for message in chat]
    bpe.train_from_iterator(text, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = CHATML
    made.save_pretrained(folder)


def chat_file(count: int, seed: int = 0) -> Path:
    """Returns a JSON Lines file of chats, written once."""
    path = CACHE / f"chats_{count}_{seed}.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = (json.dumps({"messages": messages}) for messages in chats(count, seed))
        temporary = path.with_suffix(f".{os.getpid()}")  # all sides of a case come here at once
        temporary.write_text("\n".join(rows) + "\n")
        temporary.rename(path)
    return path
