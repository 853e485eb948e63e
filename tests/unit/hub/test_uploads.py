import threading
import time
from pathlib import Path

import pytest

from finetune.hub.uploads import Patience, PushQueue, RefusedError, Repository, Upload, within

NO_PAUSE = Patience(pauses=(0.0, 0.0))


class FakeRepository(Repository):
    """Answers uploads from a list of results and exceptions."""

    def __init__(self, *answers, patience=NO_PAUSE):
        super().__init__("me/model", "hf_token", None, patience)
        self.answers, self.asked = list(answers), []

    def upload(self, upload):
        self.asked.append(upload.message)
        answer = self.answers.pop(0)
        answer = answer() if callable(answer) else answer
        if isinstance(answer, Exception):
            raise answer
        return answer


def upload_named(message, where=None, **kwargs):
    return Upload(folder=Path("snapshot"), source=Path("out dir"), message=message, path_in_repo=where, **kwargs)


def test_uploads_happen_in_order_and_in_the_background():
    gate = threading.Event()
    queue = PushQueue(FakeRepository(lambda: gate.wait(5), "second"))
    first, second = queue.submit(upload_named("first")), queue.submit(upload_named("second"))
    assert not queue.is_done() and not second.done()
    gate.set()
    queue.wait_until_done()
    assert (first.result(), second.result()) == (True, "second")
    assert queue.repository.asked == ["first", "second"]


def test_the_queue_starts_again_after_it_ran_dry():
    queue = PushQueue(FakeRepository("a", "b"))
    assert queue.submit(upload_named("1")).result(5) == "a"
    time.sleep(0.05)
    assert queue.submit(upload_named("2")).result(5) == "b"


@pytest.mark.parametrize(
    ("answers", "attempts", "outcome"),
    [
        ([OSError("x"), OSError("y"), "fine"], 3, "fine"),
        ([OSError("x")] * 4, 3, OSError),
        ([RefusedError("no"), "never"], 1, RefusedError),
        ([FileNotFoundError("gone"), "never"], 1, FileNotFoundError),
        ([TimeoutError("t"), TimeoutError("t"), "never"], 2, TimeoutError),
    ],
)
def test_attempts(answers, attempts, outcome):
    queue = PushQueue(FakeRepository(*answers))
    future = queue.submit(upload_named("m"))
    queue.wait_until_done()
    assert len(queue.repository.asked) == attempts
    if isinstance(outcome, str):
        assert future.result() == outcome and not queue.failures
    else:
        assert isinstance(future.exception(), outcome) and len(queue.failures) == 1


def test_the_snapshot_is_dropped_whatever_happens():
    dropped = []
    queue = PushQueue(FakeRepository("fine", RefusedError("no"), lambda: time.sleep(0.2)))
    for name in ("fine", "refused", "slow", "cancelled"):
        queue.submit(upload_named(name, done=lambda name=name: dropped.append(name)))
    queue.jobs[-1].cancel()
    queue.wait_until_done()
    deadline = time.monotonic() + 5
    while len(dropped) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert dropped == ["fine", "refused", "slow", "cancelled"]


def test_cancel_drops_what_has_not_started():
    gate = threading.Event()
    queue = PushQueue(FakeRepository(lambda: gate.wait(5)))
    queue.submit(upload_named("running"))
    waiting = queue.submit(upload_named("waiting"))
    time.sleep(0.05)
    queue.cancel()
    gate.set()
    queue.wait_until_done()
    assert waiting.cancelled() and queue.repository.asked == ["running"]


def test_failures_are_kept_per_place(caplog):
    no = RefusedError("no")
    queue = PushQueue(FakeRepository(no, no, "fine"))
    for message, where in (("model", None), ("state", "last-checkpoint"), ("model again", None)):
        queue.submit(upload_named(message, where))
    queue.wait_until_done()
    assert [upload.message for upload in queue.failures] == ["state"]
    caplog.clear()
    queue.report()
    assert caplog.text.count("Not on the Hub") == 1 and "'out dir' last-checkpoint" in caplog.text


def test_the_command_can_be_pasted():
    upload = upload_named("step 5", None, revision="a b", ignore=("checkpoint-*",))
    assert upload.command("me/model") == (
        "hf upload me/model 'out dir' . --revision 'a b' --exclude 'checkpoint-*' --commit-message 'step 5'"
    )


def test_every_token_used_is_hidden(tmp_path):
    repository = Repository("m", "hf_first", None)
    repository.use_token("hf_second")
    assert repository.hide("hf_first, hf_second") == "(token), (token)"
    path = tmp_path / "file"
    path.write_bytes(b"\x00hf_first\x00")
    assert repository.contains_token(path)
    assert not Repository("m", None, None).contains_token(path)


def test_messages_of_failures_do_not_show_the_token(caplog):
    queue = PushQueue(FakeRepository(RefusedError("bad credentials hf_token")))
    queue.submit(upload_named("m"))
    queue.wait_until_done()
    assert "bad credentials (token)" in caplog.text and "hf_token" not in caplog.text


def test_within_passes_results_errors_and_limits_time():
    assert within(5, lambda: 3) == 3
    with pytest.raises(KeyError):
        within(5, lambda: {}["x"])
    with pytest.raises(TimeoutError, match="inner"):
        within(5, _times_out)
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.05 s"):
        within(0.05, lambda: time.sleep(1))
    assert time.monotonic() - start < 0.9


def _times_out():
    raise TimeoutError("inner")


def test_patience_grows_with_the_size():
    assert Patience(upload_seconds=10, bytes_per_second=100).limit(500) == 15
