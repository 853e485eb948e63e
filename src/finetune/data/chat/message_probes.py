"""Variants of a message that show, once rendered, where a chat template writes what the message says."""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

Message = dict[str, Any]

_REASONING = ("reasoning_content", "reasoning", "thinking")
_OPENING = re.compile(r"\s*(?:<[^<>]*>\s*)?")
_CLOSING_TAG = re.compile(r"</[^<>]*>")


def probes(message: Message, mark: str) -> list[Message]:
    """Returns variants of a message to be tried in turn: in each, what the message says begins and ends with `mark`."""
    content = message.get("content")
    if message["role"] != "assistant":
        return [] if content is None else [{**message, "content": _each_text(content, lambda text: _wrap(text, mark))}]
    changed: Message = {key: mark for key in _REASONING if message.get(key)}
    if content:
        changed["content"] = _each_text(
            content, lambda text: text.replace(text.strip(), mark) if text.strip() else mark
        )
    if message.get("tool_calls"):
        changed["tool_calls"] = [_call_with(call, mark) for call in message["tool_calls"]]
    # Content that is not there comes last: beside tool calls, some templates refuse it.
    return [{**message, **changed}] * bool(changed) + [{**message, "content": mark}] * (not content)


def _each_text(content: Any, change: Callable[[str], str]) -> Any:
    if isinstance(content, str):
        return change(content)
    return [
        {**block, "text": change(block["text"])} if isinstance(block.get("text"), str) else block for block in content
    ]


def marked(message: Message, mark: str) -> Message:
    """Returns the message with a mark before and after what it says, reasoning aside; as it is where it has no text."""
    content = message.get("content")
    if not isinstance(content, str) or message.get("tool_calls") or any(message.get(key) for key in _REASONING):
        return message
    if message["role"] != "assistant":
        return {**message, "content": _wrap(content, mark)}
    answer = content.rpartition("</think>")[2]
    inner = answer.strip()
    if not inner:
        return message
    start = len(content) - len(answer.lstrip())
    return {**message, "content": f"{content[:start]}{mark}{inner}{mark}{content[start + len(inner) :]}"}


def _wrap(text: str, mark: str) -> str:
    """Returns the text between marks. Outer white space and tags stay outside: templates trim, and look for tags."""
    opening = _OPENING.match(text)
    start = opening.end() if opening else 0
    rest = text[start:].rstrip()
    closing = rest.rfind("</")
    end = start + (closing if closing >= 0 and _CLOSING_TAG.fullmatch(rest, closing) else len(rest))
    return f"{text[:start]}{mark}{text[start:end]}{mark}{text[end:]}"


def _call_with(call: Any, mark: str) -> Any:
    """Returns a tool call with other arguments of the same form."""
    if not isinstance(call, Mapping):
        return call
    if "function" in call:
        return {**call, "function": _call_with(call["function"], mark)}
    changed = {mark: mark}
    return {
        **call,
        "arguments": json.dumps(changed, ensure_ascii=False) if isinstance(call.get("arguments"), str) else changed,
    }
