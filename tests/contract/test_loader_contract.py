"""Our loaders against those of the installed transformers.Trainer: same batches, same use of the random generator."""

import copy
from itertools import chain

import pytest
import torch
import transformers
from datasets import Dataset
from torch.utils.data import IterableDataset, RandomSampler

from finetune.data.columns import remove_unused_columns, signature_columns
from finetune.data.loading import loader as ours
from finetune.data.loading import position
from finetune.data.loading.collate import DataCollatorForLanguageModeling
from finetune.data.loading.digest import rows_digest
from finetune.data.loading.streaming import StreamLoader


def tiny_model():
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    return transformers.LlamaForCausalLM(config)


def rows(n=23, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (n,), generator=generator).tolist()
    return Dataset.from_dict(
        {"input_ids": [[i % 60 + 1] * k for i, k in enumerate(lengths)], "length": lengths, "note": ["x"] * n}
    )


class Stream(IterableDataset):
    def __init__(self, n):
        self.n = n

    def __iter__(self):
        yield from ({"input_ids": [i + 1, i + 2]} for i in range(self.n))


def theirs_and_ours(tmp_path, dataset, evaluate=False, **kwargs):
    """Returns transformers' loader and ours, each made right after the seed was set, as a Trainer does."""
    args = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=3, per_device_eval_batch_size=3, report_to=[], use_cpu=True, **kwargs
    )
    collator = DataCollatorForLanguageModeling(pad_token_id=0)
    trainer = transformers.Trainer(
        tiny_model(), args, train_dataset=dataset, eval_dataset=dataset, data_collator=collator
    )
    theirs = trainer.get_eval_dataloader() if evaluate else trainer.get_train_dataloader()
    if isinstance(dataset, Dataset):
        kept = remove_unused_columns(dataset, signature_columns(trainer.model, trainer.label_names))
    else:
        kept = dataset
    sampler = (ours.eval_sampler if evaluate else ours.train_sampler)(dataset, args)
    mine = ours.build_dataloader(
        kept,
        args=args,
        accelerator=trainer.accelerator,
        collate_fn=collator,
        batch_size=3,
        sampler=sampler,
        is_training=not evaluate,
    )
    return theirs, mine


def consume(loader, num_epochs=2, manual=True):
    """Returns all batches of some epochs and the state of the global generator afterwards."""
    torch.manual_seed(11)
    batches = []
    for epoch in range(num_epochs):
        if manual:
            loader.set_epoch(epoch)
            inner = getattr(loader.batch_sampler, "batch_sampler", None)
            if hasattr(inner, "set_epoch"):
                inner.set_epoch(epoch)
        batches.append([])
        for batch in loader:
            torch.rand(1)  # dropout between two fetches
            batches[-1].append(copy.deepcopy(batch))
    return batches, torch.get_rng_state()


def assert_same(left, right):
    assert [len(epoch) for epoch in left] == [len(epoch) for epoch in right]
    for a, b in zip(chain(*left), chain(*right), strict=True):
        assert set(a) == set(b)
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"data_seed": 5},
        {"seed": 7},
        {"dataloader_drop_last": True},
        {"train_sampling_strategy": "sequential"},
        {"train_sampling_strategy": "batch_rebalance", "gradient_accumulation_steps": 2},
        {"dataloader_num_workers": 2},
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
    ],
    ids=str,
)
def test_training_batches_and_generator_equal_transformers(tmp_path, kwargs):
    theirs, mine = theirs_and_ours(tmp_path, rows(), **kwargs)
    (a, state_a), (b, state_b) = consume(theirs), consume(mine)
    assert_same(a, b)
    assert torch.equal(state_a, state_b)
    shuffled = kwargs.get("train_sampling_strategy") != "sequential"
    assert shuffled == (not torch.equal(a[0][0]["input_ids"], a[1][0]["input_ids"]))


def test_epochs_advance_by_themselves_as_in_transformers(tmp_path):
    """A training loop of one's own, `for batch in trainer.get_train_dataloader()`, calls no `set_epoch`."""
    theirs, mine = theirs_and_ours(tmp_path, rows())
    (a, _), (b, _) = consume(theirs, manual=False), consume(mine, manual=False)
    assert_same(a, b)
    assert not torch.equal(a[0][0]["input_ids"], a[1][0]["input_ids"])


@pytest.mark.parametrize("kwargs", [{}, {"train_sampling_strategy": "group_by_length"}], ids=str)
def test_evaluation_batches_equal_transformers(tmp_path, kwargs):
    theirs, mine = theirs_and_ours(tmp_path, rows(), evaluate=True, **kwargs)
    (a, state_a), (b, state_b) = consume(theirs, 1), consume(mine, 1)
    assert_same(a, b)
    assert torch.equal(state_a, state_b)


@pytest.mark.parametrize("make", [lambda: Stream(11), lambda: rows().to_iterable_dataset()], ids=["torch", "datasets"])
def test_stream_batches_and_generator_equal_transformers(tmp_path, make):
    theirs, mine = theirs_and_ours(tmp_path, make(), max_steps=4, remove_unused_columns=False)
    (a, state_a), (b, state_b) = consume(theirs), consume(mine)
    assert_same(a, b)
    assert torch.equal(state_a, state_b)
    assert isinstance(mine, StreamLoader)


def test_length_grouped_uses_transformers_grouping(tmp_path):
    """Only the shuffle differs: theirs depends on what was drawn before, ours on (seed, epoch)."""
    pt_utils = pytest.importorskip("transformers.trainer_pt_utils")
    dataset = rows(101)
    args = transformers.TrainingArguments(
        str(tmp_path), train_sampling_strategy="group_by_length", per_device_train_batch_size=3, use_cpu=True
    )
    sampler = ours.train_sampler(dataset, args)
    sampler.set_epoch(4)
    generator = torch.Generator().manual_seed(args.seed + 4)
    expected = pt_utils.get_length_grouped_indices(list(dataset["length"]), 3, generator=generator)
    assert list(sampler) == expected


@pytest.mark.parametrize("start", [0, 1, 5, 7])
def test_skipping_equals_transformers_skipping(tmp_path, start):
    from accelerate import skip_first_batches

    theirs, mine = theirs_and_ours(tmp_path, rows())
    (a, state_a), (b, state_b) = (
        consume(skip_first_batches(theirs, start), 1),
        consume(position.skip_batches(mine, start), 1),
    )
    assert_same(a, b)
    assert torch.equal(state_a, state_b)
    assert len(b[0]) == 8 - start


def test_a_random_sampler_of_a_subclass_is_ordered_and_skipped_too(tmp_path):
    """An override may return `RandomSampler`; accelerate makes it seedable, and we still know its order."""
    theirs, mine = theirs_and_ours(tmp_path, rows())
    assert isinstance(theirs.batch_sampler.sampler, RandomSampler)
    theirs.set_epoch(1)
    whole = [batch["input_ids"] for batch in theirs]
    theirs.set_epoch(1)
    skipped = position.skip_batches(theirs, 3)
    skipped.set_epoch(1)
    assert all(torch.equal(x, y["input_ids"]) for x, y in zip(whole[3:], skipped, strict=True))
    following = [position.following_rows(loader, 3, 1) for loader in (theirs, mine)]
    assert rows_digest(theirs.dataset, following[0]) == rows_digest(mine.dataset, following[1])
    assert position.loader_state(theirs) == position.loader_state(mine)
