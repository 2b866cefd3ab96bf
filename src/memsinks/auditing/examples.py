"""The documents that are shown in a report: their text, cut at its tokens, and how surely each model knew them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from memsinks.auditing.corpus import Corpus
from memsinks.auditing.measure import Measurement, token_probabilities
from memsinks.auditing.result import Example
from memsinks.data.documents import Document
from memsinks.data.tokens import token_offsets


def examples(
    measured: Sequence[Measurement], corpus: Corpus, tokenizer: PreTrainedTokenizerBase, count: int
) -> tuple[Example, ...]:
    """The `count` documents best known to the ordinary model where it is given, otherwise to the audited one."""
    before = next((one for one in measured if one.role == "against"), measured[0])
    shown = [one for role in ("against", "audited", "twin") for one in measured if one.role == role]
    found = []
    for index in np.argsort(before.loss[: corpus.members], kind="stable")[:count].tolist():
        document, tokens = corpus.documents[index], corpus.tokens[index]
        found.append(
            Example(
                index=index,
                copies=int(corpus.copies[index]),
                key=document.key,
                pieces=_pieces(tokenizer, document, tokens),
                probabilities={one.name: token_probabilities(one.table[index], len(tokens)) for one in shown},
            )
        )
    return tuple(found)


def _pieces(tokenizer: PreTrainedTokenizerBase, document: Document, tokens: np.ndarray) -> tuple[str, ...]:
    """The text cut at its tokens; a character of several tokens stands with the last of them, the end token is named. A chat
    is shown as its tokens are decoded one by one."""
    pieces, done, text = [], 0, document.text
    for start, end in token_offsets(tokenizer, text) if document.messages is None else ():
        following = max(done, end)
        pieces.append(text[done:following] if end > start else "")
        done = following if end > start else done
    if pieces:
        pieces[-1] += text[done:]
    pieces += [str(tokenizer.decode([int(token)])) for token in tokens[len(pieces) :]]
    return tuple(pieces)
