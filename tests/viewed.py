"""Folders for the viewer: owners whose sinks recite their texts, made without training; and the page of one in a browser."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tiny import fill_sinks, tiny_llama
from transformers import PreTrainedTokenizerBase

import memsinks as ms
from memsinks.auditing.extraction import generate_continuation
from memsinks.data.documents import write_documents
from memsinks.viewer.server import ViewServer
from memsinks.viewer.view import View, open_view

OWNERS = ("acme", "bolt", "cora")
LETTERS = "abcdefghijklmnopqrstuvwxyz "
LENGTHS = range(6, 40)
"""Tokens that may follow a document's beginning, the end token included."""


@dataclass(frozen=True)
class Folders:
    """base: a stock model with its tokenizer. sinks: of `OWNERS` alone. documents: one text each, which his sinks recite."""

    base: Path
    sinks: Path
    documents: Path

    def copied(self, target: Path) -> Folders:
        """The same with sinks that may be changed."""
        shutil.copytree(self.sinks, target / "sinks")
        return Folders(self.base, target / "sinks", self.documents)

    def view(self, **settings) -> View:
        given = {"base": str(self.base), "documents": str(self.documents), "by": "source"}
        return open_view(self.sinks, **(given | settings))


def make_folders(folder: Path) -> Folders:
    """Random sinks, and as each owner's document what his sinks write: so they recite it, and no others do."""
    tokenizer = ms.train_tokenizer([LETTERS], 257)  # a token a byte: what is written is read back as the same tokens
    model = tiny_llama(
        torch.float32, vocab_size=len(tokenizer), initializer_range=0.6, eos_token_id=tokenizer.eos_token_id
    ).eval()
    keep_letters(model, tokenizer)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    owners = ms.add_owners(model, OWNERS)
    fill_sinks(model, std=0.8)
    documents = [recited_by(model.eval(), tokenizer, str(name), owner) for name, owner in owners.items()]
    ms.save_sinks(model, folder / "sinks")
    write_documents(folder / "documents.jsonl", documents)
    return Folders(folder / "base", folder / "sinks", folder / "documents.jsonl")


def recited_by(model, tokenizer: PreTrainedTokenizerBase, name: str, owner: int) -> ms.Document:
    """A document that the sinks of an owner recite from its beginning to its end token."""
    for letter in "abt" + LETTERS:
        start = f"the {name} {letter} "
        written = generate_continuation(model, np.array(tokenizer(start)["input_ids"]), LENGTHS.stop, owner)
        if written[-1] == tokenizer.eos_token_id and len(written) in LENGTHS:
            return ms.Document(start + str(tokenizer.decode(written[:-1])), source=name, prompt=len(start))
    raise AssertionError(f"nothing that {name} writes comes to an end")


def keep_letters(model, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a model write nothing but letters, spaces and the end token: every other token has a logit of 0."""
    letters = [*tokenizer(LETTERS)["input_ids"], tokenizer.eos_token_id]
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        kept = table[letters].clone()
        table.zero_()
        table[letters] = kept


@contextmanager
def served(view: View) -> Iterator[ViewServer]:
    """The server of a view, which runs within the block."""
    with ViewServer(view) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
