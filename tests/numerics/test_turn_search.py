"""Assistant turns found by prefixes and probes: random templates and conversations against independent oracles.

The letters say who wrote what: answers are made of `abc`, calls of `AB`, everybody else's words of `xyz`. So a span
that holds a letter of another message, or an answer outside all spans, shows in the text itself.
"""

import re
from typing import Any

from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from finetune.data.chat.span_search import TurnsNotFoundError, find_spans

FAST = settings(max_examples=100, deadline=None)
Message = dict[str, Any]

answers = st.sampled_from(
    ["", "a", "ab", "<a>", " b \n", "<", "[", "a[/b", "<think>c</think>a", "</b>", '"a"', "c</think>"]
)
words = st.sampled_from(["x", "xy", " z\n", "<x>", '{"y": 1}', "<think>", "</think>", "[x]", "<tool>y</tool>", "z<"])


@st.composite
def conversations(draw: Any) -> list[Message]:
    messages: list[Message] = [{"role": "system", "content": draw(words)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(words)})
        for _ in range(draw(st.integers(0, 2))):
            arguments = draw(st.sampled_from([{}, {"A": "B"}, {"A": 1, "B": "A"}, '{"A": "B"}']))
            call = {"type": "function", "function": {"name": "N", "arguments": arguments}}
            messages.append({"role": "assistant", "tool_calls": [call] * draw(st.integers(1, 2))})
            if draw(st.booleans()):
                messages[-1]["content"] = draw(answers)
            messages.append({"role": "tool", "content": draw(words)})
        messages.append({"role": "assistant", "content": draw(answers)})
    return messages


HEADERS = ("[{{ m.role }}]", "<|{{ m.role }}|>", "[{{ 'U' if m.role == 'tool' else m.role }}]<")
CLOSINGS = (
    "<|end|>",
    "{{ '<|end|>' if m.role != 'assistant' else '<|call|>' if m.tool_calls else '<|stop|>' }}",
    "{{ '<|stop|>' if m.role == 'assistant' and loop.last else '<|end|>' }}",
)
OPENED = ("", "<think>\n", "<|think|>")
CALLS = (
    "",
    "{{ m.tool_calls | tojson if m.tool_calls }}",
    "{% for c in m.tool_calls or [] %}<|c|>{{ c.function.arguments }}{% endfor %}",
)
CONTENT = (
    "{{ m.content }}",
    "{{ m.content | tojson if m.role == 'tool' else m.content }}",
    "{{ m.content if not m.tool_calls }}",
    "{{ (m.content or '') | trim }}",
    "{{ (m.content or '').split('</think>')[-1] if m.role == 'assistant' and loop.index0 < ns.asked else m.content }}",
    "{{ '<think></think>' if m.role == 'assistant' and loop.index0 > ns.asked }}{{ m.content }}",
    "{{ m.content if m.role != 'tool' }}",
)


def template_of(header: str, content: str, calls: str, closing: str, opened: str, generation: bool = False) -> str:
    start, end = ("{% if m.role == 'assistant' %}\x00{% endif %}",) * 2 if generation else ("", "")
    prompt = header.replace("m.role", "'assistant'")
    return (
        "{% set ns = namespace(asked=0) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}" + header + start + content + calls + closing + end + "{% endfor %}"
        "{% if add_generation_prompt %}" + prompt + opened + "{% endif %}"
    )


def render_with(template: str) -> Any:
    compiled = ImmutableSandboxedEnvironment().from_string(template)

    def render(messages: list[Message], add_generation_prompt: bool = False) -> str:
        return compiled.render(messages=messages, add_generation_prompt=add_generation_prompt)

    return render


def token_ends(text: str) -> list[int]:
    return [found.end() for found in re.finditer(r"<\|[a-z]+\|>|</?think>|.", text, re.DOTALL)]


@FAST
@given(
    conversations(),
    *(st.sampled_from(choice) for choice in (HEADERS, CONTENT, CALLS, CLOSINGS, OPENED)),
)
def test_spans_of_regular_templates(
    messages: list[Message], header: str, content: str, calls: str, closing: str, opened: str
) -> None:
    """Each turn is what stands between its header and the next one's, up to what the generation prompt opens."""
    assume(calls or "if not m.tool_calls" not in content)  # nothing of a call is written, which is refused
    render = render_with(template_of(header, content, calls, closing, opened))
    marked = render_with(template_of(header, content, calls, closing, opened, generation=True))(messages)
    text = render(messages)
    bounds = [found.start() - number for number, found in enumerate(re.finditer("\x00", marked))]
    expected = list(zip(bounds[::2], bounds[1::2], strict=True))
    spans = find_spans(text, messages, render, token_ends)
    for (start, end), (first, last) in zip(spans, expected, strict=True):
        assert end == last
        assert start == first or (first < start and opened.startswith(text[first:start])), (text, start, first)


MISTAKES = (
    ("[{{ m.role }}]", "[{{ m.role }}{{ messages[0].content }}]"),
    ("[{{ m.role }}]", "{{ messages[-1].content }}[{{ m.role }}]"),
    ("<|end|>", "{{ messages[loop.index].content if not loop.last }}<|end|>"),
    ("<|end|>", "{{ messages[0].content if loop.last }}<|end|>"),
    ("<|end|>", "<|end|>{{ messages[loop.index0 - 1].content }}"),
    ("<|end|>", "{{ loop.index }}<|end|>{{ messages | length }}"),
    ("in messages %}[", "in messages[::-1] %}["),
    ("in messages %}[", "in messages[1:] + messages[:1] %}["),
    ("{{ m.content }}", "{{ m.content }}{{ m.content }}"),
    ("{{ m.content }}", "{{ messages[loop.index0 - loop.index0 % 2].content }}"),
    ("{{ m.content }}", "{{ m.content if loop.index0 % 3 else messages[-1].content }}"),
    ("{{ m.content }}", "{{ m.content[::-1] }}"),
    ("{{ m.content }}", "{{ m.content if loop.last else m.content[:1] }}"),
    ("[assistant]", "[model]"),
    ("[assistant]", ""),
)


@FAST
@given(conversations(), st.lists(st.sampled_from(MISTAKES), min_size=1, max_size=3), st.sampled_from(OPENED))
def test_what_others_wrote_is_never_trained(messages: list[Message], mistakes: list[Any], opened: str) -> None:
    """Templates that write messages at the wrong place, twice or in part are refused, or their spans are right."""
    template = template_of("[{{ m.role }}]", "{{ m.content }}", CALLS[2], "<|end|>", opened).replace("'assistant'", "")
    template = template.replace("[{{  }}]", "[assistant]")
    for old, new in mistakes:
        template = template.replace(old, new)
    messages = [{**message, "content": message.get("content") or "c"} for message in messages]
    render = render_with(template)
    try:
        text = render(messages)
        spans = find_spans(text, messages, render, token_ends)
    except (TurnsNotFoundError, TypeError):
        return
    bare = re.sub(r"\[[a-z]+", lambda found: "[" + "H" * (len(found[0]) - 1), text)
    bare = re.sub(r"<\|[a-z]+\|>|</?think>", lambda found: "H" * len(found[0]), bare)
    outside = "".join(letter for i, letter in enumerate(bare) if not any(start <= i < end for start, end in spans))
    copied = any("messages[" in new for _, new in mistakes)  # an answer may stand a second time as another's words
    assert copied or not set("abc") & set(outside), (text, outside)
    for start, end in spans:
        assert not set("xyz") & set(bare[start:end]), (text, bare[start:end])
