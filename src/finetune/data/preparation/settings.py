"""What the data pipeline is asked to do, as one frozen value."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from finetune.errors import ArgumentError

PIPELINE_VERSION = 4
"""Part of the cache key: raise it whenever the same rows and settings give other tokens, labels or counts.

Packed rows too: `datasets` finds them again by the key of the rows that were packed.
"""


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """How rows become tokens and labels; the names are those of TRL's `SFTConfig` where it has them.

    Attributes:
        dataset_text_field: column with the text of plain-text rows.
        max_length: tokens per row at most; None: no limit.
        truncation_mode: which part of a longer row stays, `keep_start` or `keep_end`.
        truncate: False leaves long rows whole, for `packing_strategy` `bfd_split` and `wrapped`, which cut themselves.
        completion_only_loss: train the completion alone; None: yes where rows have one (or a `completion_mask`).
        assistant_only_loss: train the assistant's turns alone. Rows with `train`/`weight` in a message imply it.
        add_special_tokens: False keeps the tokenizer from adding its own (BOS) to text and prompt-completion rows.
        append_eos: False ends text and prompt-completion rows without an end-of-sequence token.
        chat_template: template text in place of the tokenizer's own.
        formatting_func: makes text, messages or a row from each row before anything else.
        keep_columns: columns passed on beside the tokens, or "all".
        keep_untrained: rows without a supervised token stay, if they have tokens: for predictions.
        num_proc: worker processes for map-style datasets. Tokenizers use several threads in one process already,
            so this pays only where rendering chat templates dominates.
        batch_size: rows per call of the tokenizer.
        cache_dir: folder for the prepared rows of datasets that live in memory (others are cached beside their files).
        stall_seconds: a worker without progress for so long is reported with its stack, and the work is done again in
            this process. 0: wait forever.
    """

    dataset_text_field: str = "text"
    max_length: int | None = 1024
    truncation_mode: Literal["keep_start", "keep_end"] = "keep_start"
    truncate: bool = True
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False
    add_special_tokens: bool = True
    append_eos: bool = True
    chat_template: str | None = None
    formatting_func: Callable[[dict[str, Any]], Any] | None = None
    keep_columns: tuple[str, ...] | Literal["all"] = ()
    keep_untrained: bool = False
    num_proc: int | None = None
    batch_size: int = 1000
    cache_dir: str | None = None
    stall_seconds: float = 300.0

    def __post_init__(self) -> None:
        if self.truncation_mode not in ("keep_start", "keep_end"):
            raise ArgumentError(f"`truncation_mode` is {self.truncation_mode!r}. Allowed: 'keep_start' and 'keep_end'.")
        if self.max_length is not None and self.max_length < 1:
            raise ArgumentError(f"`max_length` is {self.max_length}. Allowed: a positive number of tokens, or None.")
        if self.batch_size < 1:
            raise ArgumentError(f"`batch_size` is {self.batch_size}. Allowed: a positive number of rows.")

    @classmethod
    def from_args(cls, args: Any, *, packing: bool | None = None, **overrides: Any) -> "DataSettings":
        """Returns the settings of an `SFTConfig`; `packing` is this split's (`eval_packing` for evaluation)."""
        packing = bool(args.packing) if packing is None else packing
        options = args.dataset_kwargs if isinstance(args.dataset_kwargs, Mapping) else {}
        values: dict[str, Any] = {
            "dataset_text_field": args.dataset_text_field,
            "max_length": args.max_length,
            "truncation_mode": args.truncation_mode,
            "truncate": not packing or args.packing_strategy == "bfd",
            "completion_only_loss": args.completion_only_loss,
            "assistant_only_loss": bool(args.assistant_only_loss),
            "add_special_tokens": bool(options.get("add_special_tokens", True)),
            "append_eos": bool(options.get("append_concat_token", True)),
            "num_proc": args.dataset_num_proc,
            "keep_columns": () if args.remove_unused_columns or packing else "all",
        }
        return cls(**{**values, **overrides})

    def cache_key(self) -> dict[str, Any]:
        """Returns the settings that decide the result; the others (processes, batch size, folders) do not."""
        values = asdict(self)
        for name in ("num_proc", "batch_size", "cache_dir", "stall_seconds", "formatting_func", "keep_untrained"):
            del values[name]
        return values
