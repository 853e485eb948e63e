"""What a run does with its rows, decided from the arguments and the first row."""

from collections.abc import Callable
from typing import Any

import pytest
from datasets import Dataset

from finetune.data.preparation.batches import BatchProcessor
from finetune.data.preparation.settings import DataSettings
from finetune.errors import ArgumentError
from finetune.sft.config import SFTConfig
from finetune.sft.plan import DataPlan

USER, ASSISTANT = {"role": "user", "content": "the"}, {"role": "assistant", "content": "cat"}
MASKED = {"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1]}


def pair(row: dict[str, Any]) -> dict[str, str]:
    return {"prompt": row["q"], "completion": row["a"]}


def text(row: dict[str, Any]) -> str:
    return row["prompt"] + row["completion"]


def plan(row: dict[str, Any], func: Callable[..., Any] | None = None, **options: Any) -> DataPlan:
    return DataPlan.resolve(SFTConfig("out", use_cpu=True, **options), row, func)


@pytest.mark.parametrize(
    ("row", "func", "expected"),
    [
        ({"text": "the cat"}, None, False),
        ({"text": "the cat", "completion_mask": [1]}, None, False),
        ({"prompt": "the", "completion": " cat"}, None, True),
        ({"prompt": "the", "completion": " cat"}, text, False),
        ({"q": "the", "a": " cat"}, pair, True),
        ({"prompt": [USER], "completion": [ASSISTANT]}, None, True),
        ({"messages": [USER, ASSISTANT]}, None, False),
        (MASKED, None, True),
        (MASKED, pair, True),
        ({"input_ids": [5, 6], "labels": [5, 6]}, None, False),
    ],
)
@pytest.mark.parametrize("wanted", [None, False])
def test_the_plan_says_of_prompts_what_the_preparation_does(
    row: dict[str, Any], func: Any, expected: bool, wanted: bool | None, chat_tokenizer: Any
) -> None:
    settings = DataSettings(formatting_func=func, completion_only_loss=wanted)
    made = plan(row, func, completion_only_loss=wanted).completion_only_loss
    assert made is BatchProcessor(chat_tokenizer, settings, row).completion_only
    assert made is (expected if wanted is None else False)


def test_a_formatting_function_may_return_a_prompt_and_its_completion() -> None:
    assert plan({"q": "the", "a": " cat"}, pair, completion_only_loss=True).completion_only_loss
    with pytest.raises(ArgumentError, match=r"`completion_only_loss=True` needs .*`formatting_func`, those it returns"):
        plan({"prompt": "the", "completion": " cat"}, text, completion_only_loss=True)


def test_tokens_with_a_mask_can_do_what_it_says() -> None:
    assert plan({"input_ids": [5], "assistant_masks": [1]}, assistant_only_loss=True).assistant_only_loss
    assert plan(MASKED, completion_only_loss=True).completion_only_loss
    with pytest.raises(ArgumentError, match="`assistant_masks`"):
        plan(MASKED, assistant_only_loss=True)


def test_images_are_refused_where_rows_are_prepared_here() -> None:
    row = {"messages": [USER, ASSISTANT], "images": [b""]}
    with pytest.raises(ArgumentError, match="Remove the image columns"):
        plan(row)
    assert plan(row, dataset_kwargs={"skip_prepare_dataset": True}).skip_prepare


def test_the_trainer_reports_a_completion_mask(tiny_llama: Any, chat_tokenizer: Any, tmp_path: Any) -> None:
    import finetune

    trainer = finetune.SFTTrainer(
        tiny_llama(vocab_size=512),
        SFTConfig(str(tmp_path), use_cpu=True, report_to="none"),
        train_dataset=Dataset.from_list([MASKED]),
        processing_class=chat_tokenizer,
    )
    assert trainer.completion_only_loss
    assert trainer.train_dataset[0]["labels"] == [-100, 6, 7]
