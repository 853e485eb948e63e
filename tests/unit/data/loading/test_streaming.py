import logging
from itertools import chain
from typing import Any

import datasets
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from torch.utils.data import IterableDataset, get_worker_info

from finetune.data.loading.stream_source import has_shuffle_buffer, why_not_resumable
from finetune.data.loading.streaming import StreamLoader
from finetune.data.preparation.packing import pack_dataset
from finetune.data.preparation.pipeline import prepare_split
from finetune.data.preparation.settings import DataSettings
from finetune.errors import CheckpointError, DataFormatError


class Plain(IterableDataset):
    """A stream without a state; worker w reads every W-th row, so workers run dry at different times."""

    def __init__(self, num_rows):
        self.num_rows, self.seen_epochs = num_rows, []

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        for i in range(first, self.num_rows, step):
            yield 1000 * getattr(self, "epoch", 0) + i


class Stateful(Plain):
    """A stream that knows its place and counts what it reads; any state restarts it behind the row it names."""

    def __init__(self, num_rows):
        super().__init__(num_rows)
        self.position, self.num_read = 0, 0

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]

    def __iter__(self):
        rows = list(super().__iter__())
        while self.position < len(rows):
            self.position += 1
            self.num_read += 1
            yield rows[self.position - 1]
        self.position = 0


def hub_stream(num_rows=37, num_shards=4, buffer=None):
    stream = Dataset.from_dict({"x": list(range(num_rows))}).to_iterable_dataset(num_shards=num_shards)
    return stream if buffer is None else stream.shuffle(seed=3, buffer_size=buffer)


def packable():
    return Dataset.from_dict({"x": [[i] * (i % 5 + 1) for i in range(60)]}).to_iterable_dataset(num_shards=2)


def collate(rows):
    """A packed row is told by its first token."""
    values = [row["x"] if isinstance(row, dict) else row for row in rows]
    return {"x": torch.tensor([int(value[0]) if hasattr(value, "__len__") else value for value in values])}


def loader(stream, batch_size=3, **kwargs):
    return StreamLoader(stream, batch_size=batch_size, collate_fn=collate, **kwargs)


def rows(batches):
    return [batch["x"].tolist() for batch in batches]


STREAMS = {
    "stateful": lambda: Stateful(37),
    "datasets": hub_stream,
    "shuffled": lambda: hub_stream(buffer=8),
    "packed": lambda: pack_dataset(packable(), 8, map_kwargs={"batch_size": 7}),
    "packed and shuffled": lambda: pack_dataset(packable(), 8, map_kwargs={"batch_size": 7}).shuffle(
        seed=3, buffer_size=4
    ),
    "mapped": lambda: hub_stream().map(lambda b: {"x": [v * 2 for v in b["x"]]}, batched=True, batch_size=5),
}


@pytest.mark.parametrize("name", STREAMS)
def test_interrupted_equals_uninterrupted_at_every_batch(name):
    whole = loader(STREAMS[name]())
    epochs = [rows(whole), rows(whole)]
    assert (epochs[0] == epochs[1]) == (name in ("datasets", "mapped", "packed"))
    for epoch in (0, 1):
        for stop in range(len(epochs[epoch])):
            first = loader(STREAMS[name]())
            first.set_epoch(epoch)
            batches = iter(first)
            seen = [next(batches)["x"].tolist() for _ in range(stop)]
            state = first.state_dict()
            del batches
            second = loader(STREAMS[name]())
            second.load_state_dict(state)
            assert seen + rows(second) == epochs[epoch], (epoch, stop)


@pytest.mark.parametrize("name", ["datasets", "shuffled"])
@pytest.mark.parametrize("num_workers", [2, 3])
def test_interrupted_equals_uninterrupted_with_workers(name, num_workers):
    """37 rows in 4 shards for 3 workers: one worker has twice as much to read as the others."""
    whole = loader(STREAMS[name](), num_workers=num_workers)
    expected = rows(whole)
    assert sorted(chain(*expected)) == list(range(37))
    for stop in (1, 4, 5, len(expected) - 1):
        first = loader(STREAMS[name](), num_workers=num_workers, prefetch_factor=3)
        batches = iter(first)
        seen = [next(batches)["x"].tolist() for _ in range(stop)]
        state = first.state_dict()
        batches.close()
        second = loader(STREAMS[name](), num_workers=num_workers)
        second.load_state_dict(state)
        assert seen + rows(second) == expected, stop


def test_resuming_reads_no_row_again():
    stream = Stateful(30)
    first = loader(stream)
    batches = iter(first)
    for _ in range(5):
        next(batches)
    other = Stateful(30)
    second = loader(other)
    second.load_state_dict(first.state_dict())
    assert rows(second)[0] == [15, 16, 17]
    assert other.num_read == 15


def test_state_is_plain_and_loads_with_weights_only(tmp_path):
    first = loader(hub_stream(buffer=8))
    next(iter(first))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == first.state_dict()


def test_the_epoch_after_a_resumed_one_is_whole():
    for num_workers, persistent in ((0, False), (2, True)):
        make = lambda: loader(hub_stream(buffer=8), num_workers=num_workers, persistent_workers=persistent)  # noqa: B023, E731
        whole = make()
        epochs = [rows(whole) for _ in range(3)]
        first = make()
        batches = iter(first)
        for _ in range(4):
            next(batches)
        state = first.state_dict()
        batches.close()
        second = make()
        second.load_state_dict(state)
        assert [rows(second), rows(second), rows(second)] == [epochs[0][4:], *epochs[1:]]
        assert epochs[0] != epochs[1]


def test_a_position_of_another_epoch_is_dropped():
    """A checkpoint written at the end of an epoch resumes at the start of the next one."""
    first = loader(Stateful(10))
    rows(first)
    second = loader(Stateful(10))
    second.load_state_dict(first.state_dict())
    second.set_epoch(1)
    assert rows(second) == rows(first)


def test_a_stream_without_state_is_read_again(caplog):
    first = loader(Plain(20), batch_size=4)
    batches = iter(first)
    for _ in range(3):
        next(batches)
    state = first.state_dict()
    second = loader(Plain(20), batch_size=4)
    with caplog.at_level(logging.WARNING):
        second.load_state_dict(state)
    assert "Reading 12 rows" in caplog.text and "`Plain` has no `state_dict`" in caplog.text
    assert rows(second) == rows(loader(Plain(20), batch_size=4))[3:]


def test_a_stream_without_state_that_changed_is_noticed():
    first = loader(Plain(20))
    batches = iter(first)
    next(batches)
    shorter = loader(Plain(5))
    shorter.load_state_dict(first.state_dict())
    with pytest.raises(CheckpointError, match="does not continue with the batch"):
        rows(shorter)


@pytest.mark.parametrize("workers", [0, 3])
def test_batches_are_skipped_where_no_position_was_saved(workers, caplog):
    """Workers of `Plain` run dry at different times, so the skipped batches are counted, not calculated."""
    whole = rows(loader(Plain(11), num_workers=workers))
    for skipped in (1, len(whole) - 1, len(whole) + 5):
        caplog.clear()
        later = loader(Plain(11), num_workers=workers)
        later.skip(skipped)
        assert f"Reading {skipped} batches" in caplog.text
        assert [rows(later), rows(loader(Plain(11), num_workers=workers))] == [whole[skipped:], whole]
    assert later.state_dict()["batches"] == len(whole)


def test_reading_a_shuffled_stream_again_is_said(caplog):
    first = loader(hub_stream(buffer=8))
    batches = iter(first)
    next(batches)
    loader(hub_stream(buffer=8)).load_state_dict(first.state_dict())
    assert "shuffle buffer" in caplog.text and "Reading 3 rows" in caplog.text


def test_changed_data_is_noticed_at_the_first_batch():
    first = loader(Stateful(20))
    batches = iter(first)
    next(batches)
    state = first.state_dict()

    class Changed(Stateful):
        def __iter__(self):
            yield from (row + 1 for row in super().__iter__())

    second = loader(Changed(20))
    second.load_state_dict(state)
    with pytest.raises(CheckpointError, match="does not continue with the batch that was next"):
        next(iter(second))
    second = loader(Changed(20))
    second.load_state_dict(state, verify=False)
    assert next(iter(second))["x"].tolist() == [4, 5, 6]
    shorter = loader(Stateful(3))
    shorter.load_state_dict(state)
    with pytest.raises(CheckpointError, match="does not continue"):
        rows(shorter)


def test_another_number_of_workers_is_refused():
    first = loader(hub_stream(), num_workers=2)
    batches = iter(first)
    next(batches)
    state = first.state_dict()
    batches.close()
    with pytest.raises(CheckpointError, match=r"2 worker.*asks for 1"):
        loader(hub_stream()).load_state_dict(state)


@pytest.mark.parametrize("num_rows", range(1, 20))
def test_processes_share_every_batch_and_stay_in_step(num_rows):
    loaders = [loader(Plain(num_rows), batch_size=2, rank=r, world_size=3) for r in range(3)]
    shares = []
    iterators = [iter(one) for one in loaders]
    for parts in zip(*iterators, strict=True):
        assert len({part["x"].shape for part in parts}) == 1
        gathered = torch.cat([part["x"] for part in parts]).tolist()
        if loaders[0].end_of_dataloader:
            gathered = gathered[: loaders[0].remainder]
        shares += gathered
    assert shares == list(range(num_rows))


def test_short_batches_of_workers_are_marked_for_gathering():
    """Two workers with 5 rows each, two processes: both workers end with a batch that was filled up."""
    loaders = [loader(Plain(10), batch_size=2, rank=r, world_size=2, num_workers=2) for r in range(2)]
    shares = []
    for parts in zip(*map(iter, loaders), strict=True):
        gathered = torch.cat([part["x"] for part in parts]).tolist()
        shares += gathered[: loaders[0].remainder] if loaders[0].end_of_dataloader else gathered
    assert sorted(shares) == list(range(10))


def test_position_carries_over_to_another_number_of_processes():
    first = loader(Stateful(24), batch_size=2, rank=0, world_size=2)
    batches = iter(first)
    for _ in range(3):
        next(batches)
    alone = loader(Stateful(24), batch_size=4)
    alone.load_state_dict(first.state_dict())
    assert rows(alone)[0] == [12, 13, 14, 15]


def test_drop_last_length_and_epoch():
    class Sized(Plain):
        def __len__(self):
            return self.num_rows

    assert rows(loader(Sized(7), drop_last=True)) == [[0, 1, 2], [3, 4, 5]]
    assert len(loader(Sized(7), drop_last=True)) == 2 and len(loader(Sized(7))) == 3
    assert len(loader(Sized(13), world_size=2)) == 3
    with pytest.raises(TypeError):
        len(loader(Plain(7)))
    with pytest.raises(TypeError):
        len(loader(hub_stream()))
    advancing = loader(Plain(3), num_workers=1, persistent_workers=True)
    assert rows(advancing) + rows(advancing) == [[0, 1, 2], [1000, 1001, 1002]]


def test_works_with_gradient_state_and_device():
    from accelerate.state import GradientState

    state = GradientState()
    one = loader(Plain(7), gradient_state=state, device=torch.device("meta"))
    ends = []
    for batch in one:
        assert batch["x"].device.type == "meta" and state.active_dataloader is one
        ends.append((state.end_of_dataloader, state.remainder))
    assert ends == [(False, -1), (False, -1), (True, 1)]
    assert not state.in_dataloader


def test_abandoned_iteration_leaves_the_gradient_state():
    from accelerate.state import GradientState

    state = GradientState()
    batches = iter(loader(Plain(7), gradient_state=state))
    next(batches)
    batches.close()
    assert not state.in_dataloader


def test_what_can_be_resumed():
    assert why_not_resumable(hub_stream()) is None
    assert "shuffle buffer" in (why_not_resumable(hub_stream(buffer=4)) or "")
    assert has_shuffle_buffer(hub_stream(buffer=4).map(lambda row: row).filter(bool))
    assert not has_shuffle_buffer(Plain(3))


def _late(bad: Any) -> Any:
    def rows() -> Any:
        for number in range(120):
            yield bad if number == 100 else {"text": "the cat"}

    return datasets.IterableDataset.from_generator(rows)


def _late_not_utf8() -> Any:
    values = pa.array([b"the cat"] * 100 + [b"\xff\xfe"] + [b"the mat"] * 9)
    text = pa.Array.from_buffers(pa.string(), len(values), values.buffers())
    return datasets.Dataset(pa.table({"text": text})).to_iterable_dataset()


@pytest.mark.parametrize(
    ("stream", "found"),
    [
        (_late_not_utf8, "text that is not UTF-8"),
        (lambda: _late({"text": "a\ud800"}), "not Unicode"),
        (lambda: _late({"text": None}), "`text` is None"),
        (lambda: _late({"text": b"the cat"}), "`bytes`"),
        (lambda: _late("the cat"), "`str`, expected a dictionary"),
        (lambda: _late(None), "None, expected a dictionary"),
    ],
    ids=["not utf-8", "surrogate", "none", "bytes", "no dictionary", "no row"],
)
def test_a_bad_row_far_into_a_stream_is_named(chat_tokenizer: Any, stream: Any, found: str) -> None:
    split = prepare_split(stream(), chat_tokenizer, DataSettings(max_length=16), say=lambda line: None)
    with pytest.raises(DataFormatError, match=f"Row 100 of the train dataset.*{found}"):
        list(StreamLoader(split.dataset, batch_size=4, collate_fn=list))


def test_an_error_of_the_stream_itself_is_passed_on(chat_tokenizer: Any) -> None:
    def rows() -> Any:
        yield from [{"text": "the cat"}] * 100
        raise TypeError("mine")

    stream = datasets.IterableDataset.from_generator(rows)
    split = prepare_split(stream, chat_tokenizer, DataSettings(max_length=16), say=lambda line: None)
    with pytest.raises(TypeError, match="mine"):
        list(StreamLoader(split.dataset, batch_size=4, collate_fn=list))
