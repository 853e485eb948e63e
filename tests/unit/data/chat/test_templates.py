import copy
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import ProcessorMixin

from finetune.data.chat.spans import ChatRenderer
from finetune.data.chat.templates import (
    adopt_chat_template,
    clone_chat_template,
    get_training_chat_template,
    has_generation_markers,
    leaves_last_answer_open,
    load_chat_template,
    resolve_template,
    stop_token_ids,
    try_training_template,
)
from finetune.data.preparation.pipeline import prepare_split
from finetune.data.preparation.settings import DataSettings
from finetune.data.rows import Conversations
from finetune.errors import DataFormatError, ModelLoadError

PLAIN = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
GENERATE = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]


def batch(*chats: list[dict[str, Any]], train: list[bool] | None = None, tools: Any = None) -> Conversations:
    count = len(chats)
    return Conversations([list(chat) for chat in chats], [train] * count, [tools] * count, [None] * count)


def trained(renderer: ChatRenderer, *chats: list[dict[str, Any]], **options: Any) -> list[list[str]]:
    made = renderer.render_with_spans(batch(*chats, **options), range(len(chats)))
    return [[text[a:b] for a, b in spans] for text, spans in zip(made.texts, made.spans, strict=True)]


@pytest.mark.parametrize("marker", ["{% generation %}", "{%- generation %}", "{%- generation -%}", "{%generation%}"])
def test_markers_are_found_however_they_are_spaced(marker: str) -> None:
    assert has_generation_markers(marker)
    assert has_generation_markers({"default": marker, "tool_use": ""})
    assert not has_generation_markers({"tool_use": marker, "default": ""})
    assert not has_generation_markers("{{ generation }}")
    assert not has_generation_markers(None)


def test_templates_are_loaded_from_files_and_tokenizers(chat_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jinja").write_text("äöü")
    assert load_chat_template(str(tmp_path / "a.jinja")) == "äöü"
    chat_tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert load_chat_template(str(tmp_path / "tokenizer")) == chat_tokenizer.chat_template
    for missing in ("none.jinja", "none"):
        with pytest.raises(ModelLoadError, match="chat_template_path"):
            load_chat_template(str(tmp_path / missing))


def test_a_tokenizer_without_template_is_an_error(chat_tokenizer: Any) -> None:
    chat_tokenizer.chat_template = None
    with pytest.raises(DataFormatError, match="chat_template_path"):
        resolve_template(chat_tokenizer)
    assert resolve_template(chat_tokenizer, "given") == "given"
    chat_tokenizer.chat_template = {"default": "a", "tool_use": "b"}
    assert resolve_template(chat_tokenizer) == "a"
    assert resolve_template(chat_tokenizer, tools=True) == "b"


def test_training_template_renders_like_the_original(chat_tokenizer: Any) -> None:
    found = get_training_chat_template(chat_tokenizer, PLAIN + GENERATE)
    assert has_generation_markers(found)
    for messages, generate in ((CHAT, False), (CHAT[:1], True), ([{"role": "system", "content": " x "}, *CHAT], False)):
        original = chat_tokenizer.apply_chat_template(
            messages, chat_template=PLAIN + GENERATE, tokenize=False, add_generation_prompt=generate
        )
        assert original == chat_tokenizer.apply_chat_template(
            messages, chat_template=found, tokenize=False, add_generation_prompt=generate
        )


def test_templates_that_depend_on_content_get_no_training_template(chat_tokenizer: Any) -> None:
    odd = PLAIN.replace("m.content", "m.content.split('</think>')[-1]") + GENERATE
    assert try_training_template(chat_tokenizer, odd) is None
    with pytest.raises(DataFormatError, match="chat_template_path"):
        get_training_chat_template(chat_tokenizer, odd)
    thinking = [CHAT[0], {"role": "assistant", "content": "<think>hm</think>Yo"}]
    assert trained(ChatRenderer(chat_tokenizer, odd), thinking) == [["Yo<|im_end|>\n"]]


def test_the_worked_example_of_the_spans(chat_tokenizer: Any) -> None:
    template = (
        "{% for m in messages %}{{ ('<u>' if m.role == 'user' else '<a>') + m.content + '<e>' }}{% endfor %}"
        "{% if add_generation_prompt %}<a>{% endif %}"
    )
    made = ChatRenderer(chat_tokenizer, template).render_with_spans(batch(CHAT), [0])
    assert made.texts == ["<u>Hi<e><a>Yo<e>"]
    assert made.spans == [[(11, 16)]]


def test_rows_outside_the_training_template_go_by_prefixes(chat_tokenizer: Any) -> None:
    training = try_training_template(chat_tokenizer, PLAIN + GENERATE)
    renderer = ChatRenderer(chat_tokenizer, PLAIN + GENERATE, training)
    doubled = [CHAT[0], CHAT[0], CHAT[1], {"role": "assistant", "content": "more"}, {"role": "tool", "content": "t"}]
    assert trained(renderer, doubled, CHAT) == [["Yo<|im_end|>\n", "more<|im_end|>\n"], ["Yo<|im_end|>\n"]]


def test_a_training_template_that_writes_another_text_is_not_used(chat_tokenizer: Any) -> None:
    marked = "{% generation %}x{% endgeneration %}"
    wrong = "{% for m in messages %}{% if m.role == 'assistant' %}" + marked + "{% endif %}{% endfor %}"
    renderer = ChatRenderer(chat_tokenizer, PLAIN + GENERATE, wrong)
    assert trained(renderer, CHAT) == [["Yo<|im_end|>\n"]]


def test_a_prompt_that_changes_once_it_is_answered_is_an_error(chat_tokenizer: Any) -> None:
    changing = PLAIN.replace("m.content +", "m.content + ('?' if loop.last else '!') +") + GENERATE
    with pytest.raises(DataFormatError, match="cannot be told from the rest"):
        ChatRenderer(chat_tokenizer, changing).render_with_spans(batch(CHAT), [0])


@pytest.mark.parametrize("marked", [True, False])
def test_train_flags_choose_turns(marked: bool, chat_tokenizer: Any) -> None:
    renderer = ChatRenderer(chat_tokenizer, None if marked else PLAIN + GENERATE)
    assert renderer.method == ("markers" if marked else "prefixes")
    chat = [*CHAT, {"role": "user", "content": "so"}, {"role": "assistant", "content": "end"}]
    assert [text.strip() for text in trained(renderer, chat, train=[False, True])[0]] == ["end<|im_end|>"]
    assert trained(renderer, chat, train=[False, False]) == [[]]


def test_a_template_that_hides_where_answers_are_is_an_error(chat_tokenizer: Any) -> None:
    shuffled = "{% for m in messages[::-1] %}{{ m.role + m.content }}{% endfor %}"
    with pytest.raises(DataFormatError, match=r"Row 3 of the eval dataset.*chat_template_path"):
        ChatRenderer(chat_tokenizer, shuffled, name="eval").render_with_spans(batch(CHAT), [3])


def test_markers_that_mark_nothing_are_an_error(chat_tokenizer: Any) -> None:
    empty = PLAIN + "{% generation %}{% endgeneration %}"
    with pytest.raises(DataFormatError, match="marks none of their text"):
        ChatRenderer(chat_tokenizer, empty).render_with_spans(batch(CHAT), [0])


def test_a_conversation_that_the_template_refuses_names_its_row(chat_tokenizer: Any) -> None:
    picky = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN
    renderer = ChatRenderer(chat_tokenizer, picky)
    with pytest.raises(DataFormatError, match=r"Row 8 .*'system'.*no system"):
        renderer.render(batch(CHAT, [{"role": "system", "content": "a"}, *CHAT]), [7, 8])


def test_tools_and_template_variables_of_a_row_are_its_own(chat_tokenizer: Any) -> None:
    renderer = ChatRenderer(chat_tokenizer, "{{ tools | length }}{{ depth }}", template_kwargs={"depth": 1})
    chats = Conversations([CHAT, CHAT], [None, None], [[{"a": 1}], [{"a": 1}, {"b": 2}]], [None, {"depth": 9}])
    assert renderer.render(chats, [0, 1]) == ["11", "29"]


def test_stop_tokens_are_eos_and_the_end_of_a_turn(chat_tokenizer: Any) -> None:
    end, eos = chat_tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"])
    assert stop_token_ids(chat_tokenizer) == {end}
    chat_tokenizer.eos_token = "</s>"
    assert stop_token_ids(chat_tokenizer) == {end, eos}
    chat_tokenizer.chat_template = None
    assert stop_token_ids(chat_tokenizer) == {eos}


def test_templates_that_end_an_answer_with_the_next_turn(chat_tokenizer: Any) -> None:
    assert not leaves_last_answer_open(chat_tokenizer)
    headers = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
    assert not leaves_last_answer_open(chat_tokenizer, headers), "`<|user|>` is text for this tokenizer"
    chat_tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    assert leaves_last_answer_open(chat_tokenizer, headers)
    assert not leaves_last_answer_open(chat_tokenizer, headers + "{{ eos_token }}")
    chat_tokenizer.chat_template = None
    assert not leaves_last_answer_open(chat_tokenizer)


# ---- Processors ----


class Processor(ProcessorMixin):
    """What models for images and text come with, without the images."""

    def __init__(self, tokenizer: Any = None, chat_template: str | None = None) -> None:
        super().__init__(tokenizer, chat_template=chat_template)


@pytest.mark.parametrize("own", [True, False])
def test_a_processor_renders_with_its_own_template(own: bool, chat_tokenizer: Any) -> None:
    processor = Processor(chat_tokenizer, "{{ messages[1].content + eos_token }}" if own else None)
    rows = Dataset.from_dict({"messages": [CHAT]})
    split = prepare_split(rows, processor, DataSettings(), say=lambda line: None)
    assert chat_tokenizer.decode(split.dataset[0]["input_ids"]).startswith("Yo<|im_end|>" if own else "<|im_start|>")
    split.audit.check()
    plain = ChatRenderer(Processor(chat_tokenizer, PLAIN + GENERATE))
    assert trained(plain, CHAT) == [["Yo<|im_end|>\n"]]


def test_a_processor_adopts_a_template_and_its_tokens(chat_tokenizer: Any, tiny_llama: Any, tmp_path: Path) -> None:
    source = copy.deepcopy(chat_tokenizer)
    source.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    source.chat_template, source.eos_token = "{{ '<|turn|>' }}", "<|turn|>"
    source.save_pretrained(tmp_path)
    processor, model = Processor(chat_tokenizer, "old"), tiny_llama()
    _, same, added = clone_chat_template(model, processor, str(tmp_path))
    assert same is processor
    assert processor.chat_template == chat_tokenizer.chat_template == source.chat_template
    assert added[0] == chat_tokenizer.eos_token_id == model.config.eos_token_id
    assert model.get_input_embeddings().weight.shape[0] == len(chat_tokenizer)
    (tmp_path / "a.jinja").write_text("{{ 'new' }}")
    assert adopt_chat_template(processor, str(tmp_path / "a.jinja")) == []
    assert processor.chat_template == chat_tokenizer.chat_template == "{{ 'new' }}"
