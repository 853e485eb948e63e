"""Find the assistant's turns in a rendered conversation by rendering variants of it; what cannot be proved is refused.

*Prefixes.* If the text begins with the messages before each turn (with the generation prompt) and with the messages up
to it, those lengths are the bounds.

*Probes.* Many templates write earlier turns differently once others follow: Qwen3 drops their reasoning, gpt-oss closes
them by another marker. Then each message is given a character that is nowhere in the text, and what changes in the text
is the region of that message. A turn begins where the text after the region of the message before it leaves the
generation prompt, and ends with the marker that follows its own region.

Worked example, an answer "<think>hm</think>Yo" of which the template writes "Yo" once "Ok" follows, and `*` as mark:

    <u>Hi<e><a>Yo<e><u>Ok<e>      the text
    <u>*Hi*<e><a>Yo<e><u>Ok<e>    probe of message 0: its region is [3, 5)
    <u>Hi<e><a>*<e><u>Ok<e>       probe of message 1: its region is [11, 13)
    <u>Hi<e><a>                   before the turn: `<e><a>` follows "Hi", so the turn begins at 5 + 6 = 11
    <u>Hi<e><a><think>hm</think>Yo<e>     up to the turn: `<e>` follows "Yo", so the turn ends at 13 + 3 = 16
"""

import re
from collections.abc import Callable, Sequence
from itertools import accumulate, islice, pairwise
from typing import Any

from finetune.data.chat.message_probes import Message, marked, probes
from finetune.data.chat.messages import common_prefix_length

Span = tuple[int, int]
Messages = Sequence[Message]
Render = Callable[..., str]


class TurnsNotFoundError(Exception):
    """Says why the assistant's turns cannot be found with certainty."""


def find_spans(text: str, messages: Messages, render: Render, token_ends: Callable[[str], list[int]]) -> list[Span]:
    """Returns the span of each assistant message in `text`, which is what the template makes of `messages`.

    `render(messages, add_generation_prompt=False)` renders other messages, and `token_ends(text)` are the character
    positions where tokens end. Raises `TurnsNotFoundError`, or whatever the template raises.
    """
    known: dict[tuple[int, bool], str] = {}

    def render_first(count: int, add_generation_prompt: bool = False) -> str:
        key = count, add_generation_prompt
        if key not in known:
            known[key] = render(messages[:count], add_generation_prompt=add_generation_prompt)
        return known[key]

    def probed() -> _Probes:
        return _Probes(text, messages, render, render_first, token_ends)

    spans = _prefix_spans(text, messages, render_first)
    if spans is None or verify_spans(text, messages, spans):
        return probed().spans()
    if _may_quote_others(text, messages, spans):
        probed().require_apart(spans)
    return spans


def _prefix_spans(text: str, messages: Messages, render_first: Callable[..., str]) -> list[Span] | None:
    spans: list[Span] = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render_first(turn, True)
        if not text.startswith(before):
            return None
        upto = text if turn == len(messages) - 1 else render_first(turn + 1)
        if not text.startswith(upto):
            return None
        spans.append((len(before), len(upto)))
    return spans


def verify_spans(text: str, messages: Messages, spans: Sequence[Span]) -> str:
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


def _may_quote_others(text: str, messages: Messages, spans: Sequence[Span]) -> bool:
    """Returns whether a span has words of another message that its own does not say: they may stand there twice."""
    others = [core for message in messages if message["role"] != "assistant" and (core := answer_core(message))]
    answers = [message for message in messages if message["role"] == "assistant"]
    for message, (start, end) in zip(answers, spans, strict=True):
        rest = text[start:end].replace(answer_core(message), "", 1)
        if any(core in rest and core not in str(message) for core in others):
            return True
    return False


def answer_core(message: Message) -> str:
    """Returns the part of a message's text that every template writes: no reasoning, no outer white space."""
    content = message.get("content")
    if isinstance(content, list):
        content = next((block.get("text") for block in content if isinstance(block.get("text"), str)), "")
    if not isinstance(content, str):
        return ""
    # Several templates drop the reasoning of finished turns.
    return content.split("</think>")[-1].strip()


class _Probes:
    """One conversation, and where each of its messages lies in its text."""

    def __init__(
        self,
        text: str,
        messages: Messages,
        render: Render,
        render_first: Callable[..., str],
        token_ends: Callable[[str], list[int]],
    ) -> None:
        self.text, self.messages, self.token_ends = text, list(messages), token_ends
        self.render, self.render_first = render, render_first
        # Private characters: no letter that a template could look for, no white space that it could strip.
        marks = (mark for mark in map(chr, range(0xE000, 0xF900)) if mark not in text)
        self.mark = next(marks)
        self.regions = self._regions(list(islice(marks, len(self.messages))))

    def _regions(self, marks: list[str]) -> list[Span | None]:
        """Returns the region of each message: by one rendering where that is enough, else by one for each."""
        regions: list[Span | None] = [None] * len(self.messages)
        around = [marked(message, mark) for message, mark in zip(self.messages, marks, strict=False)]
        probe = self.render(around) if len(marks) == len(self.messages) else ""
        pieces = re.split("([" + "".join(marks) + "])", probe)
        if "".join(pieces[::2]) == self.text:
            ends: dict[str, list[int]] = {mark: [] for mark in marks}
            for mark, end in zip(pieces[1::2], accumulate(map(len, pieces[::2])), strict=False):
                ends[mark].append(end)
            regions = [(found[0], found[1]) if len(found) == 2 else None for found in ends.values()]
        return [region or self._region(self.messages, turn, self.text) for turn, region in enumerate(regions)]

    def spans(self) -> list[Span]:
        """Returns the span of each assistant message; raises `TurnsNotFoundError`."""
        turns = [turn for turn, message in enumerate(self.messages) if message["role"] == "assistant"]
        spans = [self._span(turn) for turn in turns]
        if any(first[1] > second[0] for first, second in pairwise(spans)):
            raise TurnsNotFoundError("the assistant's turns overlap or are not in order")
        self.require_apart(spans)
        return spans

    def require_apart(self, spans: Sequence[Span]) -> None:
        """Raises `TurnsNotFoundError` where a message of another role reaches into a span."""
        for turn, (message, region) in enumerate(zip(self.messages, self.regions, strict=True)):
            if message["role"] == "assistant" or region is None:
                continue
            if any(_overlap(region, span) for span in spans):
                raise TurnsNotFoundError(f"message {turn} ({message['role']}) is inside a trained span")

    def _span(self, turn: int) -> Span:
        region = self.regions[turn]
        if region is None:
            raise TurnsNotFoundError(f"the template does not write message {turn}")
        start, end = self._start(turn, region[0]), self._end(turn, region[1])
        if not start <= region[0] <= region[1] <= end:
            raise TurnsNotFoundError(f"message {turn} is not wholly inside its span")
        if start >= end:
            raise TurnsNotFoundError(f"the span of message {turn} is empty")
        return start, end

    def _start(self, turn: int, limit: int) -> int:
        """Returns where the text leaves the generation prompt of a turn, at the latest at `limit`."""
        earlier, before = self.messages[:turn], self.render_first(turn, True)
        here = there = 0
        located = [(i, region) for i, region in enumerate(self.regions[:turn]) if region is not None]
        if located:
            previous, (_, here) = located[-1]
            there = here
            if not before.startswith(self.text[:here]):
                alone = self._region(earlier, previous, before, add_generation_prompt=True)
                there = -1 if alone is None else alone[1]
            if here > limit or there < 0:
                raise TurnsNotFoundError(f"message {previous} is not written before message {turn}")
        shared = common_prefix_length(before[there:], self.text[here:limit])
        if there + shared == len(before):
            return here + shared
        # The generation prompt may open what the template leaves out of finished turns (a thinking block), but the
        # earlier messages must be there unchanged.
        if shared < common_prefix_length(self.render_first(turn), before) - there:
            raise TurnsNotFoundError(f"the text before message {turn} changes once the message is there")
        if here + shared == limit:
            return limit
        # An answer `<b>` shares `<` with a block that the prompt opens, one of other text does not.
        other = self.render([*earlier, self._saying("assistant"), *self.messages[turn + 1 :]])
        shared = min(shared, common_prefix_length(before[there:], other[here:]))
        ends = self._token_end(self.text, here + shared) - here, self._token_end(before, there + shared) - there
        return here + max(0, min(ends))

    def _end(self, turn: int, start: int) -> int:
        """Returns the end of the marker that closes a turn whose own text ends at `start`."""
        text, upto = self.text, self.messages[: turn + 1]
        if len(upto) == len(self.messages):
            return len(text)
        others = [region[0] for i, region in enumerate(self.regions) if i != turn and region is not None]
        after = text[start : min((other for other in others if other >= start), default=len(text))]
        alone = self.render_first(turn + 1)
        closing = alone[start:]
        if not (alone.startswith(text[:start]) and after.startswith(closing)):
            # Where nothing follows, the turn may hold more than its own text: reasoning, before an empty answer too.
            region = self._region(upto, turn, alone)
            if region is None:
                raise TurnsNotFoundError(f"the template writes message {turn} only if others follow")
            closing = alone[region[1] :]
        if after.startswith(closing):
            return start + len(closing)
        shared = max(0, self._token_end(text, start + common_prefix_length(closing, after)) - start)
        asked = self._after_a_question(upto)
        # The last answer may be closed by a marker of its own, and the others like the user's turns.
        if asked and after[shared:].startswith(asked):
            return start + shared + len(asked)
        # Or what is missing ends every conversation, whoever has the last word.
        if shared == 0 or not asked.endswith(closing[shared:].strip()):
            raise TurnsNotFoundError(f"what closes message {turn} changes once others follow")
        return start + shared

    def _after_a_question(self, messages: Messages) -> str:
        """Returns what the template writes behind a last user message."""
        _, found, after = self.render([*messages, self._saying("user")]).rpartition(self.mark)
        return after if found else ""

    def _saying(self, role: str) -> Message:
        """Returns a message of a role that says the mark and nothing else."""
        in_blocks = any(isinstance(message.get("content"), list) for message in self.messages)
        return {"role": role, "content": [{"type": "text", "text": self.mark}] if in_blocks else self.mark}

    def _token_end(self, text: str, position: int) -> int:
        """Returns the end of the last token that lies wholly before a position: `<|end|>` and `<|user|>` share `<|`."""
        first = max(0, position - 200)
        ends = self.token_ends(text[first : position + 32])
        return max((first + end for end in ends if first + end <= position), default=0)

    def _region(self, messages: Messages, turn: int, text: str, **options: Any) -> Span | None:
        """Returns where `text`, rendered from `messages`, has what one of them says; None if it is not written."""
        for changed in probes(messages[turn], self.mark):
            probe = self.render([*messages[:turn], changed, *messages[turn + 1 :]], **options)
            if probe != text:
                start = common_prefix_length(text, probe)
                return start, len(text) - common_prefix_length(text[start:][::-1], probe[start:][::-1])
        return None


def _overlap(region: Span, span: Span) -> bool:
    """Returns whether a region, which may be empty, reaches into a span."""
    return max(region[0], span[0]) < min(region[1], span[1]) or span[0] < region[0] < span[1]
