"""What errors say, made short for a message."""

from finetune.errors import first_line, one_line


def test_one_line() -> None:
    assert one_line(ValueError("two\n   lines ")) == "two lines"
    assert one_line(ValueError("x" * 301)) == "x" * 297 + "..."
    assert one_line(ValueError("x" * 10), 8) == "xxxxx..."


def test_first_line() -> None:
    assert first_line(RuntimeError("\nfull disk\nfile.cc:12")) == "full disk"
    assert first_line(RuntimeError()) == first_line(RuntimeError(" \n")) == "RuntimeError"
    assert len(first_line(ValueError("x" * 301))) == 300
