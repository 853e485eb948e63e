import json
import re
from html.parser import HTMLParser

import pytest

from finetune import ModelConfig, SFTConfig, parse_arguments, with_model_options
from finetune.arguments import write_resolved_config
from finetune.errors import ArgumentError
from finetune.reporting.report import number_or_text, report_from_run, write_report

HISTORY = [
    {"loss": 3.0, "learning_rate": 1e-3, "step": 1},
    {"eval_loss": 2.5, "step": 1},
    {"loss": 2.0, "learning_rate": 5e-4, "step": 12000},
    {"eval_loss": 1.25, "step": 12000},
    {"train_runtime": 90.5, "train_samples_per_second": 3.25, "total_flos": 2e15, "step": 12000},
]


class Page(HTMLParser):
    """Checks that tags close, and collects text and addresses."""

    VOID = {"meta", "link", "br"}

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.text = [], [], ""
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        """Closed at once."""

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data + "\n"


def written(path):
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_is_complete_and_needs_nothing_else(tmp_path):
    config = {
        "learning_rate": {"value": 2e-5, "source": "flag"},
        "seed": {"value": 42, "source": "default"},
        "plain": [1, 2],
    }
    extra = {
        "title": "My <run>",
        "notes": "a & b",
        "results": {"exact_match": 0.875},
        "data_audit": [{"split": "train", "rows": 12000}, {"split": "eval", "dropped": 3}],
        "generations": [{"prompt": "2+2=", "before": "<b>fish</b>", "after": "4"}],
        "series": {"memory (MiB)": [(1, 100), (2, 150)]},
        "environment": {"torch": "2.13"},
    }
    path = write_report(tmp_path / "run", HISTORY, config, extra)
    assert path == tmp_path / "run" / "report.html"
    page = written(path)
    assert page.addresses == []
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", path.read_text())
    for text in ("My <run>", "a & b", "<b>fish</b>", "0.875", "12,000", "2e-05", "flag", "1 defaults", "memory (MiB)"):
        assert text in page.text, text
    for figure in ("3 → 2", "2.5 → 1.25", "90.5 s", "3.25", "2e+15"):
        assert figure in page.text, figure
    assert path.read_text().count("<svg") == 3
    titles = re.findall(r"<h2>(.*?)</h2>", path.read_text())
    assert titles == ["Curves", "Before and after", "Results", "Data", "Configuration", "Environment"]


def test_an_empty_run_gives_a_page(tmp_path):
    page = written(write_report(tmp_path, []))
    assert tmp_path.name in page.text


@pytest.mark.parametrize(
    "config",
    [
        {"hub_token": "hf_secret"},
        {"hub_token": {"value": "hf_secret", "source": "flag"}},
        {"something": "hf_secret"},
        {"wandb_api_key": {"value": None, "source": "default"}, "token": "hf_secret"},
    ],
)
def test_tokens_are_not_written(tmp_path, config):
    text = write_report(tmp_path, HISTORY, config).read_text()
    assert "hf_secret" not in text and "(hidden)" in text


def test_report_of_a_run_folder(tmp_path):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": HISTORY}))
    (tmp_path / "all_results.json").write_text('{"eval_exact": 0.5}')
    (tmp_path / "resolved_config.yaml").write_text("learning_rate: {value: 0.1, source: file}\nseed: 7\n")
    page = written(report_from_run(tmp_path, {"title": "again"}))
    for text in ("again", "eval_exact", "learning_rate", "file", "seed"):
        assert text in page.text
    with pytest.raises(ArgumentError):
        report_from_run(tmp_path / "nowhere")


def test_a_run_of_a_program_shows_what_was_chosen_and_from_where_and_its_data(tmp_path):
    (config,) = parse_arguments(SFTConfig, ["--output_dir", str(tmp_path), "--learning_rate", "0.25"])
    write_resolved_config(tmp_path / "resolved_config.yaml", with_model_options(config, ModelConfig()))
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": HISTORY}))
    audit = {"name": "train", "num_rows": 20, "packing_efficiency": None, "first_dropped_rows": []}
    (tmp_path / "data_audit.json").write_text(json.dumps({"train": audit, "eval": {**audit, "num_rows": 7}}))
    page = report_from_run(tmp_path).read_text()
    assert "<tr><td>learning_rate</td><td>0.25</td><td>flag --learning_rate</td></tr>" in page
    assert "<td>adam_beta1</td>" in page[page.index("<details>") :] and "SFTConfig" not in page
    assert "<tr><td>rows</td><td>20</td><td>7</td></tr>" in page and "packing" not in page[: page.index("<h2>Conf")]


@pytest.mark.parametrize(
    ("value", "text"),
    [(True, "True"), (None, "None"), (12000, "12,000"), (float("nan"), "nan"), ({"a": 1}, '{"a": 1}'), ("x", "x")],
)
def test_cells(value, text):
    assert number_or_text(value) == text
