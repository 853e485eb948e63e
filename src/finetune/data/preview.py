"""What a user sees of the data before the first step: rows as the model is trained on them, and the audit.

Each row shows what is trained, what is only context, and what `max_length` cuts off.
"""

import html
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from finetune.data.preparation.audit import SupervisionAudit
from finetune.data.preparation.batches import BatchProcessor
from finetune.data.preparation.labels import truncate
from finetune.data.preparation.settings import DataSettings
from finetune.data.preparation.tokenize import NOTHING_TRAINED, TokenBatch
from finetune.data.rows import IGNORE_INDEX
from finetune.data.sources import first_row, is_iterable_dataset, plain_rows
from finetune.files import write_atomically

State = Literal["trained", "not trained", "truncated"]

_ANSI = {"trained": "\033[32m", "not trained": "\033[90m", "truncated": "\033[9;31m", "boundary": "\033[1;33m"}
_PLAIN = {"trained": ("«", "»"), "not trained": ("", ""), "truncated": ("~~", "~~")}
_RESET = "\033[0m"
_BOUNDARY = "┃"
_CSS = """body{font:14px/1.5 system-ui,sans-serif;margin:2em;max-width:70em}
pre{white-space:pre-wrap;word-break:break-word;padding:1em;border:1px solid #8884;border-radius:6px}
.trained{background:#2da44e33;color:#116329}.not{color:#777}
.truncated{color:#cf222e;text-decoration:line-through}.boundary{color:#bf8700;font-weight:bold}
@media(prefers-color-scheme:dark){body{background:#111;color:#ddd}.trained{color:#56d364}}"""

# Characters of a preview on the terminal; the page in the run folder shows all of it.
_SHOWN = 4000
AUDIT_FILE, PREVIEW_FILE = "data_audit.json", "data_preview.html"


@dataclass(frozen=True)
class Piece:
    """A run of tokens in one state; `completion_starts` says that the completion begins with it."""

    text: str
    state: State
    num_tokens: int
    completion_starts: bool = False


@dataclass(frozen=True)
class PreviewRow:
    """One row cut into pieces. `dropped` says that nothing of it is trained, so it is left out."""

    index: int
    pieces: tuple[Piece, ...]
    dropped: bool

    def count(self, state: State) -> int:
        """Returns the number of tokens in a state."""
        return sum(piece.num_tokens for piece in self.pieces if piece.state == state)

    def describe(self) -> str:
        """Returns the line above the row, for instance ``row 0: 24 tokens, 4 trained, 0 truncated``."""
        total = sum(piece.num_tokens for piece in self.pieces)
        line = f"row {self.index}: {total} tokens, {self.count('trained')} trained, {self.count('truncated')} truncated"
        return line + (" (left out: nothing to learn)" if self.dropped else "")


@dataclass(frozen=True)
class Preview:
    """The first rows of a split, to print (`to_terminal`) or to write to the run folder (`to_html`)."""

    name: str
    format: str
    mask_method: str
    rows: tuple[PreviewRow, ...]

    def to_terminal(self, *, color: bool = True) -> str:
        """Returns the rows as text: green trained, grey not trained, red struck out truncated, a yellow bar where the
        completion begins. Without color, trained text stands in «», truncated text in ~~."""
        lines = [f"{self.name}: {self.format}, trained: {self.mask_method}", _legend(color)]
        for row in self.rows:
            lines += [row.describe(), "".join(_in_terminal(piece, color) for piece in row.pieces)]
        return "\n".join(lines)

    def to_html(self) -> str:
        """Returns a page that needs no other file."""
        title = html.escape(f"{self.name}: {self.format}, trained: {self.mask_method}")
        rows = "".join(
            f"<h3>{html.escape(row.describe())}</h3><pre>{''.join(_in_html(piece) for piece in row.pieces)}</pre>"
            for row in self.rows
        )
        legend = (
            '<p><span class="trained">trained</span> <span class="not">context</span> '
            f'<span class="truncated">truncated</span> <span class="boundary">{_BOUNDARY}</span> completion starts</p>'
        )
        return (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_CSS}</style>'
            f"<h2>{title}</h2>{legend}{rows}</html>\n"
        )


def preview(
    dataset: Any, processing_class: Any, settings: DataSettings, *, num_rows: int = 2, name: str = "train"
) -> Preview:
    """Returns the first `num_rows` rows of a raw or prepared dataset or stream, as training would see them.

    Raises `DataFormatError` like `prepare_split`.
    """
    is_stream = is_iterable_dataset(dataset)
    if not is_stream:
        dataset = plain_rows(dataset, name)
    processor = BatchProcessor(processing_class, settings, first_row(dataset, name), name)
    raw = list(dataset.take(num_rows) if is_stream else dataset.select(range(min(num_rows, len(dataset)))))
    batch = {column: [row.get(column) for row in raw] for column in raw[0]}
    indices = list(range(len(raw)))
    whole = processor.process(batch, indices, truncate=False).tokens
    limit = settings.max_length if settings.truncate else None
    kept = _kept(whole, limit, settings)
    dropped = (processor.process(batch, indices).tokens.flags & NOTHING_TRAINED) != 0
    rows = tuple(_preview_row(processor.tokenizer, whole, kept, i, bool(dropped[i])) for i in indices)
    return Preview(name, processor.format.kind.value, processor.mask_method, rows)


def show(preview: Preview | None, audits: dict[str, SupervisionAudit]) -> None:
    """Prints two rows and the audit table to standard error."""
    if preview is not None:
        text = preview.to_terminal(color=sys.stderr.isatty())
        cut = f" ...\n(the whole rows are in {PREVIEW_FILE})" if len(text) > _SHOWN else ""
        print(text[:_SHOWN] + (_RESET if cut and sys.stderr.isatty() else "") + cut, file=sys.stderr)
    if audits:
        print(audit_table(audits), file=sys.stderr, flush=True)


def write(folder: str, preview: Preview | None, audits: dict[str, SupervisionAudit]) -> None:
    """Writes the audit and the preview into the run folder."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    if audits:
        content = {name: audit.to_dict() for name, audit in audits.items()}
        write_atomically(target / AUDIT_FILE, json.dumps(content, indent=2) + "\n")
    if preview is not None:
        write_atomically(target / PREVIEW_FILE, preview.to_html())


def _kept(whole: TokenBatch, limit: int | None, settings: DataSettings) -> np.ndarray:
    """Returns (N,) bool: the tokens that truncation leaves."""
    if limit is None:
        return np.ones(len(whole.ids), bool)
    numbered = TokenBatch(np.arange(len(whole.ids)), whole.offsets)
    kept = np.zeros(len(whole.ids), bool)
    kept[truncate(numbered, limit, settings.truncation_mode).ids] = True
    return kept


def _preview_row(tokenizer: Any, batch: TokenBatch, kept: np.ndarray, i: int, dropped: bool) -> PreviewRow:
    assert batch.labels is not None
    start, end = int(batch.offsets[i]), int(batch.offsets[i + 1])
    ids = batch.ids[start:end].tolist()
    states = np.where(batch.labels[start:end] != IGNORE_INDEX, "trained", "not trained")
    states = np.where(kept[start:end], states, "truncated")
    # The first token that is left is read only: nothing stands before it that could predict it.
    states[np.flatnonzero(kept[start:end])[:1]] = "not trained"
    border = -1
    if batch.completion_mask is not None and batch.completion_mask[start:end].any():
        border = int(batch.completion_mask[start:end].argmax())
    cuts = [0, *(np.flatnonzero(states[1:] != states[:-1]) + 1).tolist(), len(ids)]
    cuts = sorted({*cuts, border} - {-1})
    texts = _texts(tokenizer, ids, cuts)
    pieces = [
        Piece(text, states[a].item(), b - a, completion_starts=a == border)
        for text, a, b in zip(texts, cuts[:-1], cuts[1:], strict=True)
    ]
    return PreviewRow(i, tuple(pieces), dropped)


def _texts(tokenizer: Any, ids: list[int], cuts: Sequence[int]) -> list[str]:
    # Decoding a run alone can lose its leading space, so each is what it adds to the text before it.
    decoded = [tokenizer.decode(ids[:cut], clean_up_tokenization_spaces=False) for cut in cuts]
    return [after[len(before) :] for before, after in itertools.pairwise(decoded)]


def _legend(color: bool) -> str:
    if not color:
        return f"«trained», ~~truncated~~, the rest is context, {_BOUNDARY} completion starts"
    names = {"trained": "green: trained", "not trained": "grey: context", "truncated": "red: truncated"}
    shown = [f"{_ANSI[state]}{text}{_RESET}" for state, text in names.items()]
    return ", ".join([*shown, f"{_ANSI['boundary']}{_BOUNDARY}{_RESET} completion starts"])


def _in_terminal(piece: Piece, color: bool) -> str:
    lines = [_visible(line) for line in piece.text.split("\n")]
    if not color:
        left, right = _PLAIN[piece.state]
        return (_BOUNDARY if piece.completion_starts else "") + left + "\n".join(lines) + right
    bar = f"{_ANSI['boundary']}{_BOUNDARY}{_RESET}" if piece.completion_starts else ""
    # Each line is coloured by itself: pagers lose a colour at the end of a line.
    return bar + "\n".join(f"{_ANSI[piece.state]}{line}{_RESET}" for line in lines)


def _in_html(piece: Piece) -> str:
    bar = f'<span class="boundary">{_BOUNDARY}</span>' if piece.completion_starts else ""
    return f'{bar}<span class="{piece.state.split()[0]}">{html.escape(piece.text)}</span>'


def _visible(text: str) -> str:
    # A control character of the data must not steer the terminal.
    return "".join(c if c.isprintable() or c == "\t" else repr(c)[1:-1] for c in text)


def audit_table(audits: Mapping[str, SupervisionAudit]) -> str:
    """Returns one table with a column per split, followed by the warnings of each, ready to print.

    Defects that no split has get no row.
    """
    splits = list(audits.values())
    rows: list[tuple[str, list[str]]] = [
        ("rows", [f"{a.num_rows:,}" + (" (the first)" if a.sampled else "") for a in splits]),
        ("read as", [a.format for a in splits]),
        ("trained tokens chosen by", [a.mask_method for a in splits]),
        ("tokens", [f"{a.num_tokens:,}" for a in splits]),
        ("trained tokens", [f"{a.num_supervised:,} ({a.supervised_share:.1%})" for a in splits]),
        ("rows left out (nothing to learn)", [f"{a.num_dropped:,}" for a in splits]),
        ("rows truncated", [f"{a.num_truncated:,}" for a in splits]),
        ("tokens lost", [f"{a.num_source_tokens - a.num_tokens:,} ({a.lost_share:.1%})" for a in splits]),
        ("stop token trained", ["-" if a.stop_share is None else f"{a.stop_share:.1%} of rows" for a in splits]),
        *_defects(splits),
        ("packing", ["-" if a.packing_efficiency is None else f"{a.packing_efficiency:.1%} full" for a in splits]),
    ]
    label_width = max(len(label) for label, _ in rows)
    widths = [max(len(name), *(len(cells[i]) for _, cells in rows)) for i, name in enumerate(audits)]
    header = " ".join([" " * label_width, *(name.rjust(width) for name, width in zip(audits, widths, strict=True))])
    lines = ["Data audit", header]
    for label, cells in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        lines.append(" ".join([label.ljust(label_width), *padded]))
    lines += [f"{name}: {warning}" for name, split in audits.items() for warning in split.warnings()]
    return "\n".join(lines)


def _defects(splits: Sequence[SupervisionAudit]) -> list[tuple[str, list[str]]]:
    """Returns the rows of the table for what hardly any dataset has; the warnings explain each."""
    counts = [
        ("rows with two BOS tokens", [a.num_doubled_bos for a in splits]),
        ("prompt and completion share a token", [a.num_boundary_mismatches for a in splits]),
        ("prompt differs without completion", [a.num_template_drift for a in splits]),
    ]
    return [(label, [f"{number:,}" for number in numbers]) for label, numbers in counts if any(numbers)]
