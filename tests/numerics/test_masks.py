"""Masks, truncation and counts against oracles that are written independently of the code, on random conversations.

Each family is a jinja template in the style of a known model family and a few lines of Python that say which text it
writes and which characters of it the model generates. The oracle never looks at our spans.
"""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from finetune.data.chat.templates import has_generation_markers, try_training_template
from finetune.data.preparation.batches import BatchProcessor
from finetune.data.preparation.labels import build_labels, count_supervised, truncate
from finetune.data.preparation.settings import DataSettings
from finetune.data.preparation.tokenize import TRUNCATED, TokenBatch

Message = dict[str, str]
FAST = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


@dataclass(frozen=True)
class Family:
    """A chat template and its oracle: opening, text before and after each role's content, trained end, last end."""

    template: str
    opening: str
    before: dict[str, str]
    after: dict[str, str]
    last: str = ""
    trim: bool = False
    system: bool = True


CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

QWEN = """{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}""" + CHATML

LLAMA = """{{ bos_token }}{% for m in messages %}
{{- '<|head|>' + m.role + '<|tail|>\n\n' + m.content | trim + '<|eot|>' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|tail|>\n\n' }}{% endif %}"""

GEMMA = """{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}
{%- for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}
{{- '<turn>' + role + '\n' + m.content | trim + '<end>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"""

MISTRAL = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}
{%- elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% else %}
{{- raise_exception('no system') }}{% endif %}
{%- endfor %}"""

PHI = """{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""

ZEPHYR = """{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""

VICUNA = """{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\n' }}{% elif m.role == 'user' %}
{{- 'USER: ' + m.content + ' ' }}{% else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""

EOS, BOS = "<|im_end|>", "<s>"


def _heads(pattern: str, assistant: str = "assistant") -> dict[str, str]:
    return {
        role: pattern.format(assistant if role == "assistant" else role) for role in ("system", "user", "assistant")
    }


def _same(text: str) -> dict[str, str]:
    return dict.fromkeys(("system", "user", "assistant"), text)


FAMILIES = {
    "chatml": Family(CHATML, "", _heads("<|im_start|>{}\n"), _same("<|im_end|>\n")),
    "qwen": Family(QWEN, "<|im_start|>system\nBe kind.<|im_end|>\n", _heads("<|im_start|>{}\n"), _same("<|im_end|>\n")),
    "llama": Family(LLAMA, BOS, _heads("<|head|>{}<|tail|>\n\n"), _same("<|eot|>"), trim=True),
    "gemma": Family(GEMMA, BOS, _heads("<turn>{}\n", "model"), _same("<end>\n"), trim=True, system=False),
    "mistral": Family(
        MISTRAL, BOS, {"user": "[INST] ", "assistant": ""}, {"user": " [/INST]", "assistant": EOS}, system=False
    ),
    "phi": Family(PHI, "", _heads("<|{}|>\n"), _same("<|end|>\n"), last=EOS),
    "zephyr": Family(ZEPHYR, "", _heads("<|{}|>\n"), _same(EOS + "\n")),
    "vicuna": Family(
        VICUNA,
        "",
        {"system": "", "user": "USER: ", "assistant": "ASSISTANT:"},
        {"system": "\n", "user": " ", "assistant": EOS},
    ),
}


def oracle(family: Family, messages: list[Message]) -> tuple[str, list[tuple[int, int]]]:
    """Returns the text of a conversation and the character ranges that the model generates."""
    text, spans = (family.opening if messages[0]["role"] != "system" or family.opening == BOS else ""), []
    for number, message in enumerate(messages):
        role, content = message["role"], message["content"].strip() if family.trim else message["content"]
        text += family.before[role]
        start = len(text)
        if role == "assistant" and family.before[role] in ("", "ASSISTANT:"):
            content = " " + content
        text += content + family.after[role]
        if number == len(messages) - 1:
            text += family.last
        if role == "assistant":
            spans.append((start, len(text)))
    return text, spans


words = st.text(alphabet="abc  \n.é😀", min_size=1, max_size=12).filter(lambda text: text.strip())


@st.composite
def conversations(draw: Any) -> list[Message]:
    messages = [{"role": "system", "content": draw(words)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        messages.append({"role": "user", "content": draw(words)})
        messages.append({"role": "assistant", "content": draw(words)})
    return messages


@pytest.fixture(scope="module")
def tokenizer(chat_tokenizer_cached: Any) -> Any:
    tokenizer = copy.deepcopy(chat_tokenizer_cached)
    markers = [
        "<|head|>",
        "<|tail|>",
        "<|eot|>",
        "<turn>",
        "<end>",
        "<|end|>",
        "<|user|>",
        "<|assistant|>",
        "<|system|>",
    ]
    tokenizer.add_special_tokens({"additional_special_tokens": markers})
    return tokenizer


def expected_mask(tokenizer: Any, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[bool]]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = [any(a < end and b > start for start, end in spans) for a, b in encoded["offset_mapping"]]
    return encoded["input_ids"], mask


@pytest.mark.parametrize("name", list(FAMILIES))
def test_assistant_masks_of_random_conversations(name: str, tokenizer: Any) -> None:
    family = FAMILIES[name]
    sample = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    options = DataSettings(assistant_only_loss=True, chat_template=family.template, max_length=None)
    processor = BatchProcessor(tokenizer, options, sample)
    assert processor.mask_method == "assistant turns by training template"

    @FAST
    @given(st.lists(conversations(), min_size=1, max_size=3))
    def check(batch: list[list[Message]]) -> None:
        if not family.system:
            batch = [[m for m in messages if m["role"] != "system"] for messages in batch]
        made = processor.process({"messages": batch}, range(len(batch))).tokens
        for i, messages in enumerate(batch):
            text, spans = oracle(family, messages)
            ids, mask = expected_mask(tokenizer, text, spans)
            row = slice(made.offsets[i], made.offsets[i + 1])
            assert made.ids[row].tolist() == ids
            assert made.labels is not None
            assert (made.labels[row] != -100).tolist() == mask, (text, spans)

    check()


@pytest.mark.parametrize("name", list(FAMILIES))
def test_prefixes_find_the_spans_of_the_training_template(name: str, tokenizer: Any) -> None:
    """The slower way, used where no training template can be made, must find the same spans."""
    from finetune.data.chat.spans import ChatRenderer
    from finetune.data.rows import Conversations

    family = FAMILIES[name]
    training = try_training_template(tokenizer, family.template)
    assert has_generation_markers(training)
    fast, slow = ChatRenderer(tokenizer, family.template, training), ChatRenderer(tokenizer, family.template, None)

    @FAST
    @given(conversations())
    def check(messages: list[Message]) -> None:
        if not family.system:
            messages = [m for m in messages if m["role"] != "system"]
        batch = Conversations([messages], [None], [None], [None])
        text, spans = oracle(family, messages)
        assert slow.render_with_spans(batch, [0]) == fast.render_with_spans(batch, [0])
        assert slow.render_with_spans(batch, [0]).texts == [text]
        assert slow.render_with_spans(batch, [0]).spans == [spans]

    check()


QWEN3 = """{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}
{%- set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and loop.index0 > ns.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{{- m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def test_a_template_that_writes_earlier_turns_otherwise(tokenizer: Any) -> None:
    """Qwen3's style: the last answer has a thinking block, which vanishes once another question follows."""
    options = DataSettings(assistant_only_loss=True, chat_template=QWEN3, max_length=None)
    sample = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    processor = BatchProcessor(tokenizer, options, sample)
    assert processor.mask_method == "assistant turns by prefixes"

    @FAST
    @given(conversations())
    def check(messages: list[Message]) -> None:
        made = processor.process({"messages": [messages]}, [0]).tokens
        text, spans = "", []
        for number, message in enumerate(messages):
            text += f"<|im_start|>{message['role']}\n"
            start = len(text)
            if number == len(messages) - 1:
                text += "<think>\n\n</think>\n\n"
            text += message["content"] + "<|im_end|>\n"
            if message["role"] == "assistant":
                spans.append((start, len(text)))
        ids, mask = expected_mask(tokenizer, text, spans)
        assert made.ids.tolist() == ids
        assert made.labels is not None
        assert (made.labels != -100).tolist() == mask

    check()


def metaspace_tokenizer() -> Any:
    """Returns a tokenizer in the style of Llama 2: a space becomes part of the next piece, unknown bytes are pieces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    special = ["<unk>", BOS, EOS, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    inner.train_from_iterator(["ab abc ba bab. c a b"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token=BOS, eos_token=EOS)


@pytest.mark.parametrize(
    "variant", ["plain", "adds BOS", "adds BOS and EOS", "trims offsets", "slow path", "metaspace"]
)
def test_completion_masks_of_random_rows(variant: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained is every token with a character of the completion; a border inside a token is counted as a mismatch."""
    from tokenizers.processors import ByteLevel, TemplateProcessing

    own = metaspace_tokenizer() if variant == "metaspace" else copy.deepcopy(tokenizer)
    oracle_tokenizer = own if variant == "metaspace" else tokenizer
    specials = [(BOS, own.bos_token_id), (EOS, own.eos_token_id)]
    if variant.startswith("adds"):
        single = f"{BOS} $A" + (f" {EOS}" if variant.endswith("EOS") else "")
        own.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=specials)
    elif variant == "trims offsets":
        own.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    elif variant == "slow path":
        monkeypatch.setattr("finetune.data.preparation.encoder._plain_backend", lambda tokenizer: None)
    processor = BatchProcessor(own, DataSettings(max_length=None), {"prompt": "a", "completion": "b"})
    has_bos = variant.startswith("adds")

    @FAST
    @example([("", " .")])
    @given(st.lists(st.tuples(st.text(alphabet="ab \n\té😀", max_size=40), words), min_size=1, max_size=4))
    def check(rows: list[tuple[str, str]]) -> None:
        batch = {"prompt": [p for p, _ in rows], "completion": [c for _, c in rows]}
        made = processor.process(batch, range(len(rows))).tokens
        for i, (prompt, completion) in enumerate(rows):
            text = prompt + completion + EOS
            ids, mask = expected_mask(oracle_tokenizer, text, [(len(prompt), len(text))])
            row = slice(made.offsets[i], made.offsets[i + 1])
            assert made.ids[row].tolist() == [own.bos_token_id] * has_bos + ids
            assert made.labels is not None
            assert (made.labels[row] != -100).tolist() == [False] * has_bos + mask
            alone = oracle_tokenizer(prompt, add_special_tokens=False)["input_ids"]
            mismatch = alone != ids[: len(alone)] or mask.index(True) != len(alone)
            assert bool(made.flags[i] & 16) == mismatch

    check()


ragged = st.lists(
    st.lists(st.tuples(st.integers(0, 9), st.booleans(), st.booleans()), max_size=9), min_size=1, max_size=6
)


@FAST
@given(ragged, st.integers(1, 6), st.sampled_from(["keep_start", "keep_end"]), st.booleans())
def test_labels_and_truncation_row_by_row(rows: Any, max_length: int, mode: Any, completion_only: bool) -> None:
    flat = [token for row in rows for token in row]
    batch = TokenBatch(
        np.array([t[0] for t in flat], np.int32),
        np.cumsum([0] + [len(row) for row in rows]),
        completion_mask=np.array([t[1] for t in flat], bool),
        assistant_mask=np.array([t[2] for t in flat], bool),
    )
    batch.labels = build_labels(batch, completion_only=completion_only)
    cut = truncate(batch, max_length, mode)
    assert cut.labels is not None
    counts = count_supervised(cut.labels, cut.offsets)
    for i, row in enumerate(rows):
        kept = row[:max_length] if mode == "keep_start" else row[max(0, len(row) - max_length) :]
        labels = [t if a and (c or not completion_only) else -100 for t, c, a in kept]
        part = slice(cut.offsets[i], cut.offsets[i + 1])
        assert cut.ids[part].tolist() == [t[0] for t in kept]
        assert cut.labels[part].tolist() == labels
        assert bool(cut.flags[i] & TRUNCATED) == (len(row) > max_length)
        assert counts[i] == sum(label != -100 for label in labels[1:])
