"""Under which key prepared rows are kept, where, and when they are used again."""

import importlib
import json
import os
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset

from finetune.data.preparation import cache
from finetune.data.preparation.pipeline import prepare_split
from finetune.data.preparation.settings import DataSettings
from finetune.errors import DataFormatError

TEXTS = ["the cat sat on a mat", "sun", "stars over the hills", "a"]
CHATS = [
    [{"role": "user", "content": "what"}, {"role": "assistant", "content": text}] for text in ("the cat", "the sun")
]
pytestmark = pytest.mark.usefixtures("quiet")


def silent(line: str) -> None:
    pass


def prepared(dataset: Any, tokenizer: Any, **options: Any) -> list[dict[str, Any]]:
    return list(prepare_split(dataset, tokenizer, DataSettings(**options), say=silent).dataset)


def cache_line(dataset: Any, tokenizer: Any, **options: Any) -> str:
    return prepare_split(dataset, tokenizer, DataSettings(**options), say=silent).cache


def test_the_cache_hits_and_says_why_it_misses(on_disk: Any, chat_tokenizer: Any) -> None:
    assert cache_line(on_disk, chat_tokenizer) == "MISS (first preparation of these rows)"
    assert cache_line(on_disk, chat_tokenizer) == "HIT"
    assert cache_line(on_disk, chat_tokenizer, batch_size=2) == "HIT"
    assert cache_line(on_disk, chat_tokenizer, max_length=5) == "MISS (`max_length` 1024 -> 5)"
    # Padding leaves a mark on the tokenizer; it must not cost the cache.
    chat_tokenizer(["a", "the cat"], padding=True, truncation=True, max_length=4)
    assert cache_line(on_disk, chat_tokenizer) == "HIT"
    chat_tokenizer.add_tokens(["<new>"])
    assert cache_line(on_disk, chat_tokenizer, max_length=5) == "MISS (the tokenizer changed)"
    changed = on_disk.map(lambda row: {"text": row["text"] + "!"})
    assert "first preparation" in cache_line(changed, chat_tokenizer)


def test_a_hit_gives_the_rows_and_the_audit_of_the_miss(on_disk: Any, chat_tokenizer: Any) -> None:
    miss = prepare_split(on_disk, chat_tokenizer, DataSettings(max_length=4), say=silent)
    hit = prepare_split(on_disk, chat_tokenizer, DataSettings(max_length=4), say=silent)
    assert hit.cache == "HIT"
    assert list(hit.dataset) == list(miss.dataset)
    assert hit.audit == miss.audit
    assert hit.audit.num_truncated > 0


def test_the_template_is_part_of_the_key(chat_tokenizer: Any, tmp_path: Path) -> None:
    rows = Dataset.from_dict({"messages": CHATS})
    options = {"cache_dir": str(tmp_path)}
    assert "first" in cache_line(rows, chat_tokenizer, **options)
    assert cache_line(rows, chat_tokenizer, **options) == "HIT"
    chat_tokenizer.chat_template += " "
    assert cache_line(rows, chat_tokenizer, **options) == "MISS (the template changed)"
    line = cache_line(rows, chat_tokenizer, assistant_only_loss=True, **options)
    assert line == "MISS (`assistant_only_loss` False -> True)"
    default = chat_tokenizer.chat_template
    for tool_use in ("tools", "other tools"):
        chat_tokenizer.chat_template = {"default": default, "tool_use": tool_use + default}
        assert cache_line(rows, chat_tokenizer, assistant_only_loss=True, **options) == "MISS (the template changed)"


def test_a_formatting_function_is_part_of_the_key(on_disk: Any, chat_tokenizer: Any) -> None:
    def first(row: dict[str, Any]) -> str:
        return row["text"]

    def second(row: dict[str, Any]) -> str:
        return row["text"] + "."

    assert "MISS" in cache_line(on_disk, chat_tokenizer, formatting_func=first)
    assert cache_line(on_disk, chat_tokenizer, formatting_func=first) == "HIT"
    assert cache_line(on_disk, chat_tokenizer, formatting_func=second) == "MISS (the formatting_func changed)"


def _formatting(folder: Path, text: str) -> Any:
    """Returns `module.make` and `module.Maker().make` of a module with this text, which only then is imported."""
    (folder / "made_by_a_module.py").write_text(f"""
def helper(row): return {text!r} + row["text"]
def make(row): return helper(row)
class Maker:
    def make(self, row): return helper(row)
    def __call__(self, row): return helper(row)
""")
    sys.modules.pop("made_by_a_module", None)
    importlib.invalidate_caches()
    return importlib.import_module("made_by_a_module")


@pytest.mark.parametrize(
    "of", [lambda m: m.make, lambda m: m.Maker(), lambda m: m.Maker().make, lambda m: partial(m.make)]
)
def test_a_formatting_function_from_a_module_counts_with_its_file(
    of: Any, on_disk: Any, chat_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    first = of(_formatting(tmp_path, "one "))
    assert "first" in cache_line(on_disk, chat_tokenizer, formatting_func=first)
    assert cache_line(on_disk, chat_tokenizer, formatting_func=first) == "HIT"
    second = of(_formatting(tmp_path, "another "))
    assert "the formatting_func changed" in cache_line(on_disk, chat_tokenizer, formatting_func=second)
    sys.modules.pop("made_by_a_module")


def test_functions_without_a_source_are_never_taken_for_the_same() -> None:
    assert cache.function_digest(str.upper) != cache.function_digest(str.upper)


def test_the_code_that_runs_counts_and_not_only_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    digests = set()
    for text in ("one", "two"):
        space: dict[str, Any] = {"__name__": __name__}
        exec(f"def changed_in_place(row): return {text!r}", space)
        monkeypatch.setattr(sys.modules[__name__], "changed_in_place", space["changed_in_place"], raising=False)
        digests.add(cache.function_digest(space["changed_in_place"]))
    assert len(digests) == 2


def test_rows_in_memory_are_not_cached_without_a_folder(chat_tokenizer: Any, tmp_path: Path) -> None:
    rows = Dataset.from_dict({"text": TEXTS})
    assert cache_line(rows, chat_tokenizer) == "off (the rows live in memory)"
    assert "MISS" in cache_line(rows, chat_tokenizer, cache_dir=str(tmp_path))
    assert cache_line(Dataset.from_dict({"text": TEXTS}), chat_tokenizer, cache_dir=str(tmp_path)) == "HIT"


def test_a_folder_that_cannot_be_made_is_named(on_disk: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = cache_line(on_disk, chat_tokenizer, cache_dir=str(tmp_path / "file" / "cache"))
    assert line.startswith(f"off (the folder `{tmp_path}/file/cache` cannot be made: ")
    datasets.disable_caching()
    try:
        assert cache_line(on_disk, chat_tokenizer) == "off (caching is disabled)"
    finally:
        datasets.enable_caching()


def test_a_folder_that_cannot_be_written_to_is_named(
    on_disk: Any, chat_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *args: False)  # whoever runs the tests may be allowed everything
    assert cache_line(on_disk, chat_tokenizer, cache_dir=str(tmp_path)).endswith(f"`{tmp_path}` cannot be written to)")
    folder = tmp_path / "rows"
    before = sorted(path.name for path in folder.iterdir())
    shuffled = cache.shuffled(on_disk, 3)
    split = prepare_split(shuffled, chat_tokenizer, DataSettings(), say=silent)
    assert split.cache == f"off (the folder `{folder}` cannot be written to)"
    assert sorted(path.name for path in folder.iterdir()) == before, "nothing is written there"
    assert split.dataset["input_ids"][:] == [
        row["input_ids"] for row in prepared(shuffled.flatten_indices(), chat_tokenizer)
    ]


def test_a_killed_preparation_leaves_no_rows_behind(on_disk: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    bad = Dataset.from_dict({"text": ["a", None]})
    for _ in range(2):
        with pytest.raises(DataFormatError):
            prepared(bad, chat_tokenizer, batch_size=1, cache_dir=str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").glob("*.arrow"))


def test_every_part_of_the_key_counts(on_disk: Any, chat_tokenizer: Any) -> None:
    parts = cache.key_parts(on_disk, chat_tokenizer, DataSettings(), ["template"])
    assert set(parts) == {"data", "tokenizer", "template", "formatting_func", "settings", "version"}
    keys = {cache.fingerprint({**parts, name: "other"}) for name in parts}
    assert len(keys | {cache.fingerprint(parts)}) == len(parts) + 1
    assert json.loads(json.dumps(parts)) == parts


def test_the_tokenizer_counts_by_what_it_does(chat_tokenizer: Any) -> None:
    before = cache.tokenizer_digest(chat_tokenizer)
    chat_tokenizer(["a", "the cat"], padding=True, truncation=True, max_length=4)
    chat_tokenizer.name_or_path = "elsewhere"
    assert cache.tokenizer_digest(chat_tokenizer) == before
    chat_tokenizer.split_special_tokens = True
    split = cache.tokenizer_digest(chat_tokenizer)
    chat_tokenizer.eos_token = "</s>"
    assert len({before, split, cache.tokenizer_digest(chat_tokenizer)}) == 3


def test_rows_that_another_process_made_meanwhile_are_used(
    on_disk: Any, chat_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = prepared(on_disk, chat_tokenizer)
    answers = iter([False, True])
    monkeypatch.setattr(cache, "is_cached", lambda path: next(answers))
    split = prepare_split(on_disk, chat_tokenizer, DataSettings(), say=silent)
    assert split.cache == "HIT (another process prepared the rows)"
    assert list(split.dataset) == expected


def test_processes_that_start_together_prepare_the_rows_once(tmp_path: Path, chat_tokenizer: Any) -> None:
    Dataset.from_dict({"text": TEXTS * 200}).save_to_disk(tmp_path / "rows")
    chat_tokenizer.save_pretrained(tmp_path / "tokenizer")
    program = textwrap.dedent("""
        import sys, datasets
        from transformers import AutoTokenizer
        from finetune.data.preparation.pipeline import prepare_split
        from finetune.data.preparation.settings import DataSettings
        datasets.disable_progress_bars()
        rows = datasets.load_from_disk(sys.argv[1] + "/rows")
        tokenizer = AutoTokenizer.from_pretrained(sys.argv[1] + "/tokenizer")
        open(sys.argv[1] + "/ready" + sys.argv[2], "w").close()
        import os, time
        while not all(os.path.exists(sys.argv[1] + f"/ready{i}") for i in "01"): time.sleep(0.01)
        print("CACHE", prepare_split(rows, tokenizer, DataSettings(), say=lambda line: None).cache)
    """)
    command = [sys.executable, "-c", program, str(tmp_path)]
    running = [subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True) for i in range(2)]
    lines = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert sorted("MISS" in line for line in lines) == [False, True], lines
