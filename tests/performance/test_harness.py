"""The arithmetic of the benchmarks, the alternation, and the check of the README. Nothing here looks at a clock."""

import json
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import check_readme  # noqa: E402
import harness  # noqa: E402

ROUNDS = [
    {"trl": {"seconds": 6.0, "losses": [1.0]}, "finetune": {"seconds": 2.0, "losses": [1.0]}},
    {"trl": {"seconds": 8.0, "losses": [1.0, 2.0]}, "finetune": {"seconds": 4.0, "losses": [1.0, 2.002]}},
    {"trl": {"seconds": 50.0, "losses": [1.0, 2.0]}, "finetune": {"seconds": 10.0, "losses": [1.0, 2.002]}},
]


def test_summary() -> None:
    assert harness.summary([4, 1, 2]) == {"median": 2, "min": 1, "max": 4, "q1": 1.5, "q3": 3.0}
    assert harness.summary([7.0])["q3"] == 7.0
    with pytest.raises(ValueError, match="nothing was measured"):
        harness.summary([])


def test_a_ratio_is_that_of_one_round() -> None:
    assert harness.ratios(ROUNDS, "seconds", "trl") == [3.0, 2.0, 5.0]
    case = harness.Case("made up", {}, ROUNDS)
    assert case.ratio("seconds", "trl") == 3.0  # not 8 / 4, the ratio of the medians
    kept = case.result["ratios"]["seconds: trl / finetune"]
    assert (kept["min"], kept["max"], kept["values"]) == (2.0, 5.0, [3.0, 2.0, 5.0])
    assert case.result["sides"]["trl"]["seconds"]["median"] == 8.0


def test_bars() -> None:
    case = harness.Case("made up", {}, ROUNDS)
    assert case.bar("speed", 3.0, at_least=3.0) and not case.bar("speed", 2.99, at_least=3.0)
    assert case.bar("memory", 0.5, at_most=0.5) and not case.bar("memory", 0.51, at_most=0.5)
    assert [each["met"] for each in case.result["bars"]] == [True, False, True, False]
    assert not case.bar("nothing", float("nan"), at_least=1.0)


def test_losses_must_agree() -> None:
    case = harness.Case("made up", {}, ROUNDS)
    assert case.losses_agree(2e-3, "trl") and not case.losses_agree(5e-4, "trl")
    assert harness.difference([1.0], [1.0, 2.0]) == float("inf")
    assert harness.difference([1.0], [float("nan")]) == float("inf")
    assert not harness.Case("none", {}, [{"a": {"losses": []}, "finetune": {"losses": []}}]).losses_agree(1, "a")


def test_best_is_the_faster_incumbent() -> None:
    rounds = [{"trl": {"seconds": 3.0}, "trl best": {"seconds": 2.0}, "finetune": {"seconds": 1.0}}]
    assert harness.Case("made up", {}, rounds).best("seconds", ["trl", "trl best"]) == "trl best"


WORKER = """
import sys
sys.path.insert(0, {here!r})
import harness

def work(side, settings, pause):
    print("noise of a library")
    number = 0
    while True:
        number += 1
        with open(settings["trace"], "a") as file:
            file.write(side)
        pause({{"seconds": float(number)}})

if __name__ == "__main__":
    harness.serve(work, sys.argv[2])
"""


def test_sides_alternate_and_the_first_round_is_dropped(tmp_path: Path) -> None:
    script, trace = tmp_path / "script.py", tmp_path / "trace"
    script.write_text(WORKER.format(here=str(HERE)))
    sides = {name: {"trace": str(trace)} for name in ("A", "B")}
    rounds = harness.alternate(script, sides, pairs=3, logs=tmp_path / "logs")
    # There and back: whoever came second comes first in the next round.
    assert trace.read_text()[:8] == "ABBAABBA"
    assert [each["A"]["seconds"] for each in rounds] == [2.0, 3.0, 4.0]
    assert "noise of a library" in (tmp_path / "logs" / "a.log").read_text()


def test_a_side_that_dies_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(WORKER.format(here=str(HERE)).replace("number += 1", "raise SystemError('no luck')"))
    with pytest.raises(RuntimeError, match="no luck"):
        harness.alternate(script, {"A": {"trace": str(tmp_path / "t")}}, pairs=1, logs=tmp_path / "logs")


@pytest.fixture
def results(tmp_path: Path) -> list[dict]:
    case = harness.Case("float32", {}, ROUNDS)
    case.bar("tokens/s against TRL", case.ratio("seconds", "trl"), at_least=2.5)
    result = {
        "benchmark": "short_chats",
        "title": "Short chats",
        "environment": harness.environment(),
        "cases": [case.result],
    }
    (tmp_path / "short_chats.json").write_text(json.dumps(result))
    return check_readme.load(tmp_path)


def test_the_readme_is_written_and_found_right(results: list[dict]) -> None:
    text = f"# Title\n\n{check_readme.BEGIN}\nold\n{check_readme.END}\n\nrest\n"
    made = check_readme.written(text, results)
    assert "| Short chats | tokens/s against TRL | 3 (2 to 5) | ≥ 2.5 | yes |" in made
    assert made.startswith("# Title\n") and made.endswith("\n\nrest\n")
    assert check_readme.differences(made, results) == []
    assert check_readme.written(made, results) == made


def test_a_wrong_figure_is_caught(results: list[dict]) -> None:
    text = check_readme.written(f"{check_readme.BEGIN}\n{check_readme.END}\n", results)
    wrong = check_readme.differences(text.replace("| 3 (2 to 5) |", "| 4 (2 to 5) |"), results)
    assert any(line.startswith("-") and "4 (2 to 5)" in line for line in wrong)
    assert any(line.startswith("+") and "3 (2 to 5)" in line for line in wrong)
    with pytest.raises(ValueError, match="no lines"):
        check_readme.differences("a README without markers", results)
