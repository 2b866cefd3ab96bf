"""TRL: its SFTConfig and its data train on SinkTrainer; its own trainers, which go past the model's forward, are refused."""

from __future__ import annotations

import pytest
import torch
from chats import CHAT, chat_tokenizer
from datasets import Dataset
from tiny import tiny_llama
from trainers import losses, weights
from transformers import TrainingArguments

import memsinks as ms

trl = pytest.importorskip("trl")

ANSWERED = [{"messages": [CHAT[1], {"role": "assistant", "content": f"{n} cats"}]} for n in range(8)]
PAIRS = [{"prompt": [CHAT[1]], "chosen": [CHAT[2]], "rejected": [CHAT[4]]}] * 4
LABELED = [{"prompt": [CHAT[1]], "completion": [CHAT[2]], "label": bool(n % 2)} for n in range(4)]


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer()


def model_of(tokenizer, sinks: bool = True):
    model = tiny_llama(torch.float32, vocab_size=len(tokenizer), max_position_embeddings=128)
    if sinks:
        ms.add_sinks(model, ms.SinkConfig(neurons=64, active=16, block_size=8))
    return model


def settings(folder, kind=trl.SFTConfig, **changes):
    return kind(**{
        "output_dir": str(folder), "report_to": [], "max_steps": 2, "use_cpu": True, "per_device_train_batch_size": 2,
        "bf16": False, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "learning_rate": 1e-2,
        "gradient_checkpointing": True,
    } | changes)  # fmt: skip


def test_the_data_and_settings_of_an_sft_trainer_train_on_a_sink_trainer(tokenizer, tmp_path, caplog) -> None:
    rows = ms.make_rows(ms.read_documents(Dataset.from_list(ANSWERED)), tokenizer, length=64)
    curves = []
    for kind, more in ((trl.SFTConfig, {"max_length": 64, "packing": True}), (TrainingArguments, {})):
        trainer = ms.SinkTrainer(model_of(tokenizer), settings(tmp_path, kind, **more), train_dataset=rows)
        before = weights(trainer.model)
        trainer.train()
        assert any(not torch.equal(x, before[name]) for name, x in weights(trainer.model).items())
        curves.append(losses(trainer))
    assert curves[0] == curves[1]
    (line,) = [x.getMessage() for x in caplog.records if "not looked at" in x.getMessage()]
    assert line.startswith("packing, max_length of SFTConfig")


def test_settings_for_another_loss_are_refused(tokenizer, tmp_path) -> None:
    rows = ms.make_rows(["the cat"], tokenizer, length=32)
    for args, message in (
        (settings(tmp_path, loss_type="dft"), "loss_type is 'dft'; leave it out"),
        (settings(tmp_path, trl.DPOConfig), "DPOConfig is for a loss over pairs"),
    ):
        with pytest.raises(ms.ConfigError, match=message):
            ms.SinkTrainer(model_of(tokenizer), args, train_dataset=rows)


def with_a_loss(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    "trainer", ["sft", "sft with a collator and a loss", "sft with peft", "dpo", "kto", "grpo"],
)  # fmt: skip
def test_trainers_of_trl_are_refused_before_the_first_step(tokenizer, tmp_path, monkeypatch, trainer) -> None:
    model, stock = model_of(tokenizer), model_of(tokenizer, sinks=False)
    given: dict = {"model": model, "processing_class": tokenizer}
    make, kind, data = trl.SFTTrainer, trl.SFTConfig, ANSWERED
    more: dict = {}
    if trainer == "sft with a collator and a loss":
        rows = ms.make_rows(ms.read_documents(ANSWERED), tokenizer, length=64)
        data = [{name: x.tolist() for name, x in rows[index].items()} for index in range(len(rows))]
        given |= {"data_collator": ms.collate, "compute_loss_func": with_a_loss}
        more = {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}
    elif trainer == "sft with peft":
        peft = pytest.importorskip("peft")
        given["peft_config"] = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["sinks"])
    elif trainer == "dpo":
        make, kind, data = trl.DPOTrainer, trl.DPOConfig, PAIRS
        given["ref_model"] = stock
    elif trainer == "kto":
        make, kind, data = trl.KTOTrainer, trl.KTOConfig, LABELED
        given["ref_model"] = stock
    elif trainer == "grpo":
        make, kind, data = trl.GRPOTrainer, trl.GRPOConfig, [{"prompt": [CHAT[1]]}] * 4
        given["reward_funcs"] = lambda completions, **_: [0.0] * len(completions)
        more = {"num_generations": 2, "max_completion_length": 2}
    made = make(args=settings(tmp_path, kind, **more), train_dataset=Dataset.from_list(data), **given)
    before = weights(model)
    with pytest.raises((ms.ArchitectureError, ms.DataError), match=r"memsinks\.SinkTrainer"):
        made.train()
    assert made.state.global_step == 0
    assert all(torch.equal(x, before[name]) for name, x in weights(model).items())
