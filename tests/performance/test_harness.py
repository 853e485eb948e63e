"""The arithmetic of the benchmarks, the alternation, and the check of the README. Nothing here looks at a clock."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import bench_growth  # noqa: E402
import check_readme  # noqa: E402
import gpu_suite  # noqa: E402
import harness  # noqa: E402
import machine  # noqa: E402
import run_all  # noqa: E402

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


def test_a_bar_of_pairs_has_a_spread_and_one_without_goal_is_neither_met_nor_missed() -> None:
    case = harness.Case("made up", {}, ROUNDS)
    assert not case.bar("share", case.shares("seconds", "trl"), at_most=0.3)
    assert case.bar("told", case.ratios("seconds", "trl")) is None
    share, told = case.result["bars"]
    assert share["value"] == pytest.approx(1 / 3)
    assert (share["spread"]["min"], share["spread"]["max"]) == (0.2, 0.5)
    assert (told["value"], told["met"]) == (3.0, None)


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
    harness.serve(work, sys.argv[2], imports=lambda side: print('importing', side))
"""


def test_sides_alternate_and_the_first_round_is_dropped(tmp_path: Path) -> None:
    script, trace = tmp_path / "script.py", tmp_path / "trace"
    script.write_text(WORKER.format(here=str(HERE)))
    sides = {name: {"trace": str(trace)} for name in ("A", "B")}
    rounds = harness.alternate(script, sides, pairs=3, logs=tmp_path / "logs")
    # There and back: whoever came second comes first in the next round.
    assert trace.read_text()[:8] == "ABBAABBA"
    assert [each["A"]["seconds"] for each in rounds] == [2.0, 3.0, 4.0]
    log = (tmp_path / "logs" / "a.log").read_text()
    assert log.index("importing A") < log.index("noise of a library")


def test_fresh_sides_start_anew_in_every_round(tmp_path: Path) -> None:
    script, trace = tmp_path / "script.py", tmp_path / "trace"
    script.write_text(WORKER.format(here=str(HERE)))
    sides = {name: {"trace": str(trace)} for name in ("A", "B")}
    rounds = harness.alternate_fresh(script, sides, pairs=2, logs=tmp_path / "logs")
    assert [each[side]["seconds"] for each in rounds for side in sides] == [1.0] * 4
    assert trace.read_text() == "ABBA"


def test_a_side_that_dies_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(WORKER.format(here=str(HERE)).replace("number += 1", "raise SystemError('no luck')"))
    with pytest.raises(RuntimeError, match="no luck"):
        harness.alternate(script, {"A": {"trace": str(tmp_path / "t")}}, pairs=1, logs=tmp_path / "logs")


@pytest.fixture
def results(tmp_path: Path) -> dict[str, list[dict]]:
    case = harness.Case("float32", {}, ROUNDS)
    case.bar("tokens/s against TRL", case.ratio("seconds", "trl"), at_least=2.5)
    result = {
        "benchmark": "short_chats",
        "title": "Short chats",
        "environment": machine.environment(),
        "cases": [case.result],
    }
    return loaded(tmp_path, result)


def loaded(root: Path, result: dict) -> dict[str, list[dict]]:
    folder = root / result["benchmark"] / "machine"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))
    return check_readme.load(folder.parent)


def test_the_readme_is_written_and_found_right(results: dict[str, list[dict]]) -> None:
    text, wanted = f"# Title\n\n{check_readme.BEGIN}\nold\n{check_readme.END}\n\nrest\n", check_readme.table(results)
    made = check_readme.written(text, wanted)
    assert "| Short chats | tokens/s against TRL | 3 (2 to 5), met | ≥ 2.5 |" in made
    assert made.startswith("# Title\n") and made.endswith("\n\nrest\n")
    assert check_readme.differences(made, wanted) == []
    assert check_readme.written(made, wanted) == made


def test_a_wrong_figure_is_caught(results: dict[str, list[dict]]) -> None:
    wanted = check_readme.table(results)
    text = check_readme.written(f"{check_readme.BEGIN}\n{check_readme.END}\n", wanted)
    wrong = check_readme.differences(text.replace("| 3 (2 to 5),", "| 4 (2 to 5),"), wanted)
    assert any(line.startswith("-") and "4 (2 to 5)" in line for line in wrong)
    assert any(line.startswith("+") and "3 (2 to 5)" in line for line in wrong)
    with pytest.raises(ValueError, match="no lines"):
        check_readme.differences("a README without markers", wanted)


@pytest.fixture
def missed(tmp_path: Path) -> dict[str, list[dict]]:
    case = harness.Case("float32", {}, ROUNDS)
    floor = {"says": "2 GFLOP take 2 s", "best_possible": 4.0}
    case.bar("tokens/s", case.ratios("seconds", "trl"), at_least=10.0, floor=floor)
    case.bar("share", case.shares("seconds", "trl"), at_most=0.3, floor={**floor, "best_possible": 0.1})
    around = {**machine.environment(), "cores_busy_with_others": 0.25}
    result = {"benchmark": "vocabulary", "title": "Vocabulary", "environment": around, "cases": [case.result]}
    return loaded(tmp_path, result)


def test_a_missed_goal_is_told_with_its_floor(missed: dict[str, list[dict]]) -> None:
    lines = [*check_readme.table(missed), *check_readme.details(missed)]
    assert "| Vocabulary | tokens/s | 3 (2 to 5), **missed** | ≥ 10 |" in lines
    assert any("At the floor: 4; the goal is beyond this machine's floor." in line for line in lines)
    assert any("At the floor: 0.1; the floor would allow the goal." in line for line in lines)
    assert any("0.25 to 0.25 cores busy" in line for line in lines)
    text = "\n".join((check_readme.BEGIN, *lines, check_readme.END))
    assert check_readme.differences(text, lines) == []
    for wrong in (("**missed**", "met"), ("floor: 4;", "floor: 5;"), ("(2 to 5)", "(2 to 4)"), ("0.25 to", "0.1 to")):
        assert wrong[0] in text
        assert check_readme.differences(text.replace(*wrong), lines), wrong


def test_every_machine_has_a_column(results: dict[str, list[dict]], missed: dict[str, list[dict]]) -> None:
    here, there = next(iter(results.values())), next(iter(missed.values()))
    there[0]["left_out"] = {"bf16": "the processor has no bfloat16 arithmetic"}
    machines = {"A": here, "B": [*here, *there]}
    lines = [*check_readme.table(machines), *check_readme.details(machines)]
    assert "| Short chats | tokens/s against TRL | 3 (2 to 5), met | 3 (2 to 5), met | ≥ 2.5 |" in lines
    assert "| Vocabulary | tokens/s | - | 3 (2 to 5), **missed** | ≥ 10 |" in lines
    assert "Not measured: Vocabulary, bf16: the processor has no bfloat16 arithmetic." in lines


@pytest.mark.parametrize(
    ("flags", "widest", "folder"),
    [("fpu avx2 avx512f avx512_bf16", "avx512_bf16", "some_cpu_avx512_bf16"), ("fpu avx2", "avx2", "some_cpu_avx2")],
)
def test_machines_are_told_apart(monkeypatch: pytest.MonkeyPatch, flags: str, widest: str, folder: str) -> None:
    """Two processors of one name, one of them without bfloat16: the peaks and results of one are not the other's."""
    text = f"processor: 0\nmodel name\t: Some CPU\nflags\t\t: {flags}\n"
    monkeypatch.setattr("builtins.open", lambda *_: io.StringIO(text))
    assert (machine.arithmetic(), machine.folder().name) == (widest, folder)
    assert machine.has_bfloat16() == (widest != "avx2")
    assert machine._processor() == f"Some CPU ({widest}) x 1"


def test_a_wrong_figure_ends_the_script_with_status_1(results: dict[str, list[dict]], tmp_path: Path) -> None:
    readme, details = tmp_path / "README.md", tmp_path / "DETAILS.md"
    for path in (readme, details):
        path.write_text(f"{check_readme.BEGIN}\n{check_readme.END}\n")
    order = [sys.executable, str(HERE / "check_readme.py"), "--results", str(tmp_path / "short_chats")]
    order += ["--readme", str(readme), "--details", str(details)]
    assert subprocess.run([*order, "--write"], capture_output=True, check=False).returncode == 0
    assert subprocess.run(order, capture_output=True, check=False).returncode == 0
    readme.write_text(readme.read_text().replace("3 (2 to 5)", "3.1 (2 to 5)"))
    answer = subprocess.run(order, capture_output=True, text=True, check=False)
    assert answer.returncode == 1
    assert "3.1 (2 to 5)" in answer.stdout


def test_the_readmes_have_the_committed_figures() -> None:
    results = check_readme.load(HERE / "results")
    assert check_readme.differences(check_readme.README.read_text(), check_readme.table(results)) == []
    assert check_readme.differences(check_readme.DETAILS.read_text(), check_readme.details(results)) == []


def test_floors() -> None:
    measured = {"float32_gflops": 100.0, "bfloat16_gflops": 400.0, "gb_per_second": 50.0}
    assert machine.floor_seconds(2e9, 1e9, "float32", measured) == pytest.approx(0.04)
    assert machine.floor_seconds(2e9, 1e9, "bfloat16", measured) == pytest.approx(0.025)
    plain = {"blocks": 100, "head": 100, "layers": 0, "width": 0, "tokens": 10, "context": 5}
    assert machine.training_work(**plain, supervised=10, recomputed=False) == (12_000, 6_400)
    assert machine.training_work(**plain, supervised=4, recomputed=True) == (8 * 10 * 100 + 6 * 4 * 100, 6_400)


def test_peaks_are_measured() -> None:
    found = machine.measure_peaks(size=64, copied_mib=1, repeats=1)
    assert min(found[name] for name in ("float32_gflops", "bfloat16_gflops", "gb_per_second")) > 0


def test_growth_is_fitted_over_the_timed_rounds_only() -> None:
    chosen = [{"axis": "length", "x": x} for x in (100, 200, 400)]
    rounds: list[dict] = []
    for point in chosen:
        slow, timed = {"seconds_per_token": 99.0}, {"seconds_per_token": point["x"] ** 0.5}
        side = [slow, timed, timed, timed, {"seconds_per_token": 99.0, "ledger_mib": point["x"] / 10}]
        none = {"seconds_per_token": float("nan")}
        rounds += [{"finetune": each, "transformers": none} for each in side]
    axes = bench_growth.collected(rounds, chosen, repeats=3)
    assert axes["length"]["x"] == [100, 200, 400]
    ours = axes["length"]["sides"]["finetune"]
    assert ours["exponents"] == {"time": pytest.approx(0.5), "memory": pytest.approx(1.0)}
    assert axes["length"]["sides"]["transformers"]["exponents"] == {}
    lines = check_readme.growth([{"growth": axes, "environment": {"processor": "some"}}])
    assert "| length | 100 to 400 | time 0.50, memory 1.00 | - |" in lines


def test_growth_varies_one_axis_at_a_time() -> None:
    found = bench_growth.points(bench_growth.AXES)
    usual = bench_growth.USUAL
    for point in found:
        assert all(point[name] == usual[name] for name in usual if name != point["axis"])
    assert {point["axis"] for point in found} == {"length", "vocabulary", "batch", "rows"}
    long = {"axis": "length", "x": 100, "length": 100, "batch": 4, "steps": 2}
    assert bench_growth.supervised(long) == 320


def test_sets_hold_every_script_and_only_full_measures_at_length() -> None:
    training, start = run_all.commands(), run_all.commands("start")
    assert "short_chats" in training and "import" in start and not set(training) & set(start)
    assert all("--fast" in command for command in (*training.values(), *start.values()))
    assert set(run_all.commands("training", ["growth"])) == {"growth"}
    assert {command[1] for command in run_all.commands(full=True).values()} == {
        str(path) for path in HERE.glob("bench_*.py")
    }
    full = run_all.commands(full=True)
    assert "--fast" not in full["short_chats"] and "--fast" in training["short_chats"]
    for short, long in (("prepare_rows", "prepare_rows_50k"), ("evaluation", "evaluation_2k")):
        assert "--fast" in full[short] and "--fast" not in full[long]


def test_every_goal_of_the_gpu_is_computed() -> None:
    def side(speed: float, peak: float, mfu: float = 0.0) -> dict[str, float]:
        return {"tokens_per_second": speed, "peak_mib": peak, "mfu": mfu, "seconds": 1.0, "first_step_seconds": 3.0}

    liger = side(24, 64, 0.6)
    cases: list[dict] = [
        {"case": "llama-1b, packed", "length": 2048, "sides": {"trl": side(10, 100), "finetune": side(20, 50, 0.4)}},
        {"case": "llama-1b, packed, Liger", "length": 2048, "sides": {"trl": side(16, 80), "finetune": liger}},
        {"case": "llama-1b, packed, 8192", "length": 8192, "sides": {"trl": side(99, 1), "finetune": {"error": "no"}}},
        {"case": "llama-1b, GaLore", "length": 2048, "sides": {"finetune": side(1, 40)}},
        {"case": "llama-1b, GaLore layerwise", "length": 2048, "sides": {"finetune": side(1, 30)}},
    ]
    for case in cases:
        gpu_suite._compare(case)
    found = {each["text"]: (each["value"], each["met"]) for each in gpu_suite.bars(cases)}
    assert found["llama-1b: tokens/s against TRL's best"] == (1.5, True)
    assert found["llama-1b: MFU of the packed full fine-tune"] == (0.6, True)
    assert found["llama-1b, packed: peak memory as a share of TRL's"] == (0.5, True)
    assert found["llama-1b, packed, Liger: peak memory as a share of TRL's"] == (0.8, False)
    assert found["llama-1b, packed, 8192: peak memory as a share of TRL's"] == (None, None)
    assert found["llama-1b, GaLore: seconds to the first step"] == (3.0, True)
    assert found["llama-1b, GaLore: layerwise peak as a share of the ordinary one"] == (0.75, None)
    assert found["gemma-2b: tokens/s against TRL's best"] == (None, None)


@pytest.mark.slow
def test_the_gpu_suite_runs_every_path_on_a_tiny_model(tmp_path: Path) -> None:
    order = [sys.executable, str(HERE / "gpu_suite.py"), "--dry-run", "--out", str(tmp_path / "gpu.json")]
    answer = subprocess.run(order, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout[-2000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["left_out"] == []
    assert len(found["cases"]) == len(gpu_suite.RUNS)
