"""Check assistant spans against the messages they stand for: a mask that cannot be proved right is not used."""

from collections.abc import Sequence
from typing import Any

Span = tuple[int, int]


def verify_spans(text: str, messages: Sequence[dict[str, Any]], spans: Sequence[Span]) -> str:
    """Returns what is wrong with the spans of a conversation, or an empty string.

    Right means: one span per assistant message, in order and apart, each holding the whole of its message's answer;
    every other message that the template writes at all stands between the spans.
    """
    assistant_turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    if len(spans) != len(assistant_turns):
        return f"{len(assistant_turns)} assistant messages but {len(spans)} spans"
    previous_end = 0
    span_of_turn = dict(zip(assistant_turns, spans, strict=True))
    gap_start = 0
    for turn, message in enumerate(messages):
        core = answer_core(message)
        if turn in span_of_turn:
            start, end = span_of_turn[turn]
            if not previous_end <= start < end:
                return f"the span of message {turn} is empty or overlaps the one before"
            if core and core not in text[start:end]:
                return f"message {turn} is not wholly inside its span"
            previous_end = gap_start = end
        elif core:
            following = [span for later, span in span_of_turn.items() if later > turn]
            gap_end = following[0][0] if following else len(text)
            if core not in text[gap_start:gap_end] and core in text:
                return f"message {turn} ({message['role']}) is inside a trained span"
    return ""


def answer_core(message: dict[str, Any]) -> str:
    """Returns the part of a message's text that every template writes: no reasoning, no outer white space."""
    content = message.get("content")
    if isinstance(content, list):
        content = next((block.get("text") for block in content if isinstance(block.get("text"), str)), "")
    if not isinstance(content, str):
        return ""
    # Several templates drop the reasoning of finished turns.
    return content.split("</think>")[-1].strip()
