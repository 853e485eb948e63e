"""Same rows, same tokens, same masks as TRL, and the helpers that TRL users import."""

import types
from pathlib import Path
from typing import Any

import datasets
import pytest
import trl
from trl import data_utils as theirs

from finetune.data.chat import messages as ours
from finetune.data.chat import spans as spans_module
from finetune.data.chat.templates import (
    clone_chat_template,
    get_training_chat_template,
    has_generation_markers,
    is_chat_template_stop_token_trained,
    try_training_template,
)
from finetune.data.preparation.pipeline import prepare_split
from finetune.data.preparation.settings import DataSettings
from finetune.data.rows import Conversations

TEMPLATES = Path(trl.__file__).parent / "chat_templates"


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": c} for i, c in enumerate(contents)]


def answer(content: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": content}]


ROWS: dict[str, dict[str, list[Any]]] = {
    "text": {"text": ["the cat sat on a mat", "stars<|im_end|>", "sun"]},
    "other field": {"body": ["the cat sat", "on a mat"]},
    "prompt-completion": {
        "prompt": ["the cat", "what is", ""],
        "completion": [" sat on a mat", " your name<|im_end|>", "hills"],
    },
    "messages": {"messages": [turns("what is your name", "the cat"), turns("a", "b c", "the red sun", "go down")]},
    "prompt-completion as messages": {
        "prompt": [turns("what is your name"), turns("a", "b", "more")],
        "completion": [answer("the cat"), answer("stars")],
    },
    "sharegpt": {
        "conversations": [[{"from": "user", "value": "the sun"}, {"from": "assistant", "value": "go down"}]],
    },
    "tokenized": {"input_ids": [[5, 6, 7, 8], [9, 10]]},
    "tokenized with labels": {"input_ids": [[5, 6, 7, 8]], "labels": [[-100, -100, 7, 8]]},
    "tokenized with masks": {"input_ids": [[5, 6, 7, 8]], "assistant_masks": [[0, 1, 0, 1]]},
}


def prepare_with_trl(
    dataset: Any, tokenizer: Any, tmp_path: Path, *, completion_only: bool = False, **config: Any
) -> list[dict[str, Any]]:
    args = trl.SFTConfig(
        output_dir=str(tmp_path), bf16=False, report_to=[], shuffle_dataset=False, use_cpu=True, **config
    )
    self = types.SimpleNamespace(_tokenizer=tokenizer, completion_only_loss=completion_only, chat_template=None)
    prepare: Any = trl.SFTTrainer._prepare_dataset
    made = prepare(self, dataset, tokenizer, args, False, None, "train")
    return [{key: row[key] for key in ("input_ids", "labels")} for row in made]


def prepare_with_ours(dataset: Any, tokenizer: Any, **settings: Any) -> list[dict[str, Any]]:
    made = prepare_split(dataset, tokenizer, DataSettings(**settings), say=lambda line: None).dataset
    return [{key: row[key] for key in ("input_ids", "labels")} for row in made]


@pytest.mark.parametrize("max_length", [None, 4, 40])
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("kind", list(ROWS))
def test_rows_become_the_tokens_and_labels_of_trl(
    kind: str, mode: Any, max_length: int | None, chat_tokenizer: Any, tmp_path: Path
) -> None:
    rows = datasets.Dataset.from_dict(ROWS[kind])
    options = {"max_length": max_length, "truncation_mode": mode}
    if kind == "other field":
        options["dataset_text_field"] = "body"
    expected = prepare_with_trl(rows, chat_tokenizer, tmp_path, completion_only="prompt" in kind, **options)
    assert prepare_with_ours(rows, chat_tokenizer, **options) == expected
    assert expected or max_length == 4


@pytest.mark.parametrize("kind", ["messages", "prompt-completion as messages", "sharegpt"])
@pytest.mark.parametrize("completion_only", [False, True])
def test_assistant_masks_are_those_of_trl(
    kind: str, completion_only: bool, chat_tokenizer: Any, tmp_path: Path
) -> None:
    rows = datasets.Dataset.from_dict(ROWS[kind])
    completion_only = completion_only and "prompt" in kind
    expected = prepare_with_trl(
        rows, chat_tokenizer, tmp_path, completion_only=completion_only, assistant_only_loss=True, max_length=None
    )
    flag = completion_only if "prompt" in kind else None
    ours_made = prepare_with_ours(
        rows, chat_tokenizer, assistant_only_loss=True, completion_only_loss=flag, max_length=None
    )
    assert ours_made == expected
    assert all(-100 in row["labels"] and max(row["labels"]) > 0 for row in expected)


def test_streams_give_the_rows_of_trl(chat_tokenizer: Any, tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict(ROWS["prompt-completion"])
    expected = prepare_with_trl(rows.to_iterable_dataset(), chat_tokenizer, tmp_path, completion_only=True)
    assert prepare_with_ours(rows.to_iterable_dataset(), chat_tokenizer) == expected


def test_a_row_of_one_token_is_left_out_unlike_trl(chat_tokenizer: Any, tmp_path: Path) -> None:
    # TRL keeps it, but no earlier token predicts its only label, so it adds nothing to the loss.
    rows = datasets.Dataset.from_dict({"text": ["", "the cat"]})
    assert len(prepare_with_trl(rows, chat_tokenizer, tmp_path)) == 2
    assert len(prepare_with_ours(rows, chat_tokenizer)) == 1


def test_a_completion_mask_is_followed_unlike_trl(chat_tokenizer: Any, tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7, 8]], "completion_mask": [[0, 0, 1, 1]]})
    assert prepare_with_trl(rows, chat_tokenizer, tmp_path)[0]["labels"] == [5, 6, 7, 8]
    assert prepare_with_ours(rows, chat_tokenizer)[0]["labels"] == [-100, -100, 7, 8]
    for wanted in (False, True):
        expected = prepare_with_trl(rows, chat_tokenizer, tmp_path, completion_only=wanted)
        assert prepare_with_ours(rows, chat_tokenizer, completion_only_loss=wanted) == expected


def test_rows_are_rendered_with_the_models_own_template_unlike_trl(chat_tokenizer: Any) -> None:
    """TRL trains Qwen3 on a thinking block in every turn; the model's own template writes one in the last turn only."""
    from trl.chat_template_utils import get_training_chat_template as theirs_for_training

    original = (TEMPLATES / "qwen3.jinja").read_text(encoding="utf-8")
    chat_tokenizer.chat_template = original
    marked = theirs_for_training(chat_tokenizer)
    messages = turns("a", "b c", "red sun", "go down")
    their_text, _ = spans_of(chat_tokenizer, marked, messages, None)
    text, _ = spans_of(chat_tokenizer, original, messages, try_training_template(chat_tokenizer, original))
    assert (their_text.count("<think>"), text.count("<think>")) == (2, 1)
    assert text == chat_tokenizer.apply_chat_template(messages, tokenize=False)


def test_a_template_that_leaves_the_last_answer_open_trains_as_in_trl(chat_tokenizer: Any, tmp_path: Path) -> None:
    """GLM-4 writes nothing after the last answer: the model ends its turn by saying `<|user|>`."""
    template = (TEMPLATES / "glm4moe.jinja").read_text(encoding="utf-8")
    chat_tokenizer.add_special_tokens({"additional_special_tokens": special_tokens_in(template)})
    chat_tokenizer.chat_template = template
    rows = datasets.Dataset.from_dict(ROWS["messages"])
    expected = prepare_with_trl(rows, chat_tokenizer, tmp_path)
    assert prepare_with_ours(rows, chat_tokenizer) == expected
    for options in ({}, {"assistant_only_loss": True}):
        split = prepare_split(rows, chat_tokenizer, DataSettings(**options), say=lambda line: None)
        split.audit.check()
        assert not split.audit.warnings()


def test_tools_reach_the_template(chat_tokenizer: Any, tmp_path: Path) -> None:
    chat_tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + chat_tokenizer.chat_template
    tool = {"type": "function", "function": {"name": "add"}}
    rows = datasets.Dataset.from_dict({"messages": [turns("a", "b")], "tools": ['[{"type": "function"}]']})
    expected = prepare_with_trl(rows, chat_tokenizer, tmp_path)
    assert prepare_with_ours(rows, chat_tokenizer) == expected
    assert '"function"' in chat_tokenizer.decode(expected[0]["input_ids"])
    nested = datasets.Dataset.from_dict({"messages": [turns("a", "b")], "tools": [[tool]]})
    assert prepare_with_ours(nested, chat_tokenizer) == prepare_with_trl(nested, chat_tokenizer, tmp_path)


def test_prepared_rows_with_bos_are_those_of_trl(chat_tokenizer: Any, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    bos = chat_tokenizer.bos_token
    chat_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, chat_tokenizer.bos_token_id)]
    )
    for kind in ("text", "prompt-completion", "messages"):
        rows = datasets.Dataset.from_dict(ROWS[kind])
        expected = prepare_with_trl(rows, chat_tokenizer, tmp_path, completion_only="prompt" in kind)
        assert prepare_with_ours(rows, chat_tokenizer) == expected
    assert expected[0]["input_ids"][0] != chat_tokenizer.bos_token_id  # templates write their own
    doubled = datasets.Dataset.from_dict({"text": [f"{bos}the cat"]})
    ids = prepare_with_ours(doubled, chat_tokenizer)[0]["input_ids"]
    assert ids.count(chat_tokenizer.bos_token_id) == 1
    assert prepare_with_trl(doubled, chat_tokenizer, tmp_path)[0]["input_ids"] == [ids[0], *ids]


EXAMPLES: list[dict[str, Any]] = [
    {"messages": turns("a", "b")},
    {"prompt": turns("a"), "completion": answer("b")},
    {"prompt": turns("a")},
    {"prompt": turns("a", "b")},
    {"prompt": turns("a"), "chosen": answer("b"), "rejected": answer("c")},
    {"chosen": turns("a", "b"), "rejected": turns("a", "c")},
    {"prompt": turns("a"), "completion": answer("b"), "label": True},
    {"prompt": "a", "completion": "b"},
    {"conversations": [{"from": "user", "value": "a"}]},
    {"conversations": [{"role": "user", "content": "a"}]},
    {"conversations": "a"},
    {"text": "a"},
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_helpers_agree_with_trl(example: dict[str, Any], chat_tokenizer: Any) -> None:
    import copy

    assert ours.is_conversational(example) == theirs.is_conversational(example)
    assert ours.is_conversational_from_value(example) == theirs.is_conversational_from_value(example)
    before = copy.deepcopy(example)
    converted = ours.maybe_convert_to_chatml(example)
    assert example == before
    assert converted == theirs.maybe_convert_to_chatml(copy.deepcopy(example))
    assert ours.maybe_apply_chat_template(example, chat_tokenizer) == theirs.maybe_apply_chat_template(
        example, chat_tokenizer
    )


@pytest.mark.parametrize(
    "example",
    [
        {"chosen": "the sun is up", "rejected": "the sun is down"},
        {"chosen": "abc", "rejected": "abd"},
        {"chosen": turns("a", "b"), "rejected": turns("a", "c")},
        {"prompt": turns("a"), "chosen": answer("b"), "rejected": answer("c")},
        {"prompt": "a", "chosen": turns("a", "b"), "rejected": turns("a", "c")},
        {"prompt": "a"},
    ],
)
def test_prompts_are_extracted_as_by_trl(example: dict[str, Any]) -> None:
    assert ours.maybe_extract_prompt(example) == theirs.maybe_extract_prompt(example)


def test_common_prefix_length_agrees_with_trl() -> None:
    for first, second in [([1, 2, 3], [1, 2, 4]), ([], [1]), ([1], [1, 2]), ([2], [1]), ([1, 2], [1, 2])]:
        assert ours.common_prefix_length(first, second) == theirs.common_prefix_length(first, second)


def family_names() -> list[str]:
    names = {path.name.removesuffix("_training.jinja") for path in TEMPLATES.glob("*_training.jinja")}
    return sorted(name for name in names if (TEMPLATES / f"{name}.jinja").exists())


def spans_of(tokenizer: Any, template: str, messages: list[dict[str, str]], training: str | None) -> Any:
    renderer = spans_module.ChatRenderer(tokenizer, template, training)
    rendered = renderer.render_with_spans(Conversations([messages], [None], [None], [None]), [0])
    return rendered.texts[0], rendered.spans[0]


TRL_TRAINS_THE_PROMPT = (
    *("deepseek_r1_distill", "deepseekv3", "gptoss", "muse_glimmer"),
    *("nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra"),
    *("qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_8"),
)


def tool_conversations() -> list[list[dict[str, Any]]]:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    result = {"role": "tool", "name": "weather", "content": '{"temp": 20}'}
    asked = [{"role": "user", "content": "weather?"}, {"role": "assistant", "tool_calls": [call]}, result]
    beside = [asked[0], {**asked[1], "content": "Let me see."}, result]
    reasoned = [asked[0], {**asked[1], "content": "<think>\nhm\n</think>\n\nLet me see."}, result]
    again, told = asked[1:], {"role": "assistant", "content": 'It says {"temp": 20}'}
    reasoned_told = {**told, "content": "<think>\nso\n</think>\n\nIt is 20."}
    return [
        [*asked, told],
        [*asked, *again, told, *turns("thanks", "bye")],
        [*beside, told, *turns("thanks", "bye")],
        [*reasoned, reasoned_told, *turns("thanks", "<think>\nend\n</think>\n\nbye")],
        [*turns("make html", "<html>", "x", ""), *asked, told],
    ]


@pytest.mark.parametrize("family", family_names())
def test_spans_found_without_markers_are_those_of_trls_training_templates(family: str, chat_tokenizer: Any) -> None:
    """Wherever TRL's template with markers writes the same text as the original, our spans end where its spans end.

    White space at the borders aside, which TRL draws differently from family to family, they also begin there; some of
    TRL's begin earlier and train on what the generation prompt already gives (`<think>`, the assistant's header).
    """
    original = (TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8")
    marked = (TEMPLATES / f"{family}_training.jinja").read_text(encoding="utf-8")
    chat_tokenizer.add_special_tokens({"additional_special_tokens": special_tokens_in(original)})
    training = try_training_template(chat_tokenizer, original)
    compared = 0
    for messages in (turns("the cat", "sat on"), turns("a", "b c", "red sun", "go down"), *tool_conversations()):
        if family == "diffusion_gemma" and any(message["role"] == "tool" for message in messages):
            continue  # see `test_a_tool_calls_stop_token_is_trained_unlike_trl`
        try:
            text, expected = spans_of(chat_tokenizer, marked, messages, None)
            plain, found = spans_of(chat_tokenizer, original, messages, training)
        except ValueError:
            continue  # families for images, which do not write text contents
        if plain != text:
            continue  # TRL changed what the template writes
        compared += 1
        assert len(found) == len(expected)
        for (start, end), (their_start, their_end) in zip(found, expected, strict=True):
            assert text[:end].rstrip() == text[:their_end].rstrip()
            extra = text[their_start:start].strip()
            assert not extra or (family in TRL_TRAINS_THE_PROMPT and start > their_start), (family, extra)
    if not compared:
        pytest.skip("TRL's training template writes another text, or the family needs images")


TOOL_FAMILIES = ("gptoss", "llama3_1", "llama3_2", "phi3", "qwen2_5", "qwen3", "qwen3_5_think", "qwen3_6", "gemma4_v5")


@pytest.mark.parametrize("family", TOOL_FAMILIES)
def test_tool_conversations_are_trained_whether_trl_has_a_training_template_or_not(
    family: str, chat_tokenizer: Any
) -> None:
    """What TRL's template marks is trained in the text that the model's own template writes, thinking blocks aside."""
    original = (TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8")
    marked = TEMPLATES / f"{family}_training.jinja"
    chat_tokenizer.add_special_tokens({"additional_special_tokens": special_tokens_in(original)})
    drops_text = family in ("llama3_1", "llama3_2", "gptoss")  # beside a tool call
    refused = 0
    for messages in tool_conversations():
        messages = [{"content": "", **message} for message in messages]  # Phi 3 asks for it
        try:
            text, found = spans_of(chat_tokenizer, original, messages, None)
        except ValueError as error:
            # Gemma 4 writes the text beside a call behind the result of the call.
            assert family == "gemma4_v5", error
            assert messages[1].get("content") and "what closes message 1 changes" in str(error)
            refused += 1
            continue
        answers = [text[start:end].split("</think>")[-1].strip() for start, end in found]
        if marked.exists():
            their_text, theirs = spans_of(chat_tokenizer, marked.read_text(encoding="utf-8"), messages, None)
            expected = [their_text[start:end].split("</think>")[-1].strip() for start, end in theirs]
            assert answers == [answer.removeprefix("<|start|>assistant").strip() for answer in expected]
        assert len(answers) == sum(message["role"] == "assistant" for message in messages)
        for turn, answer in zip((m for m in messages if m["role"] == "assistant"), answers, strict=True):
            assert turn.get("content", "").split("</think>")[-1].strip() in answer or drops_text
            assert ("weather" in answer) == ("tool_calls" in turn) or family == "phi3"
            assert not {"weather?", "make html", "thanks"} & set(answer.split())
    assert refused == (2 if family == "gemma4_v5" else 0)


def test_a_tool_calls_stop_token_is_trained_unlike_trl(chat_tokenizer: Any) -> None:
    """Gemma's model hands over to a tool by `<|tool_response>`; what its prompt does not give after one is trained."""
    original = (TEMPLATES / "diffusion_gemma.jinja").read_text(encoding="utf-8")
    marked = (TEMPLATES / "diffusion_gemma_training.jinja").read_text(encoding="utf-8")
    messages = tool_conversations()[0]
    text, found = spans_of(chat_tokenizer, original, messages, None)
    their_text, expected = spans_of(chat_tokenizer, marked, messages, None)
    assert text == their_text
    theirs = [text[start:end] for start, end in expected]
    assert [text[a:b] for a, b in found] == [theirs[0] + "<|tool_response>", "<|turn>model\n" + theirs[1]]


def special_tokens_in(template: str) -> list[str]:
    import re

    return sorted(
        set(re.findall(r"<[|\uff5c][^|\uff5c<>\s]+[|\uff5c]>|<(?:start|end)_of_turn>|<\|?turn\|?>", template))
    )


def test_stop_token_check_agrees_with_trl(chat_tokenizer: Any) -> None:
    from trl.chat_template_utils import is_chat_template_stop_token_trained as trl_check

    inside = chat_tokenizer.chat_template
    outside = inside.replace(
        "+ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}", "}}{% endgeneration %}{{ '<|im_end|>\n' }}"
    )
    assert outside != inside
    for template, expected in ((inside, True), (outside, False), (inside.replace("generation", "filter trim"), False)):
        if has_generation_markers(template):
            assert trl_check(chat_tokenizer, template) is expected
        assert is_chat_template_stop_token_trained(chat_tokenizer, template) is expected


def test_training_template_is_none_where_trl_needs_none(chat_tokenizer: Any) -> None:
    assert get_training_chat_template(chat_tokenizer) is None


def test_cloning_a_template_does_what_trl_does(chat_tokenizer: Any, tiny_llama: Any, tmp_path: Path) -> None:
    import copy

    source = copy.deepcopy(chat_tokenizer)
    source.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|stop|>"]})
    source.eos_token = "<|stop|>"
    source.chat_template = "{{ '<|turn|>' }}"
    source.save_pretrained(tmp_path)
    results = []
    for clone in (clone_chat_template, trl.clone_chat_template):
        model, tokenizer = tiny_llama(), copy.deepcopy(chat_tokenizer)
        model.resize_token_embeddings(len(tokenizer))
        model, tokenizer, added = clone(model, tokenizer, str(tmp_path))
        size = model.get_input_embeddings().weight.shape[0]
        results.append(
            (added, size, len(tokenizer), tokenizer.eos_token_id, tokenizer.chat_template, model.config.eos_token_id)
        )
    assert results[0] == results[1]
    assert results[0][1] % 64 == 0
