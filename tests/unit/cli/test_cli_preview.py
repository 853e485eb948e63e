"""`finetune preview` shows what `finetune sft` would train on."""

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.cli.preview import run_preview
from finetune.errors import ArgumentError

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}[A]{% generation %}{{ m['content'] }}<|im_end|>"
    "{% endgeneration %}{% else %}[Q]{{ m['content'] }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("argument", ["rows", "counted_rows"])
def test_a_number_below_one_is_an_error(argument: str) -> None:
    with pytest.raises(ArgumentError, match=f"`{argument}` is -1"):
        run_preview(["--model_name_or_path", "x", f"--{argument}", "-1"])


def make(tmp_path: Path, tiny_llama: Any, tokenizer: Any) -> list[str]:
    tiny_llama(512).config.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on a mat"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    return [
        *("--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "rows.jsonl")),
        *("--output_dir", str(tmp_path / "out"), "--assistant_only_loss"),
    ]


def test_the_template_of_a_file_is_used(tmp_path: Path, tiny_llama: Any, chat_tokenizer: Any, capsys: Any) -> None:
    argv = make(tmp_path, tiny_llama, chat_tokenizer)
    run_preview(argv)
    assert "<|im_start|>user\nthe cat" in capsys.readouterr().out
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    run_preview([*argv, "--chat_template_path", str(tmp_path / "own.jinja")])
    assert "[Q]the cat[A]«sat on a mat<|im_end|>»" in capsys.readouterr().out


def test_the_template_and_tokens_of_another_tokenizer_are_used(
    tmp_path: Path, tiny_llama: Any, chat_tokenizer: Any, capsys: Any
) -> None:
    argv = make(tmp_path, tiny_llama, chat_tokenizer)
    chat_tokenizer.add_tokens(["<|done|>"], special_tokens=True)
    chat_tokenizer.eos_token, chat_tokenizer.chat_template = "<|done|>", TEMPLATE.replace("<|im_end|>", "<|done|>")
    chat_tokenizer.save_pretrained(tmp_path / "other")
    run_preview([*argv, "--chat_template_path", str(tmp_path / "other")])
    assert "[A]«sat on a mat<|done|>»" in capsys.readouterr().out
