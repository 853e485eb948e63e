import itertools
import json
import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from finetune.control.state import TrainerState
from finetune.errors import ArgumentError
from finetune.reporting.plots import Chart, charts, number, read_history, running_mean, save_plots, svg, thin, ticks

HISTORY = [
    {"loss": 3.0, "grad_norm": 1.0, "learning_rate": 1e-3, "epoch": 0.1, "step": 1},
    {"eval_loss": 2.5, "eval_accuracy": 0.5, "eval_runtime": 1.0, "eval_samples_per_second": 4.0, "step": 1},
    {"loss": 2.0, "grad_norm": 0.5, "learning_rate": 5e-4, "train_tokens_per_second": 10.0, "epoch": 0.2, "step": 2},
    {"eval_loss": 1.5, "eval_b_loss": 1.0, "eval_accuracy": 0.7, "note": "text", "done": True, "step": 2},
    {"train_runtime": 9.0, "train_loss": 2.5, "train_tokens_per_second": 11.0, "step": 2},
]


def test_charts_group_train_and_eval_and_leave_totals_out():
    found = {chart.title: chart.series for chart in charts(HISTORY)}
    assert list(found) == ["loss", "learning_rate", "grad_norm", "accuracy"]
    assert found["loss"] == {
        "loss": [(1.0, 3.0), (2.0, 2.0)],
        "eval_loss": [(1.0, 2.5), (2.0, 1.5)],
        "eval_b_loss": [(2.0, 1.0)],
    }


def test_further_series():
    assert charts(HISTORY, {"memory": [(1, 5), (2, 6)]})[-1].series == {"memory": [(1.0, 5.0), (2.0, 6.0)]}


def shapes(picture, tag):
    root = ElementTree.fromstring(picture)
    return root.findall(f".//{{http://www.w3.org/2000/svg}}{tag}")


def test_svg_puts_values_where_they_belong():
    picture = svg(Chart("loss", {"loss": [(0, 0.0), (10, 4.0)]}))
    (line,) = shapes(picture, "polyline")
    (x0, y0), (x1, y1) = [tuple(map(float, point.split(","))) for point in line.get("points").split()]
    assert x0 < x1 and y0 > y1
    labels = {label.text: label for label in shapes(picture, "text")}
    assert float(labels["0"].get("y")) == pytest.approx(y0 + 4, abs=0.1) or "0" in labels
    assert {"loss", "step", "4", "10"} <= set(labels)


@pytest.mark.parametrize(
    "points",
    [
        [(1, 2.0)],
        [(1, 2.0), (2, 2.0)],
        [(1, 0.0), (2, 0.0)],
        [(5, -1e-9), (6, 1e9)],
        [(1, math.nan), (2, 1.0)],
        [(1, math.inf), (2, math.nan)],
        [(step, float(step % 7)) for step in range(5000)],
    ],
)
def test_svg_of_odd_series_is_well_formed_and_inside_the_picture(points):
    picture = svg(Chart('a<b>&"', {"a<b": points}, smooth=True))
    assert "nan" not in picture.replace("non-finite", "")
    for line in shapes(picture, "polyline"):
        for point in line.get("points").split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= 560 and 0 <= y <= 270
    lost = sum(not math.isfinite(y) for _, y in points)
    assert (f"{lost} non-finite values not drawn" in picture) is (lost > 0)


def test_many_points_are_thinned_with_their_spikes():
    points = [(float(step), 1.0) for step in range(10_000)]
    points[5432] = (5432.0, 99.0)
    kept = thin(points)
    assert len(kept) <= 1300 and (5432.0, 99.0) in kept and kept == sorted(kept)
    assert thin(points[:10]) == points[:10]


def test_smoothing_does_not_lag():
    line = [(float(step), float(step)) for step in range(400)]
    assert running_mean(line)[200] == (200.0, 200.0)
    assert len(running_mean(line)) == 400


def test_ticks_are_round_and_enclose():
    for low, high in [(0.3, 2.1), (-5, 7), (1e-5, 2e-5), (99.5, 99.6), (3, 3), (0, 0), (1, 1e9), (-2, -2)]:
        found = ticks(low, high)
        assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 9, (low, high, found)
        gaps = {round((b - a) / (found[1] - found[0]), 6) for a, b in itertools.pairwise(found)}
        assert gaps == {1.0}


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (12500, "12,500"), (2e-5, "2e-05"), (3.2e6, "3.2M"), (1e12, "1e+12"), (0.12345, "0.1235")],
)
def test_number(value, text):
    assert number(value) == text


def test_history_of_a_file_a_checkpoint_and_a_run(tmp_path):
    for step in (5, 20):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        TrainerState(log_history=[{"loss": float(step), "step": step}]).save_to_json(folder / "trainer_state.json")
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-best" / "trainer_state.json").write_text("{}")
    assert read_history(tmp_path / "checkpoint-5" / "trainer_state.json")[0]["step"] == 5
    assert read_history(tmp_path / "checkpoint-5")[0]["step"] == 5
    assert read_history(tmp_path)[0]["step"] == 20
    TrainerState(log_history=[{"step": 99}]).save_to_json(tmp_path / "trainer_state.json")
    assert read_history(tmp_path)[0]["step"] == 99


@pytest.mark.parametrize("content", [None, "{", "[]", '{"other": 1}'])
def test_no_history_is_one_clear_error(tmp_path, content):
    if content is not None:
        (tmp_path / "trainer_state.json").write_text(content)
    with pytest.raises(ArgumentError, match="no `trainer_state.json`" if content is None else "not the state"):
        read_history(tmp_path)


def test_plots_as_files(tmp_path):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": HISTORY}))
    paths = save_plots(tmp_path)
    assert [path.name for path in paths] == ["loss.svg", "learning_rate.svg", "grad_norm.svg", "accuracy.svg"]
    assert paths[0].parent == tmp_path / "plots" and "currentColor" not in paths[0].read_text()
    pytest.importorskip("matplotlib")
    (loss, *_) = save_plots(tmp_path, tmp_path / "png", format="png")
    assert loss.read_bytes().startswith(b"\x89PNG")


def test_png_without_matplotlib_says_how_to_get_it(tmp_path, monkeypatch):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": HISTORY}))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ArgumentError, match=r"pip install matplotlib"):
        save_plots(tmp_path, format="png")
    with pytest.raises(ArgumentError, match="`svg` or `png`"):
        save_plots(tmp_path, format="gif")


def test_plotting_imports_no_training_library():
    code = (
        "import sys, finetune.reporting.plots, finetune.reporting.report; print({'torch', 'numpy'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
