"""One batch of rows through the whole preparation: format, template, tokens, masks, labels, truncation."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from finetune.compat import tokenizer_of
from finetune.data.chat.messages import parse_json_column
from finetune.data.chat.spans import ChatRenderer, RenderedBatch
from finetune.data.chat.templates import leaves_last_answer_open, stop_token_ids, try_training_template
from finetune.data.preparation.encoder import Encoder
from finetune.data.preparation.formats import (
    Columns,
    Kind,
    RowFormat,
    detect_format,
    read_conversations,
    read_texts,
)
from finetune.data.preparation.formatting import apply_formatting, formatted_row
from finetune.data.preparation.labels import LabelledBatch, StopTokens, join_labelled, label_batch
from finetune.data.preparation.pretokenized import read_tokenized
from finetune.data.preparation.settings import DataSettings
from finetune.data.preparation.tokenize import TokenBatch, tokenize_pairs, tokenize_plain, tokenize_spans
from finetune.data.rows import WEIGHTS, Conversations
from finetune.errors import DataFormatError

# Rows that are worked on together; while they are in the tokenizer, the next ones are rendered.
_PART = 250


class BatchProcessor:
    """Turns batches of raw rows of one dataset into `LabelledBatch`es. Built once per split from its first row.

    `weighted` gives every token a weight (`token_weights`), for conversations whose turns have weights other than 0 and
    1; None: if the first row has any `weight`. Tokenized rows bring theirs.

    Raises `DataFormatError` when the rows cannot be what the settings ask for (messages for `assistant_only_loss`,
    completions for `completion_only_loss`), before any work is done.
    """

    def __init__(
        self,
        processing_class: Any,
        settings: DataSettings,
        first_row: Mapping[str, Any],
        name: str = "train",
        *,
        weighted: bool | None = None,
    ) -> None:
        self.tokenizer = tokenizer_of(processing_class)
        self.settings = settings
        self.name = name
        self.formats = settings.formatting_func is not None and "input_ids" not in first_row
        row, field = formatted_row(first_row, settings.formatting_func, settings.dataset_text_field)
        self.format: RowFormat = detect_format(row, field, name)
        self._first_keys = tuple(row)
        self._check_row(row)
        self.assistant_only = settings.assistant_only_loss or self._has_flags(row, ("train", "weight"))
        self.completion_only = self.format.masks_prompt(row, settings.completion_only_loss)
        if weighted is None or self.formats:
            weighted = self._has_flags(row, ("weight",))
        self.weighted = WEIGHTS in row if self.format.has_tokens else weighted and self.format.is_chat
        self.encoder = Encoder(self.tokenizer)
        template = settings.chat_template
        self.stop_ids = stop_token_ids(processing_class, template)
        self._stops = StopTokens(self.tokenizer, self.stop_ids)
        self.renderer: ChatRenderer | None = None
        if self.format.is_chat:
            self._ends_answers = not leaves_last_answer_open(processing_class, template)
            training = try_training_template(processing_class, template) if self.assistant_only else None
            self.renderer = ChatRenderer(processing_class, template, training, name=name)
        else:
            self._eos = self._resolve_eos()

    @property
    def mask_method(self) -> str:
        """How the trained tokens are chosen: `all`, `completion`, `given` (with the rows), or how turns are found."""
        if self.format.has_tokens:
            return "given"
        if self.assistant_only and self.renderer is not None:
            return f"assistant turns by {self.renderer.method}" + (", weighted" if self.weighted else "")
        return "completion" if self.completion_only else "all"

    def process(self, batch: Columns, rows: Sequence[int], *, truncate: bool = True) -> LabelledBatch:
        """Returns the labelled tokens of rows with the given indices; `truncate=False` leaves them whole."""
        if self.formats:
            assert self.settings.formatting_func is not None
            batch = apply_formatting(batch, rows, self.settings.formatting_func, self._first_keys)
        parts = [slice(start, start + _PART) for start in range(0, len(rows), _PART)]
        try:
            made = self.encoder.in_turns(lambda part: self._process(_Rows(batch, part), rows[part], truncate), parts)
        except (TypeError, UnicodeEncodeError) as error:
            self._require_unicode(batch, rows, error)
            raise
        return join_labelled(made) if len(made) > 1 else made[0]

    def _require_unicode(self, batch: Columns, rows: Sequence[int], error: Exception) -> None:
        """Raises `DataFormatError` naming the first row with half a surrogate pair, which no tokenizer takes."""
        for position, row in enumerate(rows):
            values = [column[position] for column in batch.values()]
            try:
                json.dumps(values, ensure_ascii=False, default=str).encode()
            except UnicodeEncodeError as found:
                raise DataFormatError(
                    f"Row {row} of the {self.name} dataset holds text that is not Unicode (half of a surrogate pair): "
                    f"{found.reason}. Repair or remove it."
                ) from error

    def _process(self, batch: Columns, rows: Sequence[int], truncate: bool) -> LabelledBatch:
        expects_stop: np.ndarray | bool = self.settings.append_eos
        if self.format.has_tokens:
            tokens = read_tokenized(batch, rows, self.tokenizer, self.name)
            expects_stop = False
        elif self.format.kind is Kind.TEXT:
            texts = [self._with_eos(text) for text in read_texts(batch, self.format.column, rows, self.name)]
            tokens = tokenize_plain(self.encoder, texts, special=self.settings.add_special_tokens)
        elif self.format.kind is Kind.PROMPT_COMPLETION:
            tokens = self._tokenize_completions(batch, rows)
        elif self.format.kind is Kind.CHAT:
            tokens, expects_stop = self._tokenize_chats(batch, rows)
        else:
            tokens, expects_stop = self._tokenize_chat_completions(batch, rows)
        limit = self.settings.max_length if truncate and self.settings.truncate else None
        return label_batch(
            tokens,
            completion_only=self.completion_only,
            max_length=limit,
            truncation_mode=self.settings.truncation_mode,
            stop_tokens=self._stops,
            expects_stop=expects_stop,
        )

    def _tokenize_completions(self, batch: Columns, rows: Sequence[int]) -> TokenBatch:
        prompts = read_texts(batch, "prompt", rows, self.name)
        completions = read_texts(batch, "completion", rows, self.name)
        texts = [prompt + self._with_eos(answer) for prompt, answer in zip(prompts, completions, strict=True)]
        return tokenize_pairs(self.encoder, prompts, texts, special=self.settings.add_special_tokens)

    def _tokenize_chats(self, batch: Columns, rows: Sequence[int]) -> tuple[TokenBatch, np.ndarray]:
        assert self.renderer is not None
        chats, ends = self._read_chats(batch, self.format.column, rows)
        if not self.assistant_only:
            return tokenize_plain(self.encoder, self.renderer.render(chats, rows), special=False), ends
        rendered = self.renderer.render_with_spans(chats, rows)
        weights = self._weights(rendered, rows)
        return tokenize_spans(self.encoder, rendered.texts, rendered.spans, weights), ends

    def _tokenize_chat_completions(self, batch: Columns, rows: Sequence[int]) -> tuple[TokenBatch, np.ndarray]:
        assert self.renderer is not None
        prompts = read_conversations(batch, "prompt", rows, self.name)
        chats, ends = self._read_chats(batch, ("prompt", "completion"), rows)
        prompt_texts = self.renderer.render(prompts, rows, add_generation_prompt=True)
        if not self.assistant_only:
            texts, spans, weights = self.renderer.render(chats, rows), None, None
        else:
            rendered = self.renderer.render_with_spans(chats, rows)
            texts, spans, weights = rendered.texts, rendered.spans, self._weights(rendered, rows)
        return tokenize_pairs(self.encoder, prompt_texts, texts, special=False, spans=spans, weights=weights), ends

    def _read_chats(
        self, batch: Columns, columns: str | tuple[str, ...], rows: Sequence[int]
    ) -> tuple[Conversations, np.ndarray]:
        """Returns conversations, and (B,) bool: the last message is a trained answer, after which an end is written."""
        chats = read_conversations(batch, columns, rows, self.name)
        flagged = next((row for row, train in zip(rows, chats.train, strict=True) if train is not None), None)
        if flagged is not None and not self.assistant_only:
            raise DataFormatError(
                f"Row {flagged} of the {self.name} dataset sets `train`/`weight` in its messages, and the first row "
                "does not. Set `assistant_only_loss=True`, or give every row these keys."
            )
        ends = [
            messages[-1]["role"] == "assistant" and self._ends_answers and bool(train[-1] if train else True)
            for messages, train in zip(chats.messages, chats.train, strict=True)
        ]
        return chats, np.array(ends, bool)

    def _weights(self, rendered: RenderedBatch, rows: Sequence[int]) -> list[list[float]] | None:
        if self.weighted:
            return rendered.weights
        for row, weights in zip(rows, rendered.weights, strict=True):
            if any(weight != 1 for weight in weights):
                raise DataFormatError(
                    f"Row {row} of the {self.name} dataset has a `weight` other than 0 and 1, and the rows before it "
                    "gave no sign of that. Put a row with such a weight first."
                )
        return None

    def _with_eos(self, text: str) -> str:
        return text if text.endswith(self._eos) else text + self._eos

    def _resolve_eos(self) -> str:
        if self.format.has_tokens or not self.settings.append_eos:
            return ""
        eos = self.tokenizer.eos_token
        if eos is None:
            raise DataFormatError(
                "The tokenizer has no end-of-sequence token, so the model could not learn to stop. Set `eos_token` to "
                "a token of its vocabulary."
            )
        # A tokenizer that adds EOS itself would end the row with two.
        ids = self.tokenizer("a", add_special_tokens=self.settings.add_special_tokens)["input_ids"]
        adds_eos = len(ids) > 1 and ids[-1] == self.tokenizer.convert_tokens_to_ids(eos)
        return "" if adds_eos else eos

    def _check_row(self, row: Mapping[str, Any]) -> None:
        settings, found = self.settings, self.format.describe(list(row))
        if settings.assistant_only_loss and not self.format.can_mask_turns(row):
            raise DataFormatError(
                f"`assistant_only_loss=True` needs conversations, but the {self.name} dataset has {found}. Set "
                "`assistant_only_loss=False`, or give the rows `messages`."
            )
        if settings.completion_only_loss and not self.format.can_mask_prompt(row):
            raise DataFormatError(
                f"`completion_only_loss=True` needs `prompt` and `completion` (or a `completion_mask`), but the "
                f"{self.name} dataset has {found}. Set `completion_only_loss=None`, or use `assistant_only_loss=True` "
                "for conversations."
            )

    def _has_flags(self, row: Mapping[str, Any], flags: tuple[str, ...]) -> bool:
        """Returns whether any message of a row has one of these keys."""
        if not self.format.is_chat:
            return False
        columns = ("prompt", "completion") if self.format.has_completion else (self.format.column,)
        chats = [parse_json_column(row[c], c, f"row 0 of the {self.name} dataset") for c in columns]
        messages = [message for chat in chats if isinstance(chat, (list, tuple)) for message in chat]
        return any(isinstance(message, Mapping) and any(flag in message for flag in flags) for message in messages)


class _Rows(Mapping[str, Sequence[Any]]):
    """A slice of the rows of a batch; a column is read when it is asked for."""

    def __init__(self, batch: Columns, rows: slice) -> None:
        self._batch, self._rows = batch, rows

    def __getitem__(self, column: str) -> Sequence[Any]:
        return self._batch[column][self._rows]

    def __iter__(self) -> Iterator[str]:
        return iter(self._batch)

    def __len__(self) -> int:
        return len(self._batch)
