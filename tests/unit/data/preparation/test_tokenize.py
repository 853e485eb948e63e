import os
from typing import Any

import numpy as np
import pytest

from finetune.data.preparation.batches import BatchProcessor
from finetune.data.preparation.encoder import Encoder, flatten
from finetune.data.preparation.pretokenized import read_tokenized
from finetune.data.preparation.settings import DataSettings
from finetune.data.preparation.tokenize import (
    BOUNDARY_MISMATCH,
    DOUBLED_BOS,
    TEMPLATE_DRIFT,
    tokenize_pairs,
    tokenize_plain,
    tokenize_spans,
)
from finetune.errors import DataFormatError


def rows_of(batch: Any, values: Any) -> list[list[int]]:
    return [values[a:b].tolist() for a, b in zip(batch.offsets[:-1], batch.offsets[1:], strict=True)]


def test_flatten() -> None:
    values, offsets = flatten([[1, 2], [], [3]])
    assert (values.tolist(), offsets.tolist(), values.dtype) == ([1, 2, 3], [0, 2, 2, 3], np.int32)


def test_the_batched_ids_are_those_of_the_tokenizer(chat_tokenizer: Any) -> None:
    texts = ["the cat sat", "", "é😀 \n\n x<|im_end|>", "a" * 3000]
    for special in (True, False):
        expected = [chat_tokenizer(text, add_special_tokens=special)["input_ids"] for text in texts]
        for positions in (True, False):
            made = Encoder(chat_tokenizer).encode(texts, special=special, positions=positions)
            assert [encoded.ids for encoded in made] == expected


def test_padding_and_truncation_left_on_the_tokenizer_do_not_act(chat_tokenizer: Any) -> None:
    chat_tokenizer(["the cat", "a"], padding=True, truncation=True, max_length=2)
    made = Encoder(chat_tokenizer).encode(["the cat sat on a mat", "a"], special=False)
    assert [len(encoded.ids) for encoded in made] == [len(chat_tokenizer.tokenize("the cat sat on a mat")), 1]


def test_a_tokenizer_with_its_own_python_code_is_called_through_it(chat_tokenizer: Any) -> None:
    class Shouting(type(chat_tokenizer)):
        def __call__(self, text: Any, *args: Any, **kwargs: Any) -> Any:
            upper = [t.upper() for t in text] if isinstance(text, list) else text.upper()
            return super().__call__(upper, *args, **kwargs)

    expected = chat_tokenizer("CAT")["input_ids"]
    chat_tokenizer.__class__ = Shouting
    assert Encoder(chat_tokenizer).encode(["cat"], special=False)[0].ids == expected


class SlowTokenizer:
    """Splits at spaces, which stay with the word after them; no offsets, as the pure-Python tokenizers have none."""

    is_fast = False
    bos_token_id, eos_token_id, bos_token, eos_token = 1, 2, "<s>", "</s>"

    def __call__(self, texts: list[str], **options: Any) -> Any:
        import re

        from transformers import BatchEncoding

        return BatchEncoding({"input_ids": [[len(w) for w in re.findall(r" ?[^ ]+| ", t)] for t in texts]})


def test_slow_tokenizers_find_borders_by_prefixes() -> None:
    encoder = Encoder(SlowTokenizer())
    made = tokenize_pairs(encoder, ["one two", "one "], ["one two three", "one two"], special=True)
    assert made.completion_mask is not None
    assert rows_of(made, made.completion_mask) == [[False, False, True], [False, True]]
    assert (made.flags & BOUNDARY_MISMATCH).astype(bool).tolist() == [False, True]
    spans = tokenize_spans(encoder, ["one two three"], [[(3, 7)]])
    assert spans.assistant_mask is not None
    assert spans.assistant_mask.tolist() == [False, True, False]


def test_one_of_two_bos_tokens_is_dropped_and_counted(chat_tokenizer: Any) -> None:
    bos = chat_tokenizer.bos_token
    made = tokenize_plain(Encoder(chat_tokenizer), [f"{bos}{bos}the cat", f"{bos}the cat", "the"], special=False)
    ids = rows_of(made, made.ids)
    assert ids[0] == ids[1]
    assert (made.flags & DOUBLED_BOS).astype(bool).tolist() == [True, False, False]
    chat_tokenizer.eos_token = bos
    kept = tokenize_plain(Encoder(chat_tokenizer), [f"{bos}{bos}"], special=False)
    assert len(kept.ids) == 2


def test_masks_follow_when_a_bos_is_dropped(chat_tokenizer: Any) -> None:
    text = f"{chat_tokenizer.bos_token}{chat_tokenizer.bos_token}the cat"
    made = tokenize_pairs(Encoder(chat_tokenizer), [text[:-4]], [text], special=False)
    assert made.completion_mask is not None
    assert made.completion_mask.tolist() == [False, False, True]


def test_a_template_that_writes_prompts_differently_alone_is_flagged(chat_tokenizer: Any) -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>' }}{% endif %}"
    )
    prompt, answer = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "the cat"}]
    row = {"prompt": prompt, "completion": answer}
    processor = BatchProcessor(chat_tokenizer, DataSettings(chat_template=template), row)
    made = processor.process({key: [value] for key, value in row.items()}, [0]).tokens
    assert made.flags[0] & TEMPLATE_DRIFT
    assert made.labels is not None
    assert chat_tokenizer.decode(made.labels[made.labels >= 0]) == "the cat<|im_end|>\n"


@pytest.mark.parametrize("answer", ["<html>hi</html>", "<think", "the cat", "<think>\nhm</think>yes"])
def test_an_opening_of_the_prompt_alone_takes_nothing_from_the_answer(answer: str, chat_tokenizer: Any) -> None:
    """DeepSeek's style: the generation prompt opens a thinking block that the template leaves out of the answer."""
    chat_tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]})
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.content.split('</think>')[-1] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|><think>\n' }}{% endif %}"
    )
    row = {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": answer}]}
    for assistant_only in (False, True):
        options = DataSettings(chat_template=template, assistant_only_loss=assistant_only)
        made = BatchProcessor(chat_tokenizer, options, row).process({key: [row[key]] for key in row}, [0]).tokens
        assert made.labels is not None
        assert chat_tokenizer.decode(made.labels[made.labels >= 0]) == answer.split("</think>")[-1] + "<|im_end|>"
        assert made.flags[0] & TEMPLATE_DRIFT


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"input_ids": None}, "`input_ids` is None"),
        ({"input_ids": [1, None]}, "not integers"),
        ({"input_ids": [1.5]}, "not integers"),
        ({"input_ids": [[1]]}, "not integers"),
        ({"input_ids": [10_000]}, "`input_ids` holds 10000"),
        ({"input_ids": [-1]}, "`input_ids` holds -1"),
        ({"input_ids": [1, 2], "labels": [1]}, "`labels` has 1 values for 2 `input_ids`"),
        ({"input_ids": [1], "labels": [-1]}, "`labels` holds -1"),
        ({"input_ids": [1], "completion_mask": [0, 1]}, "`completion_mask` has 2 values"),
    ],
)
def test_bad_tokenized_rows_are_errors_with_their_row(row: dict[str, Any], said: str, chat_tokenizer: Any) -> None:
    good = {key: [3] for key in row}
    with pytest.raises(DataFormatError) as error:
        read_tokenized({key: [good[key], value] for key, value in row.items()}, [5, 6], chat_tokenizer)
    assert "Row 6" in str(error.value)
    assert said in str(error.value)


def test_tokenizers_that_add_eos_do_not_get_a_second(chat_tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    eos = chat_tokenizer.eos_token
    chat_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {eos}", special_tokens=[(eos, chat_tokenizer.eos_token_id)]
    )
    for row in ({"text": "the cat"}, {"prompt": "the", "completion": " cat"}):
        made = BatchProcessor(chat_tokenizer, DataSettings(), row).process({k: [v] for k, v in row.items()}, [0]).tokens
        assert made.ids.tolist().count(chat_tokenizer.eos_token_id) == 1
        assert made.labels is not None
        assert made.labels[-1] == chat_tokenizer.eos_token_id


def test_eos_can_be_another_token(chat_tokenizer: Any) -> None:
    chat_tokenizer.eos_token = "</s>"
    processor = BatchProcessor(chat_tokenizer, DataSettings(), {"text": "a"})
    made = processor.process({"text": ["the cat"]}, [0]).tokens
    assert made.ids[-1] == chat_tokenizer.convert_tokens_to_ids("</s>")
    assert made.flags[0] & 4
    chat_tokenizer.eos_token = None
    with pytest.raises(DataFormatError, match="`eos_token`"):
        BatchProcessor(chat_tokenizer, DataSettings(), {"text": "a"})


def test_work_in_turns_gives_the_same_rows_and_never_overlaps_itself(chat_tokenizer: Any) -> None:
    encoder = Encoder(chat_tokenizer)
    texts = [f"the cat {i} sat on a mat " * (1 + i % 7) for i in range(400)]
    inside: list[int] = []
    together: list[int] = []

    def work(part: slice) -> list[list[int]]:
        inside.append(1)
        together.append(len(inside))
        rows = [text.upper() for text in texts[part]]
        inside.pop()
        made = [encoded.ids for encoded in encoder.encode(rows, special=False)]
        inside.append(1)
        together.append(len(inside))
        inside.pop()
        return made

    parts = [slice(start, start + 20) for start in range(0, 400, 20)]
    made = [ids for part in encoder.in_turns(work, parts) for ids in part]
    assert made == [chat_tokenizer(text.upper(), add_special_tokens=False)["input_ids"] for text in texts]
    assert set(together) == {1}


def test_the_first_of_several_errors_is_raised_and_the_encoder_works_on(chat_tokenizer: Any) -> None:
    encoder = Encoder(chat_tokenizer)

    def fail(part: int) -> None:
        encoder.encode(["the cat"] * 50, special=False)
        if part in (2, 3, 7):
            raise ValueError(str(part))

    with pytest.raises(ValueError, match="2"):
        encoder.in_turns(fail, range(9))
    assert encoder.in_turns(lambda part: part, [1, 2]) == [1, 2]


def test_encoders_travel_to_workers(chat_tokenizer: Any) -> None:
    import pickle

    again = pickle.loads(pickle.dumps(Encoder(chat_tokenizer)))
    assert again.in_turns(lambda text: again.encode([text], special=False)[0].ids, ["a", "b"]) == [
        chat_tokenizer(text)["input_ids"] for text in "ab"
    ]


@pytest.mark.parametrize(("cores", "given"), [(2, None), (2, "true"), (8, None)])
def test_two_cores_are_shared_with_the_tokenizer(
    cores: int, given: str | None, chat_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    if given is not None:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", given)
    seen = Encoder(chat_tokenizer).in_turns(lambda _: os.environ.get("TOKENIZERS_PARALLELISM"), [0, 1])
    assert seen == (["false"] * 2 if (cores, given) == (2, None) else [given] * 2)
    assert os.environ.get("TOKENIZERS_PARALLELISM") == given
