"""The model card: what was trained, on what, how, with which results. Bound as methods of the trainer.

The metadata (`base_model`, `datasets`, `library_name`, `tags`, `model-index`) is what the Hub reads; the text is for
people. The token of the Hub and file paths of this machine do not appear.
"""

import importlib.metadata
import importlib.util
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from finetune.wrappers import unwrap_peft

logger = logging.getLogger(__name__)

_GENERATED = "generated_from_trainer"
_PIPELINES = {
    "ForCausalLM": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForSeq2SeqLM": "text2text-generation",
    "ForConditionalGeneration": "text2text-generation",
    "ForImageClassification": "image-classification",
}
# Builders that read local files: their names are not datasets of the Hub.
_FILE_BUILDERS = {"arrow", "csv", "json", "pandas", "parquet", "text", "webdataset", "generator", None}
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_PACKAGES = ("finetune", "transformers", "torch", "accelerate", "datasets", "tokenizers", "peft")
_NO_METRIC = ("_runtime", "_per_second", "_preparation_time", "_delta", "epoch", "step", "total_flos")


class CardOwner(Protocol):
    """What these functions read of a trainer."""

    args: Any
    state: Any
    model: Any
    train_dataset: Any
    eval_dataset: Any

    def is_world_process_zero(self) -> bool: ...


@dataclass
class Card:
    """The content of a card; `render` writes it out."""

    model_name: str
    base_model: str | None = None
    library_name: str = "transformers"
    trainer_name: str = "Trainer"
    hub_model_id: str | None = None
    license: str | None = None
    language: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    dataset_args: list[str] = field(default_factory=list)
    pipeline: str | None = None
    rows: dict[str, int] = field(default_factory=dict)
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


def create_model_card(
    self: CardOwner,
    language: str | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    tasks: str | list[str] | None = None,
    dataset_tags: str | list[str] | None = None,
    dataset: str | list[str] | None = None,
    dataset_args: str | list[str] | None = None,
) -> None:
    """Writes `output_dir/README.md` from what the trainer knows. First process only.

    A card that somebody wrote by hand (without the tag `generated_from_trainer`, and not PEFT's) is left alone. Tags
    of an earlier card are kept.
    """
    if not self.is_world_process_zero():
        return
    path = Path(self.args.output_dir) / "README.md"
    earlier = _metadata(path)
    if path.exists() and _GENERATED not in _listed(earlier.get("tags")) and earlier.get("library_name") != "peft":
        logger.info("`%s` was not generated and is left as it is.", path)
        return
    card = describe(self, model_name=model_name)
    card.base_model = finetuned_from or card.base_model
    card.license = license or earlier.get("license")
    card.language = _listed(language)
    card.tags = list(dict.fromkeys([*_listed(tags), *card.tags, *_listed(earlier.get("tags"))]))
    card.datasets = _listed(dataset) or _listed(dataset_tags) or card.datasets
    card.dataset_args = _listed(dataset_args) or card.dataset_args
    card.pipeline = (_listed(tasks) or [card.pipeline])[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(card), encoding="utf-8")


def create_sft_model_card(
    self: CardOwner, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
) -> None:
    """Writes the same card with the arguments of TRL's trainers."""
    create_model_card(self, model_name=model_name, dataset=dataset_name, tags=tags)


def describe(trainer: CardOwner, model_name: str | None = None) -> Card:
    """Returns the card that the state of `trainer` gives."""
    model = trainer.model
    base = _base_model(model)
    architecture = type(unwrap_peft(model)).__name__
    own_tags = [*_listed(getattr(trainer, "_tag_names", None)), *_listed(getattr(model, "model_tags", None))]
    card = Card(
        model_name=model_name or Path(trainer.args.output_dir).absolute().name or base or type(model).__name__,
        base_model=base,
        library_name="peft" if getattr(model, "peft_config", None) else "transformers",
        trainer_name=type(trainer).__name__,
        hub_model_id=getattr(trainer, "hub_model_id", None),
        tags=list(dict.fromkeys([_GENERATED, *own_tags])),
        pipeline=next((task for part, task in _PIPELINES.items() if architecture.endswith(part)), None),
        hyperparameters=hyperparameters(trainer.args),
    )
    for name, data in (("training", trainer.train_dataset), ("evaluation", trainer.eval_dataset)):
        for part, rows in data.items() if isinstance(data, dict) else [("", data)]:
            if hasattr(rows, "__len__"):
                card.rows[f"{name} {part}".strip()] = len(rows)
            builder = getattr(rows, "builder_name", None)
            if builder not in _FILE_BUILDERS and builder not in card.datasets:
                card.datasets.append(str(builder))
                card.dataset_args.append(str(getattr(rows, "config_name", None) or "default"))
    card.history, card.results = evaluations(trainer.state.log_history)
    return card


def hyperparameters(args: Any) -> dict[str, Any]:
    """Returns the arguments that decide the result, those of transformers' cards."""
    world, accumulation = args.world_size, args.gradient_accumulation_steps
    total = args.train_batch_size * world * accumulation
    chosen: dict[str, Any] = {
        "learning_rate": args.learning_rate,
        "train_batch_size": args.train_batch_size,
        "eval_batch_size": args.eval_batch_size,
        "seed": args.seed,
        "num_devices": world if world > 1 else None,
        "gradient_accumulation_steps": accumulation if accumulation > 1 else None,
        "total_train_batch_size": total if total != args.train_batch_size else None,
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "optimizer_args": args.optim_args,
        "betas": (args.adam_beta1, args.adam_beta2) if "adam" in str(args.optim).lower() else None,
        "weight_decay": args.weight_decay or None,
        "max_grad_norm": args.max_grad_norm,
        "lr_scheduler_type": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "warmup_steps": args.warmup_steps or None,
        "training_steps": args.max_steps if args.max_steps >= 0 else None,
        "num_epochs": args.num_train_epochs if args.max_steps < 0 else None,
        "mixed_precision_training": None if args.mixed_precision == "no" else args.mixed_precision,
        "label_smoothing_factor": args.label_smoothing_factor or None,
    }
    return {name: value for name, value in chosen.items() if value is not None}


def evaluations(history: Iterable[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Returns the table of evaluations (with the training loss before each), and the metrics of the last one.

    >>> evaluations([{"loss": 2.0, "step": 1}, {"eval_loss": 1.5, "eval_runtime": 1.0, "epoch": 1.0, "step": 1}])
    ([{'Training Loss': 2.0, 'Epoch': 1.0, 'Step': 1, 'Loss': 1.5}], {'Loss': 1.5})
    """
    table: list[dict[str, Any]] = []
    training_loss: Any = "No log"
    results: dict[str, Any] = {}
    for entry in history:
        training_loss = entry.get("loss", training_loss)
        metrics = {
            name.removeprefix("eval_").replace("_", " ").title(): value
            for name, value in entry.items()
            if name.startswith("eval_") and not name.endswith(_NO_METRIC) and isinstance(value, int | float)
        }
        if metrics:
            results = metrics
            place = {"Training Loss": training_loss, "Epoch": entry.get("epoch"), "Step": entry.get("step")}
            table.append({**place, **metrics})
    return table, results


def render(card: Card) -> str:
    """Returns the text of `README.md`."""
    import yaml

    versions = {name: importlib.metadata.version(name) for name in _PACKAGES if importlib.util.find_spec(name)}
    metadata = yaml.safe_dump(_card_metadata(card), sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{metadata}---\n",
        "<!-- Written by the trainer. Remove the tag `generated_from_trainer` above to keep your own edits. -->\n",
        f"# {card.model_name}\n",
        _introduction(card),
        _section("Results", _bullets({name: _short(value) for name, value in card.results.items()})),
        _section("Quick start", _quick_start(card)),
        _section("Training data", _bullets({label: f"{rows:,} rows" for label, rows in card.rows.items()})),
        "## Training procedure\n",
        f"Trained with `{card.trainer_name}`.\n",
        _section("Hyperparameters", _bullets(card.hyperparameters), level=3),
        _section("Evaluations", _table(card.history), level=3),
        _section("Framework versions", _bullets(versions), level=3),
    ]
    return "\n".join(filter(None, parts))


def _card_metadata(card: Card) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "library_name": card.library_name,
        "base_model": card.base_model,
        "model_name": card.model_name,
        "license": card.license,
        "language": card.language,
        "datasets": card.datasets,
        "pipeline_tag": card.pipeline,
        "tags": card.tags,
    }
    # The Hub accepts results only together with the dataset they were measured on.
    if card.results and card.pipeline and card.datasets:
        dataset = {"name": card.datasets[0], "type": card.datasets[0]}
        result = {
            "task": {"type": card.pipeline, "name": card.pipeline.replace("-", " ").capitalize()},
            "metrics": [
                {"type": name.lower().replace(" ", "_"), "name": name, "value": value}
                for name, value in card.results.items()
            ],
            "dataset": dataset | ({"args": card.dataset_args[0]} if card.dataset_args else {}),
        }
        metadata["model-index"] = [{"name": card.model_name, "results": [result]}]
    return {name: value for name, value in metadata.items() if value}


def _introduction(card: Card) -> str:
    start = "This is an adapter for" if card.library_name == "peft" else "This model is a fine-tuned version of"
    base = f"[{card.base_model}](https://huggingface.co/{card.base_model})" if card.base_model else "a local model"
    data = ", ".join(f"[{name}](https://huggingface.co/datasets/{name})" for name in card.datasets)
    return f"{start} {base}{f', trained on {data}' if data else ''}.\n"


def _quick_start(card: Card) -> str:
    if card.hub_model_id is None or card.pipeline not in ("text-generation", "text-classification"):
        return ""
    chat = '[{"role": "user", "content": "Hello!"}], max_new_tokens=128, return_full_text=False'
    call = chat if card.pipeline == "text-generation" else '"Hello!"'
    return (
        "```python\nfrom transformers import pipeline\n\n"
        f'pipe = pipeline("{card.pipeline}", model="{card.hub_model_id}")\nprint(pipe({call}))\n```\n'
    )


def _section(title: str, body: str, level: int = 2) -> str:
    return f"{'#' * level} {title}\n\n{body}" if body else ""


def _bullets(content: Mapping[str, Any]) -> str:
    return "".join(f"- {name}: {value}\n" for name, value in content.items())


def _table(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, [":-:"] * len(columns)]
    lines += [[_short(row.get(column, "")) for column in columns] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _short(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _base_model(model: Any) -> str | None:
    """Returns the Hub name the model came from; None for local folders, whose path is private."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and _HUB_NAME.fullmatch(name) and not os.path.exists(name) else None


def _listed(value: Any) -> list[str]:
    return [] if not value else [value] if isinstance(value, str) else [str(member) for member in value]


def _metadata(path: Path) -> dict[str, Any]:
    """Returns the front matter of an existing card; empty if there is none or it is not readable."""
    import yaml

    parts = path.read_text(encoding="utf-8").split("---\n", 2) if path.is_file() else []
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        content = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, dict) else {}
