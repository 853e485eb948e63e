"""Chat templates as whole texts: load, clone, give them generation markers, find their stop tokens."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.compat import tokenizer_of
from finetune.data.chat.training_templates import find_training_template
from finetune.errors import DataFormatError, ModelLoadError

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


def has_generation_markers(chat_template: str | dict[str, str] | None) -> bool:
    """Returns whether a template has `{% generation %}`, in any whitespace variant. Of named ones, `default` counts."""
    if isinstance(chat_template, dict):
        chat_template = chat_template.get("default")
    return chat_template is not None and _MARKER.search(chat_template) is not None


def resolve_template(processing_class: Any, template: str | None = None, *, tools: bool = False) -> str:
    """Returns the template text that renders a conversation, with or without tools.

    Raises `DataFormatError` when neither `template` is given nor the tokenizer has one.
    """
    if template is not None:
        return template
    own = getattr(processing_class, "chat_template", None)
    if own is None and hasattr(processing_class, "tokenizer"):
        own = processing_class.tokenizer.chat_template
    if isinstance(own, dict):
        own = (own.get("tool_use") if tools else None) or own.get("default")
    if not own:
        raise DataFormatError(
            "The dataset has conversations, but the tokenizer has no chat template. Set `chat_template_path` to a "
            "`.jinja` file or to a model that has one."
        )
    return own


def load_chat_template(path: str) -> str:
    """Returns the template in a `.jinja`/`.j2` file, or that of the tokenizer in a folder or of a model id.

    Raises `ModelLoadError` when it cannot be read and `DataFormatError` when the tokenizer has none.
    """
    if path.endswith((".jinja", ".j2")):
        try:
            return Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelLoadError(f"`chat_template_path` is `{path}`, which cannot be read: {error}.") from error
    return resolve_template(_load_tokenizer(path, "chat_template_path"))


def _load_tokenizer(path: str, argument: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ModelLoadError(
            f"`{argument}` is `{path}`. It must be a `.jinja` file, a folder with a tokenizer or a model id: {error}"
        ) from error


def clone_chat_template(
    model: Any, tokenizer: Any, source_tokenizer_path: str, resize_to_multiple_of: int | None = 64
) -> tuple[Any, Any, list[int]]:
    """Returns (model, tokenizer, ids of added tokens) after giving the tokenizer another one's chat template.

    Tokens the template needs are added, the end-of-sequence token follows the source, and the embeddings grow to hold
    them, rounded up to `resize_to_multiple_of`; spare rows get placeholder tokens `<extra_id_N>` so that vocabulary
    and embedding agree. Both objects are changed in place, as in TRL's function of this name.
    """
    added = adopt_chat_template(tokenizer, source_tokenizer_path)
    return model, tokenizer, fit_vocabulary(model, tokenizer, added, resize_to_multiple_of)


def adopt_chat_template(processing_class: Any, path: str, argument: str = "source_tokenizer_path") -> list[str]:
    """Gives a tokenizer the chat template of a `.jinja` file, or of another tokenizer with its EOS and added tokens.

    A processor gets the template beside its tokenizer. Returns the tokens that are new. This is the half of
    `clone_chat_template` that needs no model.
    """
    tokenizer = tokenizer_of(processing_class)
    source = None if path.endswith((".jinja", ".j2")) else _load_tokenizer(path, argument)
    template = load_chat_template(path) if source is None else resolve_template(source)
    processing_class.chat_template = tokenizer.chat_template = template
    if source is None:
        return []
    vocabulary = tokenizer.get_vocab()
    added = [token for token in source.added_tokens_decoder.values() if token.content not in vocabulary]
    tokenizer.add_tokens(added)
    tokenizer.eos_token = source.eos_token
    return [token.content for token in added]


def fit_vocabulary(
    model: Any, processing_class: Any, added: list[str], resize_to_multiple_of: int | None = 64
) -> list[int]:
    """Gives `model` rows for the tokenizer's tokens and its EOS; returns the ids of `added` and of the placeholders."""
    from transformers import AddedToken

    tokenizer = tokenizer_of(processing_class)
    added = list(added)
    model.config.get_text_config().eos_token_id = tokenizer.eos_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.resize_token_embeddings(len(tokenizer.get_vocab()), pad_to_multiple_of=resize_to_multiple_of)
    size, number = model.get_input_embeddings().weight.shape[0], 0
    while len(tokenizer.get_vocab()) < size:
        placeholder = AddedToken(f"<extra_id_{number}>")
        if tokenizer.add_tokens(placeholder):
            added.append(placeholder.content)
        number += 1
    return tokenizer.convert_tokens_to_ids(added)


def get_training_chat_template(processing_class: Any, chat_template: str | None = None) -> str | None:
    """Returns a template with `{% generation %}` markers that renders like the given one, or None if it has them.

    Raises `DataFormatError` when the template is too irregular for that; assistant masks are then found by rendering
    prefixes of each row (`spans.py`), so `SFTTrainer` does not need this function to succeed.
    """
    if has_generation_markers(resolve_template(processing_class, chat_template)):
        return None
    found = try_training_template(processing_class, chat_template)
    if found is None:
        raise DataFormatError(
            "The chat template has no `{% generation %}` markers and its text depends on the content or the place of "
            "the messages, so markers cannot be added without changing what it writes. Add them by hand and set "
            "`chat_template_path`."
        )
    return found


def try_training_template(processing_class: Any, chat_template: str | None = None) -> str | None:
    """Returns an equal template with markers, or None if there is none (see `training_templates.py`)."""
    tokenizer = tokenizer_of(processing_class)
    if not getattr(tokenizer, "is_fast", False):
        return None
    original = resolve_template(processing_class, chat_template)

    def token_ends(text: str) -> list[int]:
        pieces = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return [end for _, end in pieces["offset_mapping"]]

    return find_training_template(_render_with(tokenizer, original), token_ends)


def stop_token_ids(processing_class: Any, chat_template: str | None = None) -> set[int]:
    """Returns the ids that end an answer: the tokenizer's EOS and the marker its chat template writes after a turn.

    The marker is the first token after the text of an assistant turn that belongs to the added vocabulary.
    """
    tokenizer = tokenizer_of(processing_class)
    after = _after_answer(processing_class, chat_template, 3)
    if after is None:
        after = _after_answer(processing_class, chat_template, 2) or []
    added = set(tokenizer.get_added_vocab().values())
    return ({tokenizer.eos_token_id} - {None}) | set([token for token in after if token in added][:1])


def leaves_last_answer_open(processing_class: Any, chat_template: str | None = None) -> bool:
    """Returns whether a template ends an answer by the header of the next turn, so that nothing ends the last one.

    GLM-4 is such a family: `<|user|>` is what the model has to say when its answer is complete.
    """
    stops = stop_token_ids(processing_class, chat_template)
    last, inner = (_after_answer(processing_class, chat_template, length) for length in (2, 3))
    return last is not None and stops.isdisjoint(last) and not stops.isdisjoint(inner or [])


def _after_answer(processing_class: Any, chat_template: str | None, num_turns: int) -> list[int] | None:
    """Returns the tokens between an answer and the next user's text, in a conversation of 2 or 3 turns.

    None where there is no template, or it refuses such a conversation.
    """
    tokenizer = tokenizer_of(processing_class)
    turns = [("user", "probe"), ("assistant", "answer#0"), ("user", "user#1")][:num_turns]
    try:
        template = resolve_template(processing_class, chat_template)
        text = _render_with(tokenizer, template)([{"role": role, "content": content} for role, content in turns])
    except Exception:  # some templates refuse a conversation that does not end with an answer
        return None
    after = text.partition("answer#0")[2].partition("user#1")[0]
    return tokenizer(after, add_special_tokens=False)["input_ids"]


def is_chat_template_stop_token_trained(processing_class: Any, chat_template: str | None = None) -> bool:
    """Returns whether the `{% generation %}` blocks of a template reach the token that ends an assistant turn.

    Rendered is an answer followed by another question; the last marked token that is not white space must be one of
    `stop_token_ids`. A template without markers gives False. Same question as TRL's function of this name.
    """
    tokenizer = tokenizer_of(processing_class)
    template = resolve_template(processing_class, chat_template)
    if not has_generation_markers(template):
        return False
    turns = [("user", "probe"), ("assistant", "answer"), ("user", "probe")]
    try:
        encoded = tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in turns],
            chat_template=template,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
    except Exception:  # a template that refuses the probe cannot be checked here; the audit checks the rows
        return False
    marked = [i for i, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    stops = stop_token_ids(processing_class, template)
    return next((i in stops for i in reversed(marked) if tokenizer.decode([i]).strip()), False)


def _render_with(tokenizer: Any, original: str) -> Callable[..., str]:
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(messages: list[dict[str, str]], add_generation_prompt: bool = False, template: str | None = None) -> str:
        texts, _ = render_jinja_template(
            conversations=[messages],  # pyright: ignore[reportArgumentType]
            chat_template=template or original,
            add_generation_prompt=add_generation_prompt,
            **tokenizer.special_tokens_map,
        )
        return texts[0]

    return render
