"""`SFTConfig`: the training arguments and those of supervised fine-tuning, with TRL's names and defaults."""

# ruff: noqa: RUF009

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

from finetune import environment
from finetune.arguments import ArgumentGroup, TrainingArguments, arg
from finetune.arguments.base import Translation, require, require_choice, require_positive
from finetune.arguments.old_names import without_effect
from finetune.arguments.performance import accelerator_present, best_precision

PACKING_STRATEGIES = ["bfd", "bfd_split", "wrapped"]
LOSS_TYPES = ["nll", "dft", "chunked_nll"]
DATASET_OPTIONS = ["skip_prepare_dataset", "add_special_tokens", "append_concat_token"]
TRUNCATION_MODES = ["keep_end", "keep_start"]
DATA_AUDITS = ["raise", "warn"]

# Values that older releases of TRL used, and today's.
_OLD_VALUES = {
    "packing_strategy": {"bfd-requeue": "bfd_split", "bfd_requeue": "bfd_split", "ffd": "bfd"},
    "loss_type": {"chunked_nll": "nll"},
}


@dataclass(kw_only=True, repr=False)
class SFTArguments(ArgumentGroup):
    """Model loading, data preparation, packing and loss of supervised fine-tuning."""

    model_init_kwargs: dict[str, Any] | str | None = arg(
        None, "Arguments for `from_pretrained`, used when the model is given by name."
    )
    trust_remote_code: bool = arg(False, "Run Python code that comes with the model or tokenizer.")
    router_aux_loss_coef: float | None = arg(
        None, "Weight of the load-balancing loss of mixture-of-experts models; unset keeps the model's own."
    )
    chat_template_path: str | None = arg(None, "Chat template to use: a Jinja file, or a tokenizer that has one.")
    dataset_text_field: str = arg("text", "Column that holds the text.")
    dataset_kwargs: dict[str, Any] | str | None = arg(
        None,
        "`skip_prepare_dataset` takes the dataset as it is; `add_special_tokens` and `append_concat_token`, if false, "
        "leave BOS and EOS away from rows of text.",
    )
    dataset_num_proc: int | None = arg(None, "Processes that prepare the dataset.")
    eos_token: str | None = arg(None, "Token that ends a turn or a text; unset means the tokenizer's.")
    pad_token: str | None = arg(None, "Token used for padding; unset means the tokenizer's.")
    max_length: int | None = arg(
        1024, "Longest sequence in tokens; longer ones are cut. None cuts nothing.", old=["max_seq_length"]
    )
    truncation_mode: str = arg("keep_start", "Which end of a long sequence is kept.", choices=TRUNCATION_MODES)
    shuffle_dataset: bool = arg(False, "Shuffle the dataset once before it is prepared, and packed rows once more.")
    packing: bool = arg(False, "Fill rows of `max_length` tokens with several samples each.")
    packing_strategy: str = arg(
        "bfd",
        "How rows are filled: best fit (`bfd`, cuts long samples; `bfd_split` splits them), or `wrapped` over rows.",
        choices=PACKING_STRATEGIES,
    )
    padding_free: bool | None = arg(
        None,
        "Join the samples of a batch instead of padding them; unset lets the trainer decide.",
        nargs="?",
        const=True,
    )
    pad_to_multiple_of: int | str | None = arg("auto", "Pad batches to a multiple of this; `auto` and None do not.")
    eval_packing: bool | None = arg(
        None, "Pack the evaluation data as well; unset means as `packing`.", nargs="?", const=True
    )
    completion_only_loss: bool | None = arg(
        None,
        "Train on completions only; unset means so for prompt-completion rows, and on everything for others.",
        nargs="?",
        const=True,
    )
    assistant_only_loss: bool = arg(False, "Train on the assistant's turns only.")
    data_audit: str = arg(
        "raise",
        "What happens when no training row teaches to stop, or nearly all tokens are cut off: `raise`, or `warn`.",
        choices=DATA_AUDITS,
    )
    loss_type: str = arg("nll", "Loss: `nll`, or `dft` (dynamic fine-tuning).", choices=LOSS_TYPES)
    activation_offloading: bool = arg(False, "Keep activations in host memory until the backward pass.")

    def _validate(self) -> None:
        require_choice("packing_strategy", self.packing_strategy, PACKING_STRATEGIES)
        require_choice("loss_type", self.loss_type, LOSS_TYPES)
        require_choice("truncation_mode", self.truncation_mode, TRUNCATION_MODES)
        require_choice("data_audit", self.data_audit, DATA_AUDITS)
        require(
            self.max_length is None or self.max_length >= 2,
            f"`max_length={self.max_length}` must be at least 2: the first token of a row is never predicted.",
        )
        require_positive("dataset_num_proc", self.dataset_num_proc)
        require_positive("pad_to_multiple_of", self.pad_to_multiple_of)
        packs = self.packing or bool(self.eval_packing)
        require(not packs or self.max_length is not None, "`packing=True` needs a row length: set `max_length`.")
        smoothing = getattr(self, "label_smoothing_factor", 0)
        require(
            self.loss_type != "dft" or not smoothing,
            f"`loss_type='dft'` weighs each token by its own probability, which `label_smoothing_factor={smoothing}` "
            "blurs. Set one of them to its default, 'nll' or 0.",
        )
        for key in self.dataset_kwargs or {}:
            require_choice("dataset_kwargs", key, DATASET_OPTIONS)
            value = (self.dataset_kwargs or {})[key]  # pyright: ignore
            require(isinstance(value, bool), f"`dataset_kwargs['{key}']` is {value!r}; allowed are True and False.")
        self._warn_of_what_has_no_effect()

    def _warn_of_what_has_no_effect(self) -> None:
        cpu = getattr(self, "use_cpu", False) or not accelerator_present()
        for idle, text in (
            (self.activation_offloading and cpu, "`activation_offloading=True` has no effect on a CPU"),
            (
                self.activation_offloading and getattr(self, "torch_compile", False),
                "`activation_offloading=True` has no effect on compiled layers (`torch_compile`)",
            ),
            (getattr(self, "use_cache", False), "`use_cache=True` has no effect in `SFTTrainer`, which keeps no cache"),
        ):
            if idle:
                warnings.warn(f"{text}. Drop it.", stacklevel=2)


@dataclass(kw_only=True, repr=False)
class SFTConfig(SFTArguments, TrainingArguments):
    """Arguments of `SFTTrainer`: fields and defaults of TRL 1.16.

    Five defaults differ from `TrainingArguments`: `learning_rate` 2e-5, `logging_steps` 10, `gradient_checkpointing`
    unset, `bf16` unset, `padding_free` unset.

    Recomputation. `gradient_checkpointing=None` stays None here; `SFTTrainer` keeps the activations where one process
    trains and they take at most a quarter of the free memory, and recomputes them otherwise. (TRL says True: always.)

    Precision. `bf16=None` is resolved when the object is made, and reads as a bool afterwards:

    1. `fp16=True` was given: False.
    2. `accelerate launch` chose a mixed precision: whether that is bf16.
    3. On the CPU: False, the run is in float32. (TRL says True, which slows most CPUs down.)
    4. On an accelerator with native bfloat16: True.
    5. On any other accelerator: False, and `fp16` becomes True.

    Raises:
        ArgumentError: as `TrainingArguments`.
    """

    learning_rate: float = arg(2e-5, "Peak learning rate.")
    logging_steps: float = arg(10, "Steps between logs; below 1 a share of all steps.")
    gradient_checkpointing: bool | None = arg(
        None,
        "Recompute activations in the backward pass instead of keeping them; unset: where they need much memory.",
        nargs="?",
        const=True,
    )
    bf16: bool | None = arg(  # pyright: ignore[reportIncompatibleVariableOverride]
        None, "Mixed precision with bfloat16; unset lets the device decide.", nargs="?", const=True
    )

    _OLD_NAMES: ClassVar[dict[str, Translation]] = {
        "dataset_batch_size": without_effect("The dataset is prepared in batches of a fixed size."),
        "num_of_sequences": without_effect("Packing reads the whole dataset."),
        "chars_per_token": without_effect("Packing counts tokens, it does not estimate them."),
        "infinite": without_effect("`max_steps` repeats the data as often as needed."),
    }
    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs", "dataset_kwargs"]

    def __post_init__(self) -> None:
        self._resolve_precision()
        self._resolve_old_values()
        if isinstance(self.pad_to_multiple_of, str):
            word = self.pad_to_multiple_of.lower()
            unset = word in ("auto", "none", "null")
            require(unset or word.isdigit(), f"`pad_to_multiple_of={word!r}` must be a number, 'auto' or None.")
            self.pad_to_multiple_of = None if unset else int(word)
        super().__post_init__()

    def _resolve_checkpointing(self) -> None:
        unset = self.gradient_checkpointing is None and self.activation_checkpointing is None
        super()._resolve_checkpointing()
        if unset:
            self.gradient_checkpointing = self.activation_checkpointing = None

    def _resolve_precision(self) -> None:
        if self.bf16 is not None:
            return
        launched = environment.launched_precision()
        if self.fp16 or launched != "no":
            self.bf16 = not self.fp16 and launched == "bf16"
            return
        chosen = best_precision(self.use_cpu)
        self.bf16 = chosen == "bf16"  # pyright: ignore[reportIncompatibleVariableOverride]
        self.fp16 = chosen == "fp16"

    def _resolve_old_values(self) -> None:
        for name, values in _OLD_VALUES.items():
            old = getattr(self, name)
            if old in values:
                warnings.warn(f"`{name}='{old}'` is called '{values[old]}' now.", FutureWarning, stacklevel=5)
                setattr(self, name, values[old])
