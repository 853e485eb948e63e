"""Fixtures shared by all tests: tiny models, a chat tokenizer and a small dataset, made in the process."""

import logging
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from typing import Any

import pytest
import torch

WORDS = (
    "the cat sat on a mat and saw the red sun go down over hills while birds sang to rivers that ran past old stone "
    "walls where children play every day with small boats made of paper what is your name please tell me more about it"
).split()

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{{ '\n' }}{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(autouse=True)
def _same_log_levels() -> Any:
    """`log_level` is the whole process's; a test that asks for another one must not silence those after it."""
    loggers = [logging.getLogger(name) for name in ("finetune", "transformers", "datasets", "accelerate")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(autouse=True)
def _fresh_accelerate_state() -> Any:
    """accelerate keeps process-wide singletons; each test starts without them."""
    yield
    from accelerate.state import AcceleratorState, GradientState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()


def make_tiny_llama(vocab_size: int = 128, seed: int = 0, **overrides: Any) -> Any:
    """Returns a two-layer Llama of width 32, the same for the same seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **{**settings, **overrides}))


def make_tiny_bert(num_labels: int = 3, seed: int = 0, **overrides: Any) -> Any:
    """Returns a two-layer BERT classifier of width 32, dropout included."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    settings = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForSequenceClassification(
        BertConfig(vocab_size=128, num_labels=num_labels, max_position_embeddings=64, **{**settings, **overrides})
    )


def make_chat_tokenizer() -> Any:
    """Returns a fast byte-level BPE tokenizer with a ChatML template that marks what the assistant says."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        chat_template=CHATML,
        model_max_length=1024,
    )


def make_token_rows(
    rows: int = 20, vocab_size: int = 128, seed: int = 0, masked: bool = True
) -> list[dict[str, list[int]]]:
    """Returns rows of 5 to 14 random tokens; the first few labels of each are masked."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, size: int = 1) -> list[int]:
        return torch.randint(low, high, (size,), generator=generator).tolist()

    out = []
    for _ in range(rows):
        ids = draw(3, vocab_size, draw(5, 15)[0])
        hidden = draw(1, 4)[0] if masked else 0
        out.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * hidden + ids[hidden:]})
    return out


def make_padded_dataset(rows: int = 20, width: int = 14, **options: Any) -> Any:
    """Returns `make_token_rows` padded to one width, as a `datasets.Dataset`: any collator can stack it."""
    from datasets import Dataset

    padded = []
    for row in make_token_rows(rows, **options):
        missing = width - len(row["input_ids"])
        padded.append(
            {
                "input_ids": row["input_ids"] + [0] * missing,
                "attention_mask": row["attention_mask"] + [0] * missing,
                "labels": row["labels"] + [-100] * missing,
            }
        )
    return Dataset.from_list(padded)


@pytest.fixture
def tiny_llama() -> Callable[..., Any]:
    return make_tiny_llama


@pytest.fixture
def tiny_bert() -> Callable[..., Any]:
    return make_tiny_bert


@pytest.fixture(scope="session")
def chat_tokenizer_cached() -> Any:
    return make_chat_tokenizer()


@pytest.fixture
def chat_tokenizer(chat_tokenizer_cached: Any) -> Any:
    """A fresh copy, because trainers may set tokens on it."""
    import copy

    return copy.deepcopy(chat_tokenizer_cached)


@pytest.fixture
def token_rows() -> Callable[..., list[dict[str, list[int]]]]:
    return make_token_rows


@pytest.fixture
def padded_dataset() -> Callable[..., Any]:
    return make_padded_dataset
