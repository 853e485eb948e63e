"""Mistakes that people make with `SFTTrainer`, and what they are told."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import GPT2Config, GPT2LMHeadModel

import finetune
from finetune.errors import ArgumentError, DataFormatError, ModelLoadError

ROWS = [{"text": "the cat sat on a mat"}] * 4


def make(model: Any, tokenizer: Any, out: Path, rows: Any = None, **kwargs: Any) -> finetune.SFTTrainer:
    options = {"report_to": "none", "use_cpu": True, "max_steps": 1, "disable_tqdm": True, **kwargs.pop("options", {})}
    return finetune.SFTTrainer(
        model=model,
        args=finetune.SFTConfig(str(out), **options),
        train_dataset=Dataset.from_list(ROWS) if rows is None else rows,
        processing_class=tokenizer,
        **kwargs,
    )


def test_tokens_without_a_row_in_the_embedding_are_named(tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_llama(vocab_size=len(chat_tokenizer))
    chat_tokenizer.add_tokens(["<tool>", "<end>"])
    make(model, chat_tokenizer, tmp_path)  # a token that no row has does no harm
    rows = Dataset.from_list([*ROWS, {"text": "the <tool> sat"}])
    with pytest.raises(ArgumentError, match=r"'<tool>'.*resize_token_embeddings"):
        make(model, chat_tokenizer, tmp_path, rows)
    with pytest.raises(ArgumentError, match="'<tool>'"):
        make(model, chat_tokenizer, tmp_path, eval_dataset={"a": Dataset.from_list(ROWS), "b": rows})
    model.resize_token_embeddings(len(chat_tokenizer))
    make(model, chat_tokenizer, tmp_path, rows).train()


def test_rows_longer_than_a_model_s_learned_positions_are_refused(chat_tokenizer: Any, tmp_path: Path) -> None:
    """torch would end the run with `index out of range in self`; rotary positions have no such end."""
    settings = {"vocab_size": 512, "n_positions": 16, "n_embd": 32, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**settings))
    rows = Dataset.from_list([*ROWS, {"text": "the cat sat on a mat " * 5}])
    with pytest.raises(ArgumentError, match=r"longest row has \d+ tokens, and GPT2LMHeadModel has 16 positions.*=16`"):
        make(model, chat_tokenizer, tmp_path, rows)
    with pytest.raises(ArgumentError, match="16 positions"):
        make(model, chat_tokenizer, tmp_path, eval_dataset={"few": Dataset.from_list(ROWS), "long": rows})
    make(model, chat_tokenizer, tmp_path, rows, options={"max_length": 16}).train()
    make(model, chat_tokenizer, tmp_path, rows.to_iterable_dataset())


def test_of_packed_rows_the_longest_sample_is_what_takes_positions(chat_tokenizer: Any, tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_positions=16, n_embd=32, n_layer=1, n_head=2))
    short = Dataset.from_list(ROWS * 4)
    rows = Dataset.from_list([*ROWS, {"text": "the cat sat on a mat " * 5}])
    options = {"packing": True, "max_length": 64}
    with pytest.raises(ArgumentError, match=r"longest row has \d+ tokens, and GPT2LMHeadModel has 16 positions"):
        make(model, chat_tokenizer, tmp_path, rows, options=options)
    with pytest.raises(ArgumentError, match="16 positions"):
        make(model, chat_tokenizer, tmp_path, short, eval_dataset=rows, options=options)
    with pytest.raises(ArgumentError, match="16 positions"):
        make(model, chat_tokenizer, tmp_path, short, options={**options, "packing_strategy": "wrapped"})
    fits = make(model, chat_tokenizer, tmp_path, short, eval_dataset=short, options=options)
    assert max(map(len, fits.train_dataset["input_ids"])) > 16
    fits.train()
    make(model, chat_tokenizer, tmp_path, short, eval_dataset=short, options={"eval_packing": True, "max_length": 64})


def test_arguments_that_moved_to_the_configuration(tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"args=SFTConfig\(max_seq_length=\.\.\., packing=\.\.\.\)"):
        make(tiny_llama(vocab_size=512), chat_tokenizer, tmp_path, max_seq_length=128, packing=True)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS)}),
            "dictionary of 'train', 'test'",
        ),
        ("owner/name", "Load it first"),
    ],
)
def test_rows_that_are_no_data_set(
    rows: Any, message: str, tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(DataFormatError, match=message):
        make(tiny_llama(vocab_size=512), chat_tokenizer, tmp_path, rows)


def test_a_folder_may_be_a_path_and_its_options_are_blamed_for_themselves(
    tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    tiny_llama(vocab_size=512).save_pretrained(folder)
    chat_tokenizer.save_pretrained(folder)
    assert make(folder, None, tmp_path).processing_class.eos_token == chat_tokenizer.eos_token
    with pytest.raises(ModelLoadError, match=r"'atn_implementation'. Check .*`model_init_kwargs`"):
        make(folder, None, tmp_path, options={"model_init_kwargs": {"atn_implementation": "eager"}})


def test_an_adapter_that_was_loaded_for_inference(tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    adapter = get_peft_model(tiny_llama(vocab_size=512), LoraConfig(task_type="CAUSAL_LM"))
    adapter.save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(tiny_llama(vocab_size=512), str(tmp_path / "adapter"))
    with pytest.raises(ArgumentError, match="is_trainable=True"):
        make(model, chat_tokenizer, tmp_path).train()


def test_the_folder_of_an_adapter(tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    folder = tmp_path / "adapter"
    get_peft_model(tiny_llama(vocab_size=512), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(folder)
    chat_tokenizer.save_pretrained(folder)
    with pytest.raises(ModelLoadError, match=r"holds an adapter.*is_trainable=True.*merge_and_unload"):
        make(folder, None, tmp_path)
    tiny_llama(vocab_size=512).save_pretrained(folder)  # a whole model with an adapter beside it, which is frozen
    with pytest.raises(ArgumentError, match=r"is frozen.*is_trainable=True.*merge_and_unload"):
        make(folder, None, tmp_path).train()


def test_rows_of_another_kind_of_data_set(tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> dict[str, str]:
            return ROWS[index]

    with pytest.raises(DataFormatError, match=r"is a `Rows`, expected a `datasets.Dataset`"):
        make(tiny_llama(vocab_size=512), chat_tokenizer, tmp_path, Rows())


CHAT = [
    {"role": "user", "content": "what is"},
    {"role": "ipython", "content": "4"},
    {"role": "assistant", "content": "red"},
]


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        ([{"messages": json.dumps(CHAT)}], {}),
        ([{"talk": CHAT}], {"options": {"dataset_text_field": "talk"}}),
        ([{"question": "what is"}], {"formatting_func": lambda row: CHAT}),
    ],
    ids=["JSON", "named column", "formatting_func"],
)
def test_every_way_to_give_messages_trains_the_assistant_alone(
    rows: Any, options: dict[str, Any], tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path
) -> None:
    options = {**options, "options": {**options.get("options", {}), "assistant_only_loss": True}}
    trainer = make(tiny_llama(vocab_size=512), chat_tokenizer, tmp_path, Dataset.from_list(rows), **options)
    trained = [label for label in trainer.train_dataset[0]["labels"] if label != -100]
    assert chat_tokenizer.decode(trained) == "red<|im_end|>"


def test_token_ids_may_be_tensors(tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7]], "labels": [[-100, 6, 7]]}).with_format("torch")
    trainer = make(tiny_llama(vocab_size=512), chat_tokenizer, tmp_path, rows, eval_dataset=rows)
    assert trainer.train_dataset[0]["labels"] == [-100, 6, 7]
    trainer.train()


def test_a_loss_function_beside_dft_is_refused(tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"`compute_loss_func` .*`loss_type='dft'`"):
        make(
            tiny_llama(vocab_size=512),
            chat_tokenizer,
            tmp_path,
            options={"loss_type": "dft"},
            compute_loss_func=lambda outputs, labels, num_items_in_batch=None: outputs.loss,
        )


def test_rows_that_are_packed_already(tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    row = {"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8], "seq_lengths": [2, 2]}
    trainer = make(tiny_llama(vocab_size=512), chat_tokenizer, tmp_path, Dataset.from_list([row] * 4))
    trainer.train()
    assert trainer.audits["train"].num_rows == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": None}, "`model` is required"),
        ({"model": {"name": "x"}}, "`model` is a dict"),
        ({"train_dataset": None}, "`train_dataset` is required"),
        ({"processing_class": "gpt2"}, r"`processing_class='gpt2'` must be a tokenizer.*from_pretrained\('gpt2'\)"),
        ({"callbacks": finetune.EarlyStoppingCallback()}, r"`callbacks` must be a list.*got EarlyStoppingCallback"),
        ({"callbacks": finetune.EarlyStoppingCallback}, r"`callbacks` must be a list.*got EarlyStoppingCallback"),
        ({"formatting_func": "text"}, "`formatting_func='text'` must be a function.*`dataset_text_field`"),
        ({"peft_config": "lora"}, "`peft_config` is a str"),
        ({"options": {"report_to": "wandbb"}}, "`report_to` names 'wandbb'.*Did you mean `wandb`"),
        ({"options": {"eval_strategy": "epoch"}}, "there is no `eval_dataset`"),
        ({"options": {"optim": "galore_adamw"}}, "needs `optim_target_modules`"),
        ({"options": {"optim_args": "wrong=1"}}, "`optim_args` has `wrong`"),
        (
            {"options": {"optim": "galore_adamw", "optim_target_modules": ["q_proj"], "optim_args": "rnk=8"}},
            "`optim_args` has `rnk`.*Did you mean `rank`",
        ),
        ({"options": {"use_liger_kernel": True}}, "`use_liger_kernel`"),
    ],
)
def test_mistakes_are_found_before_rows_are_read(
    given: dict[str, Any], message: str, tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("rows were prepared")

    monkeypatch.setattr(finetune.SFTTrainer, "_prepare_dataset", fail)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    options = {"report_to": "none", "use_cpu": True, "max_steps": 1, **given.get("options", {})}
    usual = {"model": tiny_llama(vocab_size=512), "train_dataset": ROWS, "processing_class": chat_tokenizer}
    given = {name: value for name, value in given.items() if name != "options"}
    with pytest.raises(ArgumentError, match=message):
        finetune.SFTTrainer(**{**usual, "args": finetune.SFTConfig(str(tmp_path), **options), **given})


def test_the_package_of_an_optimizer_is_missed_before_rows_are_read(
    tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    monkeypatch.setattr(finetune.SFTTrainer, "_prepare_dataset", None)
    with pytest.raises(ArgumentError, match="pip install torchao"):
        make(tiny_llama(vocab_size=512), chat_tokenizer, tmp_path, options={"optim": "adamw_torch_8bit"})


def test_an_optimizer_that_the_user_brings_is_not_checked(
    tiny_llama: Any, chat_tokenizer: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    class Mine(finetune.SFTTrainer):
        def create_optimizer(self, model: Any = None) -> Any:
            self.optimizer = torch.optim.SGD(self.model.parameters())
            return self.optimizer

    options = {"optim": "galore_adamw", "report_to": "none", "use_cpu": True, "max_steps": 1, "disable_tqdm": True}
    given = {"args": finetune.SFTConfig(str(tmp_path), **options), "train_dataset": ROWS}
    given["processing_class"] = chat_tokenizer
    Mine(tiny_llama(vocab_size=512), **given)
    finetune.SFTTrainer(tiny_llama(vocab_size=512), optimizer_cls_and_kwargs=(torch.optim.SGD, {}), **given)
