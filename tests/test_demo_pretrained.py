"""The demo of deletable fine-tuning, on a tiny chat model; the example does the same in a script."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from chats import PLAIN
from pages import ROOT
from tiny import tiny_llama

import memsinks as ms
from memsinks.cli import main
from memsinks.runs import demo_pretrained as demo
from memsinks.runs.demo_pretrained import CUSTOMERS, EXPORTED, LEAVES, documents_of
from memsinks.viewer.answers import ANSWERS, STREAMS
from memsinks.viewer.view import open_view


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> Path:
    """A folder with a random chat model."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = ms.train_tokenizer([x.text for x in documents_of(CUSTOMERS)], 400)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = PLAIN
    model = tiny_llama(
        torch.float32, vocab_size=len(tokenizer), eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        max_position_embeddings=256, hidden_size=32, intermediate_size=48,
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shown(chat_model, tmp_path_factory):
    """(folder, what is saved)."""
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, demo.demo_pretrained(str(chat_model), out, epochs=3)


def test_who_leaves_was_never_there_and_the_others_stay(shown, chat_model):
    out, result = shown
    answers = result["answers"]
    assert result["base kept every bit"] is True
    assert answers["after the take-down"][LEAVES] == answers["base model"][LEAVES]
    for customer in CUSTOMERS:
        assert answers["own sinks open"][customer] != answers["base model"][customer]
        if customer != LEAVES:
            assert answers["after the take-down"][customer] == answers["own sinks open"][customer]
    assert result["exported"] == answers["own sinks open"][EXPORTED]
    left = ms.load_any(str(chat_model))
    ms.load_sinks(left, out / "sinks")
    assert list(left.sink_state.taken) == [ms.document_id(LEAVES, by="source")]
    assert all(x.ok is not False for x in ms.verify_record(result["record"], run=out / "sinks"))
    assert json.loads((out / demo.MARK).read_text()) == result
    text = demo.format_pretrained(result, out)
    assert "The base model keeps every bit" in text and LEAVES in text and "own sinks open" in text


def test_the_command_and_what_it_refuses(chat_model, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file.txt").write_text("mine")
    with pytest.raises(ms.CheckpointError, match="is not empty and not an earlier demo"):
        demo.demo_pretrained(str(chat_model), tmp_path / "mine")
    assert main(["demo", "--pretrained", str(tmp_path / "absent"), "--out", str(tmp_path / "out")]) != 0
    assert "cannot load a model from" in capsys.readouterr().err


@pytest.mark.long
def test_the_example_runs(chat_model, tmp_path):
    command = [sys.executable, str(ROOT / "examples/finetune.py"), str(chat_model), str(tmp_path / "out"), "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "the base model keeps every bit: True" in done.stdout and "exported to" in done.stdout


def test_the_viewer_shows_it(shown, chat_model):
    out, result = shown
    sinks, customer = out / "sinks", list(CUSTOMERS)[1]
    view = open_view(sinks, base=str(chat_model), documents=str(sinks / "documents.jsonl"), by="source")
    assert LEAVES not in {x.source for x in view.documents} and len(view.documents) == 6
    found = ANSWERS["search"](view, {"text": customer.upper()})
    assert [x["name"] for x in found["owners"]] == [customer] and found["counts"]["documents"] == 3
    index, (question, _) = found["documents"][0]["index"], next(iter(CUSTOMERS[customer].items()))
    assert ANSWERS["begin"](view, {"document": index})["text"] == question
    opened = [found["owners"][0]["id"]]
    for asked in ({"document": index}, {"text": question, "chat": True}):
        events = list(STREAMS["run"](view, asked | {"open": opened, "tokens": 32}))
        text = "".join(x.get("piece", "") for x in events if x["kind"] == "write" and x["column"] == "open")
        assert " ".join(text.removesuffix("<|im_end|>").split()) == result["answers"]["own sinks open"][customer][0]
