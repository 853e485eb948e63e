import re
from typing import Any

import pytest
from jinja2 import Environment

from finetune.data.chat.span_search import TurnsNotFoundError, find_spans, verify_spans

Message = dict[str, Any]
CALL = [{"type": "function", "function": {"name": "get", "arguments": {"city": "Rome"}}}]


def user(content: Any) -> Message:
    return {"role": "user", "content": content}


def tool(content: Any) -> Message:
    return {"role": "tool", "content": content}


def says(content: Any, **keys: Any) -> Message:
    return {"role": "assistant", **({} if content is None else {"content": content}), **keys}


def token_ends(text: str) -> list[int]:
    """Tokens are the markers in angle brackets, and single characters elsewhere."""
    return [found.end() for found in re.finditer(r"</?[a-z|]+>|.", text, re.DOTALL)]


def trained(template: str, messages: list[Message]) -> list[str]:
    compiled = Environment(extensions=["jinja2.ext.loopcontrols"]).from_string(template)

    def render(messages: Any, add_generation_prompt: bool = False) -> str:
        return compiled.render(messages=messages, add_generation_prompt=add_generation_prompt)

    text = render(messages)
    return [text[start:end] for start, end in find_spans(text, messages, render, token_ends)]


PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.tool_calls %}"
    "{% for c in m.tool_calls %}<call>{{ c.function.arguments | tojson }}</call>{% endfor %}{% endif %}<e>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Qwen3's style: the reasoning goes, and an empty block comes, as soon as no user message follows.
THINKING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
    "{% for m in messages %}{% set text = m.content or '' %}<{{ m.role }}>"
    "{% if m.role == 'assistant' %}{% if loop.index0 > ns.last %}"
    "<think>{{ text.split('</think>')[0].split('<think>')[-1] if '</think>' in text else '' }}</think>{% endif %}"
    "{{ text.split('</think>')[-1] }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.arguments | tojson }}</call>{% endfor %}"
    "{% else %}{{ text }}{% endif %}<e>{% endfor %}{% if add_generation_prompt %}<assistant>OPEN{% endif %}"
)
# gpt-oss closes the last answer by a marker of its own, and a tool call by a third.
CLOSED = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function.arguments }}"
    "<call>{% elif m.role == 'assistant' and loop.last %}<return>{% else %}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_the_worked_example() -> None:
    template = (
        "{% for m in messages %}{{ '<u>' if m.role == 'user' else '<a>' }}"
        "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<e>{% endfor %}"
        "{% if add_generation_prompt %}<a>{% endif %}"
    )
    assert trained(template, [user("Hi"), says("<think>hm</think>Yo"), user("Ok")]) == ["Yo<e>"]


@pytest.mark.parametrize("opening", ["", "<think>"])
def test_tool_calls_without_text_and_empty_answers(opening: str) -> None:
    template = THINKING.replace("OPEN", opening)
    block = "<think></think>".removeprefix(opening)
    call = '<call>{"city": "Rome"}</call><e>'
    for nothing in (None, ""):
        chat = [user("go"), says(nothing, tool_calls=CALL), tool("20"), says(nothing, tool_calls=CALL), tool("a")]
        assert trained(template, [*chat, says("20")]) == [block + call, block + call, block + "20<e>"]
        assert trained(template, [*chat, says("20"), user("a"), says("a")]) == [call, call, "20<e>", block + "a<e>"]
    assert trained(template, [user("a"), says(""), user("b"), says("c")]) == ["<e>", block + "c<e>"]


def test_an_empty_answer_whose_turn_loses_its_reasoning_and_is_closed_unlike_a_question() -> None:
    template = THINKING.replace("OPEN", "").replace("<e>", "{{ '<f>' if m.role == 'assistant' else '<e>' }}")
    assert trained(template, [user("a"), says(""), user("b"), says("")]) == ["<f>", "<think></think><f>"]


def test_a_question_that_stands_in_the_header_of_the_answer_too_is_refused() -> None:
    template = PLAIN.replace("<{{ m.role }}>", "<{{ m.role }}:{{ messages[0].content }}>").replace("<assistant>", "")
    with pytest.raises(TurnsNotFoundError, match=r"message 0 \(user\) is inside"):
        trained(template, [user("xx"), says("aa")])


@pytest.mark.parametrize("question", ["e", "<e>", "call", "aa", "Rome"])
def test_a_question_that_is_in_a_marker_or_in_the_answer_is_not(question: str) -> None:
    chat = [user(question), says("aa", tool_calls=CALL), user(question), says("aa")]
    assert trained(PLAIN, chat) == ['aa<call>{"city": "Rome"}</call><e>', "aa<e>"]


def test_reasoning_between_tool_calls_goes_once_a_question_follows() -> None:
    template = THINKING.replace("OPEN", "<think>")
    chat = [user("go"), says("<think>hm</think>Wait", tool_calls=CALL), tool("sunny"), says("<think>so</think>sunny")]
    call = '<call>{"city": "Rome"}</call><e>'
    assert trained(template, chat) == ["hm</think>Wait" + call, "so</think>sunny<e>"]
    longer = [*chat, user("thx"), says("<think>end</think>sunny")]
    assert trained(template, longer) == ["Wait" + call, "sunny<e>", "end</think>sunny<e>"]


@pytest.mark.parametrize("answer", ["<b>", "<think", "</think>", "<", "<e>"])
def test_answers_that_begin_like_what_the_prompt_opens(answer: str) -> None:
    template = THINKING.replace("OPEN", "<think>").replace(".split('</think>')[-1]", "")
    assert trained(template, [user("a"), says(answer), user("b"), says("c")])[0] == answer + "<e>"


def test_a_tool_call_that_begins_like_what_the_prompt_opens() -> None:
    template = THINKING.replace("OPEN", "<Think>")
    chat = [user("a"), says(None, tool_calls=CALL), tool("b"), says("c"), user("d"), says("e")]
    assert trained(template.replace("<call>", "<T>"), chat)[0] == '<T>{"city": "Rome"}</call><e>'


def test_white_space_around_what_is_said_stays_where_the_template_writes_it() -> None:
    chat = [user(" a\n"), says(" <think>hm</think>\n b \n"), user("a "), says("\tc ")]
    template = THINKING.replace("OPEN", "<think>")
    assert trained(template, chat) == ["\n b \n<e>", "</think>\tc <e>"]
    assert trained(template.replace("{{ text }}", "{{ text | trim }}"), chat) == ["\n b \n<e>", "</think>\tc <e>"]
    trimmed = template.replace("{{ text", "{{ text | trim").replace("text | trim.split", "text.strip().split")
    assert trained(trimmed, chat) == ["\n b<e>", "</think>c<e>"]


def test_text_of_a_tool_that_the_template_escapes_or_leaves_out() -> None:
    chat = [user("go"), says(None, tool_calls=CALL), tool('{"temp": 20}'), says('It says {"temp": 20}')]
    escaped = PLAIN.replace("{{ m.content }}", "{{ m.content | tojson if m.role == 'tool' else m.content }}")
    assert trained(escaped, chat)[1] == 'It says {"temp": 20}<e>'
    dropped = PLAIN.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}", 1)
    assert trained(dropped, chat)[1] == 'It says {"temp": 20}<e>'


def test_text_beside_a_tool_call_that_the_template_leaves_out() -> None:
    template = PLAIN.replace("{{ m.content }}", "{{ m.content if not m.tool_calls }}")
    chat = [user("go"), says("Let me see", tool_calls=CALL), tool("1"), says("Let me see")]
    assert trained(template, chat) == ['<call>{"city": "Rome"}</call><e>', "Let me see<e>"]


def test_answers_before_the_last_are_closed_like_questions() -> None:
    chat = [user("a"), says("b"), user("a"), says(None, tool_calls=CALL), tool("b"), says("b"), user("a"), says("b")]
    assert trained(CLOSED, chat) == ["b<end>", "{'city': 'Rome'}<call>", "b<end>", "b<return>"]


def test_contents_in_blocks() -> None:
    template = CLOSED.replace("{{ m.content }}", "{% for b in m.content %}{{ b.text or '<image>' }}{% endfor %}")
    text, image = {"type": "text", "text": "b"}, {"type": "image"}
    chat = [user([image]), says([text]), user([image, text]), says([text, text]), user([image]), says([text])]
    assert trained(template, chat) == ["b<end>", "bb<end>", "b<return>"]


def test_questions_in_the_form_of_tool_answers_keep_it() -> None:
    template = THINKING.replace("m.role == 'user'", "m.role == 'user' and not m.content.startswith('<r>')")
    chat = [user("go"), says("b"), user("<r>b</r>"), says("b"), user("c"), says("d")]
    assert trained(template.replace("OPEN", ""), chat) == ["b<e>", "b<e>", "<think></think>d<e>"]


TWO = [user("xx"), says("aa"), user("yy"), says("bb")]


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (PLAIN.replace("{{ m.content }}", "{{ m.content }}{{ '?' if loop.last else '!' }}"), "changes once"),
        (
            PLAIN.replace("<e>", "{{ '<f>' if m.role == 'assistant' and not loop.last else '<e>' }}"),
            "closes",
        ),
        (PLAIN.replace("in messages", "in messages[::-1]"), "not written before"),
        (PLAIN + "{{ messages[0].content }}", "message 0 is not written before message 1"),
        (PLAIN + "{{ messages[2].content if messages | length > 2 }}", "message 2 is not written before message 3"),
        (PLAIN + "{{ messages[1].content if messages | length > 1 }}", "overlap or are not in order"),
        (PLAIN.replace("{{ m.content }}", "{{ m.content if m.role == 'user' }}"), "does not write message 1"),
        (PLAIN.replace("<e>", "{{ loop.nextitem.content if not loop.last }}<e>"), "before message"),
        (PLAIN.replace("{% for m", "{{ messages[-1].content }}{% for m"), "before message"),
    ],
)
def test_what_cannot_be_proved_is_refused(template: str, problem: str) -> None:
    with pytest.raises(TurnsNotFoundError, match=re.escape(problem)):
        trained(template, TWO)


def test_a_tool_answer_written_inside_the_turn_is_refused() -> None:
    """Gemma 4's style: the result of a call stands between the call and the text beside it."""
    template = (
        "{% for m in messages if m.role != 'tool' %}<{{ m.role }}>{% if m.tool_calls %}<call>"
        "{{ m.tool_calls[0].function.arguments }}{{ messages[loop.index].content if messages | length > loop.index }}"
        "{% endif %}{{ m.content }}<e>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    with pytest.raises(TurnsNotFoundError, match=r"message 2 \(tool\) is inside"):
        trained(template, [user("go"), says("Wait", tool_calls=CALL), tool("sunny"), says("sunny")])


@pytest.mark.parametrize(
    ("spans", "problem"),
    [
        ([(11, 16)], ""),
        ([], "1 assistant messages but 0 spans"),
        ([(12, 16)], "not wholly inside"),
        ([(11, 11)], "is empty"),
        ([(3, 16)], "message 0 (user) is inside a trained span"),
    ],
)
def test_spans_are_verified(spans: list[tuple[int, int]], problem: str) -> None:
    chat = [user("Hi"), says("Yo")]
    assert problem in verify_spans("<u>Hi<e><a>Yo<e>", chat, spans)
    assert bool(problem) == bool(verify_spans("<u>Hi<e><a>Yo<e>", chat, spans))
