"""What the models of a view write after a prompt, token by token, and how well they know a document."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from memsinks.auditing.scores import score, token_statistics
from memsinks.data.chat import encode_documents
from memsinks.data.documents import Document
from memsinks.data.tokens import encode, start_tokens
from memsinks.errors import DataError
from memsinks.runs.takedown_audit import PREFIX
from memsinks.viewer.view import Column, View

MOST = 512
"""Tokens that are written at most."""
KEPT = 8
"""Tokens that are decoded together, so that characters of several tokens and spaces between words come out right."""


@dataclass(frozen=True)
class Prompt:
    """What is given to the models, and what follows in the document that it is the beginning of.

    Args:
        tokens: int64 [given], at least 1, a start token included where the tokenizer sets one.
        text: the same to read, without what a template puts around it.
        truth: int64 [rest], the end token included; None of a typed prompt.
        start: how many of `tokens` are no tokens of the document. learned: bool [tokens of the document], which were taught.
        chat: whether `text` is the message of a chat that is answered.
    """

    tokens: np.ndarray
    text: str
    truth: np.ndarray | None = None
    start: int = 0
    learned: np.ndarray | None = None
    chat: bool = False


def beginning(view: View, index: int, given: int | None = None) -> Prompt:
    """The beginning of a document: so many tokens, or what is given and not learned, or `PREFIX` tokens, half of short texts.

    Raises:
        DataError: no such document, one of a single token, or as many tokens as it has.
    """
    tokenizer = view.require_tokenizer()
    if not 0 <= index < len(view.documents):
        raise DataError(f"there is no document {index}; there are {len(view.documents)}")
    document = view.documents[index]
    tokens, start, learned = _document_tokens(tokenizer, document)
    if len(tokens) < 2:
        raise DataError(f"document {index} is a single token, so nothing follows its beginning")
    given = (_usual(learned) if given is None else given) or 1
    if not 0 < given < len(tokens):
        raise DataError(
            f"document {index} has {len(tokens)} tokens, so 1 to {len(tokens) - 1} can be given, got {given}"
        )
    text = str(tokenizer.decode(tokens[:given], clean_up_tokenization_spaces=False))
    chat = document.messages is not None and document.messages[0]["role"] == "user" and given == _usual(learned)
    if chat and document.messages:
        text = str(document.messages[0]["content"])
    return Prompt(np.concatenate([start, tokens[:given]]), text, tokens[given:], len(start), learned, chat)


def typed(view: View, text: str, chat: bool) -> Prompt:
    """A typed prompt, as it stands or as a user's message in the model's chat template; DataError for an empty one."""
    tokenizer = view.require_tokenizer()
    if not text.strip():
        raise DataError("the prompt is empty; type some text, or choose a document")
    if chat:
        message = Document(messages=({"role": "user", "content": text}, {"role": "assistant", "content": "."}))
        tokens, start, learned = _document_tokens(tokenizer, message)
        return Prompt(np.concatenate([start, tokens[: _usual(learned)]]), text, start=len(start))
    start = start_tokens(tokenizer)
    return Prompt(np.concatenate([start, encode(tokenizer, [text], end=False)[0]]), text, start=len(start))


def _document_tokens(
    tokenizer: PreTrainedTokenizerBase, document: Document
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, start token before them or none, which of the tokens are learned)."""
    (tokens,), targets = encode_documents(tokenizer, [document])
    start = start_tokens(tokenizer)
    learned = targets[0] if targets is not None and targets[0] is not None else np.ones(len(tokens), bool)
    if len(start) and tokens[0] == start[0]:
        tokens, learned = tokens[1:], learned[1:]
    return tokens, start, learned


def _usual(learned: np.ndarray) -> int:
    first = int(learned.argmax())
    return first or min(PREFIX, len(learned) // 2)


class Decoder:
    """Tokens to text, one by one: a character of several tokens comes with the last of them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int] = ()) -> None:
        """`before`: the tokens that stand before the first."""
        self._tokenizer, self._window = tokenizer, [int(x) for x in before[-KEPT:]]
        self._shown = self._decoded()

    def add(self, token: int) -> str:
        """The text that a token adds; "" within a character."""
        self._window.append(int(token))
        text = self._decoded()
        if text.endswith("\ufffd"):
            return ""
        added = text[len(self._shown) :]
        self._window = self._window[-KEPT:]
        self._shown = self._decoded()
        return added

    def _decoded(self) -> str:
        return str(self._tokenizer.decode(self._window, clean_up_tokenization_spaces=False)) if self._window else ""


def read(view: View, prompt: Prompt, ids: Sequence[int], version: int) -> Iterator[dict[str, Any]]:
    """How well each model knows the document of a prompt, a dict a column.

    Yields:
        ``column``; ``loss``, nats per learned token; ``recited``, how many tokens after the prompt come out verbatim by greedy
        decoding, of ``rest``; ``first``, index of the first token with a probability; ``p``, that of each from there on, given
        the true tokens before it; ``pieces``, the text of all tokens, in the first dict alone.
    """
    assert prompt.truth is not None and prompt.learned is not None
    tokenizer = view.require_tokenizer()
    start, given = prompt.tokens[: prompt.start], prompt.tokens[prompt.start :]
    tokens = np.concatenate([given, prompt.truth])
    decoder = Decoder(tokenizer)
    pieces: dict[str, Any] = {"pieces": [decoder.add(x) for x in tokens]}
    for column in view.columns:
        with tempfile.TemporaryDirectory(prefix="memsinks-") as scratch, view.running(column, ids, version) as model:
            one = score(model, [tokens], Path(scratch) / "scores", start=start)[0]
        after = one.between(len(given))
        assert after is not None
        wrong = np.flatnonzero(one.rank[after])
        yield {
            "column": column,
            "loss": -float(one.logprob[prompt.learned[one.first :]].mean(dtype=np.float64)),
            "recited": int(wrong[0]) if len(wrong) else len(prompt.truth),
            "rest": len(prompt.truth),
            "given": len(given),
            "first": one.first,
            "p": np.exp(one.logprob).round(4).tolist(),
            **pieces,
        }
        pieces = {}


def write(view: View, prompt: Prompt, ids: Sequence[int], most: int, version: int) -> Iterator[dict[str, Any]]:
    """What each model writes by greedy decoding, a token of each in turn.

    Yields:
        ``column``, ``piece``, ``p`` (probability of the token) and ``true`` (whether it is the document's token there, as all
        before it were; None of a typed prompt); at a column's end ``column`` and ``end``: "end", "context" or "length".

    Raises:
        DataError: a prompt that no context holds; `most` outside 1 to `MOST`.
    """
    if not 1 <= most <= MOST:
        raise DataError(f"1 to {MOST} tokens can be written at once, got {most}")
    if len(prompt.tokens) >= view.context:
        raise DataError(
            f"the prompt has {len(prompt.tokens):,} tokens, and the model reads {view.context:,} with what it writes; shorten it"
        )
    streams = {column: _stream(view, column, prompt, ids, most, version) for column in view.columns}
    while streams:
        for column, stream in list(streams.items()):
            event = next(stream)
            yield {"column": column, **event}
            if "end" in event:
                del streams[column]


def _stream(
    view: View, column: Column, prompt: Prompt, ids: Sequence[int], most: int, version: int
) -> Iterator[dict[str, Any]]:
    tokenizer = view.require_tokenizer()
    decoder, true = Decoder(tokenizer, prompt.tokens.tolist()), True
    tokens, cache = prompt.tokens, None
    room = min(most, view.context - len(prompt.tokens))
    for place in range(room):
        with view.running(column, ids, version) as model:
            rows = torch.from_numpy(tokens)[None].to(model.device)
            out = model(input_ids=rows, past_key_values=cache, use_cache=True)
            logits, cache = out.logits[:, -1:], out.past_key_values
            chosen = logits.argmax(-1)
            p = float(token_statistics(logits, chosen)[0].exp())
        token = int(chosen)
        if prompt.truth is not None:
            true = true and place < len(prompt.truth) and int(prompt.truth[place]) == token
        known = None if prompt.truth is None else true
        yield {"piece": decoder.add(token), "p": round(p, 4), "true": known}
        if token == tokenizer.eos_token_id:
            yield {"end": "end"}
            return
        tokens = np.array([token], np.int64)
    yield {"end": "length" if room == most else "context"}
