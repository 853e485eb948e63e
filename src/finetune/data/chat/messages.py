"""Helpers on single conversational rows, with the names and results of TRL's `data_utils`.

The pipeline does not go through them (it works on batches); they are what a TRL user imports.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from finetune.errors import DataFormatError, ticked

_CONVERSATION_KEYS = ("prompt", "chosen", "rejected", "completion", "messages")
_TEMPLATE_SHAPES = (
    {"messages"},
    {"prompt"},
    {"prompt", "completion"},
    {"prompt", "chosen", "rejected"},
    {"chosen", "rejected"},
    {"prompt", "completion", "label"},
)


def common_prefix_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Returns how many leading elements two texts, or two lists of token ids, have in common.

    >>> common_prefix_length([1, 2, 3], [1, 2, 4, 5])
    2
    """
    low, high = 0, min(len(first), len(second))
    if first[:high] == second[:high]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def is_message_list(value: Any, keys: Sequence[str] = ("role",)) -> bool:
    """Returns whether `value` is a non-empty list of dictionaries that have all `keys`."""
    if not isinstance(value, (list, tuple)) or not value:
        return False
    return isinstance(value[0], Mapping) and all(key in value[0] for key in keys)


def is_conversational(example: Mapping[str, Any]) -> bool:
    """Returns whether a row holds messages with a `role` under one of the keys that can hold a conversation.

    >>> is_conversational({"prompt": [{"role": "user", "content": "Which planet is red?"}]})
    True
    >>> is_conversational({"prompt": "The red planet is"})
    False
    """
    return any(is_message_list(example[key]) for key in _CONVERSATION_KEYS if key in example)


def is_conversational_from_value(example: Mapping[str, Any]) -> bool:
    """Returns whether a row holds a ShareGPT conversation: `conversations` with `from` and `value`."""
    return is_message_list(example.get("conversations"), ("from", "value"))


def maybe_convert_to_chatml(example: dict[str, Any]) -> dict[str, Any]:
    """Returns the row with `from`/`value` renamed to `role`/`content` and `conversations` to `messages`.

    The messages of the given row are left as they were. Roles keep their names, as in TRL; the training pipeline
    reads `from: human` as `user` and `from: gpt` as `assistant`.
    """
    renamed = dict(example)
    for key in (*_CONVERSATION_KEYS, "conversations"):
        if isinstance(renamed.get(key), list):
            renamed[key] = [_rename_keys(message) for message in renamed[key]]
    if "conversations" in renamed:
        renamed["messages"] = renamed.pop("conversations")
    return renamed


def _rename_keys(message: Any) -> Any:
    if not isinstance(message, Mapping):
        return message
    return {{"from": "role", "value": "content"}.get(key, key): value for key, value in message.items()}


def apply_chat_template(
    example: Mapping[str, Any],
    processing_class: Any,
    tools: list[dict[str, Any] | Callable[..., Any]] | None = None,
    **template_kwargs: Any,
) -> dict[str, Any]:
    """Returns the row with every conversation rendered to text: `messages` becomes `text`, the others keep their name.

    A completion is what follows the longest prefix that the rendered prompt (with the generation prompt) and the
    rendered prompt + completion have in common. Raises `DataFormatError` for a combination of keys that is no known
    kind of row. Agrees with TRL's function of this name.
    """
    keys = {key for key in (*_CONVERSATION_KEYS, "label") if key in example}
    if keys not in _TEMPLATE_SHAPES:
        shapes = "; ".join(ticked(sorted(shape)) for shape in _TEMPLATE_SHAPES)
        raise DataFormatError(f"A row with the columns {sorted(keys)} has no chat form. Allowed: {shapes}.")
    options = {"tools": tools or None, **(example.get("chat_template_kwargs") or {}), **template_kwargs}

    def render(messages: Any, **extra: Any) -> str:
        return processing_class.apply_chat_template(messages, tokenize=False, **extra, **options)

    rendered: dict[str, Any] = {}
    if "messages" in example:
        rendered["text"] = render(example["messages"])
    answers = [key for key in ("chosen", "rejected", "completion") if key in example]
    if "prompt" not in example:
        rendered.update({key: render(example[key]) for key in answers})
    else:
        prompt = render(example["prompt"], **_prompt_ending(example["prompt"]))
        full = {key: render(list(example["prompt"]) + list(example[key])) for key in answers}
        # Some templates open the answer (for instance with a thinking block) only in the generation prompt.
        for text in full.values():
            prompt = prompt[: common_prefix_length(prompt, text)]
        rendered["prompt"] = prompt
        rendered.update({key: text[len(prompt) :] for key, text in full.items()})
    if "label" in example:
        rendered["label"] = example["label"]
    return rendered


def _prompt_ending(prompt: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    role = prompt[-1]["role"]
    if role in ("user", "tool"):
        return {"add_generation_prompt": True}
    if role == "assistant":
        return {"continue_final_message": True}
    raise DataFormatError(f"A prompt must end with a `user`, `tool` or `assistant` message, not with `{role}`.")


def maybe_apply_chat_template(
    example: Mapping[str, Any], processing_class: Any, tools: list[Any] | None = None, **template_kwargs: Any
) -> Mapping[str, Any]:
    """Returns `apply_chat_template(...)` of a conversational row and any other row unchanged."""
    if not is_conversational(example):
        return example
    return apply_chat_template(example, processing_class, tools, **template_kwargs)


def extract_prompt(example: Mapping[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
    """Returns `prompt`, `chosen` and `rejected`, the prompt being what both answers begin with.

    A single space before the point where texts part goes to the answers, because tokenizers join it to the next word.

    >>> extract_prompt({"chosen": "2+2= 4", "rejected": "2+2= 5"})
    {'prompt': '2+2=', 'chosen': ' 4', 'rejected': ' 5'}
    """
    chosen, rejected = example["chosen"], example["rejected"]
    shortest = min(len(chosen), len(rejected))
    split = next((i for i in range(shortest) if chosen[i] != rejected[i]), max(shortest - 1, 0))
    if split > 0 and chosen[split] != rejected[split] and chosen[split - 1] == " ":
        split -= 1
    return {"prompt": chosen[:split], "chosen": chosen[split:], "rejected": rejected[split:]}


def maybe_extract_prompt(example: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the row with its implicit prompt made explicit, or unchanged when there is nothing to extract."""
    if "chosen" not in example or "rejected" not in example:
        return example
    if "prompt" in example:
        prompt_is_chat = is_conversational({"prompt": example["prompt"]})
        if prompt_is_chat == is_conversational({"chosen": example["chosen"]}):
            return example
    return extract_prompt({"chosen": example["chosen"], "rejected": example["rejected"]})


def parse_json_column(value: Any, column: str, where: str) -> Any:
    """Returns `value`, decoded when it is JSON text; raises `DataFormatError` when the text is not JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise DataFormatError(f"{where}: `{column}` is text but not valid JSON ({error}).") from None
