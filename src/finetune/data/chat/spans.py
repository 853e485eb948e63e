"""Where the assistant's turns lie in a rendered conversation, in characters.

A span [start, end) covers what the model has to generate for one assistant message: the text after the generation
prompt up to and including the end-of-turn marker. Three ways to find the spans, in this order:

- *markers*: the template has `{% generation %}` blocks, so jinja reports them while rendering.
- *training template*: `training_templates.py` has an equal template with markers. It is used on a row only if both
  templates render that row to the same characters.
- *prefixes*: render parts and variants of the conversation (`span_search.py`). A row whose spans cannot be proved right
  is an error.

Worked example (`<u>`, `<a>`, `<e>` are markers of a template): for user "Hi", assistant "Yo" the text is
`<u>Hi<e><a>Yo<e>`. Before the turn, with the generation prompt: `<u>Hi<e><a>`, length 11. So the span is [11, 16),
"Yo<e>".
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.compat import tokenizer_of
from finetune.data.chat.span_search import Messages, Span, TurnsNotFoundError, find_spans
from finetune.data.rows import Conversations
from finetune.errors import DataFormatError


@dataclass(frozen=True)
class RenderedBatch:
    """Rendered conversations; `spans[i]` are the trained character ranges of row i, and `weights[i]` their weights."""

    texts: list[str]
    spans: list[list[Span]]
    weights: list[list[float]]


class ChatRenderer:
    """Renders batches of conversations with one chat template and finds their assistant spans.

    `processing_class`, a tokenizer or a processor around one, provides the special tokens and, when `template` is None,
    the template: a processor its own if it has one. `training_template` is an equal template with `{% generation %}`
    markers, or None.
    """

    def __init__(
        self,
        processing_class: Any,
        template: str | None = None,
        training_template: str | None = None,
        template_kwargs: dict[str, Any] | None = None,
        name: str = "train",
    ) -> None:
        from finetune.data.chat.templates import has_generation_markers, resolve_template

        self.tokenizer = tokenizer_of(processing_class)
        self.name = name
        self.template = resolve_template(processing_class, template)
        self.tool_template = resolve_template(processing_class, template, tools=True)
        self.training_template = training_template
        self.template_kwargs = {**self.tokenizer.special_tokens_map, **(template_kwargs or {})}
        self.has_markers = has_generation_markers(self.template)

    @property
    def method(self) -> str:
        """`markers`, `training template` or `prefixes`: how the spans are found."""
        if self.has_markers:
            return "markers"
        return "training template" if self.training_template else "prefixes"

    def render(self, batch: Conversations, rows: Sequence[int], *, add_generation_prompt: bool = False) -> list[str]:
        """Returns the text of each conversation. Raises `DataFormatError` naming the row a template refuses."""
        texts, _ = self._render(batch, rows, add_generation_prompt=add_generation_prompt)
        return texts

    def render_with_spans(self, batch: Conversations, rows: Sequence[int]) -> RenderedBatch:
        """Returns the texts and, per row, the spans of the assistant turns that are trained.

        Raises `DataFormatError` for a row whose spans cannot be found and verified.
        """
        if self.has_markers:
            texts, found = self._render(batch, rows, markers=True)
            spans = [self._marked_spans(batch, i, rows[i], found[i]) for i in range(len(texts))]
        else:
            texts, _ = self._render(batch, rows)
            spans = self._spans_without_markers(batch, rows, texts)
        weights = [train or [1.0] * len(row_spans) for train, row_spans in zip(batch.train, spans, strict=True)]
        trained = [_nonzero(row_spans, row_weights) for row_spans, row_weights in zip(spans, weights, strict=True)]
        return RenderedBatch(texts, trained, [[weight for weight in row if weight] for row in weights])

    def _spans_without_markers(self, batch: Conversations, rows: Sequence[int], texts: list[str]) -> list[list[Span]]:
        marked: list[str | None] = [None] * len(texts)
        found: list[list[Span]] = [[] for _ in texts]
        if self.training_template is not None:
            marked, found = self._try_training_template(batch)
        spans = []
        for i, text in enumerate(texts):
            count = sum(message["role"] == "assistant" for message in batch.messages[i])
            row_spans = _merge_adjacent(found[i])
            if marked[i] != text or len(row_spans) != count:
                row_spans = self._spans_by_prefixes(batch, i, rows[i], text)
            spans.append(row_spans)
        return spans

    def _try_training_template(self, batch: Conversations) -> tuple[list[str | None], list[list[Span]]]:
        def leave_out(i: int, error: Exception) -> tuple[str | None, list[Span]]:
            return None, []  # a row outside what the training template models goes to the prefix method

        return self._render_rows(batch, leave_out, template=self.training_template, markers=True)

    def _marked_spans(self, batch: Conversations, i: int, row: int, found: list[Span]) -> list[Span]:
        spans = _merge_adjacent([span for span in found if span[1] > span[0]])
        turns = sum(message["role"] == "assistant" for message in batch.messages[i])
        if turns and not spans:
            raise DataFormatError(
                f"Row {row} of the {self.name} dataset has {turns} assistant messages, but the chat template marks "
                "none of their text with `{% generation %}`. Correct the template (`chat_template_path`), or set "
                "`assistant_only_loss=False`."
            )
        if batch.train[i] is not None and len(spans) != turns:
            raise DataFormatError(
                f"Row {row} of the {self.name} dataset sets `train`/`weight` per message, but its {turns} assistant "
                f"messages have {len(spans)} `{{% generation %}}` blocks, so they cannot be told apart. Give the "
                "template (`chat_template_path`) one block per assistant message."
            )
        return spans

    def _spans_by_prefixes(self, batch: Conversations, i: int, row: int, text: str) -> list[Span]:
        def render(messages: Messages, add_generation_prompt: bool = False) -> str:
            return self._render_one(batch, i, messages=messages, add_generation_prompt=add_generation_prompt)[0]

        try:
            return find_spans(text, batch.messages[i], render, self._token_ends)
        except Exception as error:
            # Templates raise whatever they like when they are given a part of a conversation.
            found = isinstance(error, TurnsNotFoundError)
            problem = str(error) if found else f"the template refuses a part of it alone: {error}"
            raise DataFormatError(
                f"Row {row} of the {self.name} dataset: the assistant turns cannot be told from the rest of the "
                f"conversation ({problem}). The chat template has no `{{% generation %}}` markers and writes earlier "
                "turns differently once later ones follow. Pass a template with markers (`chat_template_path`), or "
                "set `assistant_only_loss=False`."
            ) from error

    def _token_ends(self, text: str) -> list[int]:
        pieces = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return [end for _, end in pieces["offset_mapping"]]

    def _render(
        self, batch: Conversations, rows: Sequence[int], *, markers: bool = False, add_generation_prompt: bool = False
    ) -> tuple[list[str], list[list[Span]]]:
        def refuse(i: int, error: Exception) -> tuple[str, list[Span]]:
            raise DataFormatError(
                f"Row {rows[i]} of the {self.name} dataset: the chat template refuses the conversation with the "
                f"roles {[m['role'] for m in batch.messages[i]]}: {type(error).__name__}: {error}. Repair the "
                "row, or pass another template (`chat_template_path`)."
            ) from error

        return self._render_rows(batch, refuse, markers=markers, add_generation_prompt=add_generation_prompt)

    def _render_rows(
        self, batch: Conversations, refused: Callable[[int, Exception], tuple[Any, list[Span]]], **options: Any
    ) -> tuple[list[Any], list[list[Span]]]:
        """Returns the text of each conversation and, with `markers`, the spans its template marks.

        `options` are those of `_render_one`. `refused(i, error)` gives what stands for a conversation that the template
        refuses, or raises.
        """
        if not any(batch.tools) and not any(batch.template_kwargs):
            try:
                return self._render_all(batch.messages, **options)
            except Exception:
                # Templates raise whatever they like, and one conversation stops the whole batch: rendered one by one,
                # each has its own result or error.
                pass
        texts: list[Any] = []
        spans: list[list[Span]] = []
        for i in range(len(batch.messages)):
            try:
                text, found = self._render_one(batch, i, **options)
            except Exception as error:
                text, found = refused(i, error)
            texts.append(text)
            spans.append(found)
        return texts, spans

    def _render_one(
        self,
        batch: Conversations,
        i: int,
        *,
        messages: Messages | None = None,
        template: str | None = None,
        markers: bool = False,
        add_generation_prompt: bool = False,
    ) -> tuple[str, list[Span]]:
        tools = batch.tools[i]
        texts, spans = self._render_all(
            [list(messages if messages is not None else batch.messages[i])],
            template=template or (self.tool_template if tools else self.template),
            markers=markers,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            own_kwargs=batch.template_kwargs[i],
        )
        return texts[0], (list(spans[0]) if markers else [])

    def _render_all(
        self,
        conversations: list[list[dict[str, Any]]],
        *,
        template: str | None = None,
        markers: bool = False,
        add_generation_prompt: bool = False,
        tools: list[Any] | None = None,
        own_kwargs: dict[str, Any] | None = None,
    ) -> tuple[list[str], list[list[Span]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        return render_jinja_template(  # pyright: ignore[reportReturnType]
            conversations=conversations,
            tools=tools,
            chat_template=template or self.template,
            return_assistant_tokens_mask=markers,
            add_generation_prompt=add_generation_prompt,
            **{**self.template_kwargs, **(own_kwargs or {})},
        )


def _merge_adjacent(spans: Sequence[Span]) -> list[Span]:
    merged: list[Span] = []
    for start, end in spans:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged


def _nonzero(spans: list[Span], weights: list[float]) -> list[Span]:
    return [span for span, weight in zip(spans, weights, strict=True) if weight]
