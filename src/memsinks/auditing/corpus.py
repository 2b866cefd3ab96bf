"""Documents and controls in tokens, with the ids they had in training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from memsinks.auditing.settings import AuditSettings
from memsinks.batch import NO_SINKS, is_id
from memsinks.checks import is_int
from memsinks.data.chat import encode_documents
from memsinks.data.documents import Document, as_documents, texts_hash
from memsinks.data.identity import By, identify
from memsinks.data.tokens import agreeing, encode, start_tokens
from memsinks.errors import DataError

logger = logging.getLogger(__name__)
EXACT = 2**56
"""Above this a float64 holds only multiples of 16."""
ROUNDED = 4
"""Ids above `EXACT` from which on it is no chance that all are multiples of 16 (1 in 65,536)."""


@dataclass(frozen=True)
class Corpus:
    """Documents and controls in tokens, documents first.

    tokens: int32 [tokens of the document] each. copies: int64 [n], 0 for controls. ids: int64 [n].
    start: int64 [0 or 1], the tokenizer's start token. private: for each the token at which its private part begins, or
    None where the main figure asks for `continuation` tokens after `prefix`. harmless: other text that attacks may train on,
    int32 [tokens] each; None = a part of the controls.
    """

    documents: list[Document]
    members: int
    tokens: list[np.ndarray]
    copies: np.ndarray
    ids: np.ndarray
    start: np.ndarray
    private: list[int] | None
    sha256: str
    harmless: list[np.ndarray] | None = None

    @property
    def control(self) -> np.ndarray:
        """Which entries are controls, bool [n]."""
        return np.arange(len(self.tokens)) >= self.members

    @property
    def target(self) -> np.ndarray:
        """The documents that summary figures are over, bool [n]: those with 2 copies or more, or all if there are none."""
        repeated = (self.copies > 1) & ~self.control
        return repeated if repeated.any() else ~self.control

    @property
    def target_name(self) -> str:
        """`target` in words."""
        return "all documents" if (self.target | self.control).all() else "documents with 2 copies or more"


def read_corpus(
    documents: Sequence[Document],
    controls: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    settings: AuditSettings,
    private_start: Callable[[Document], int] | None = None,
    document_ids: Sequence[int] | np.ndarray | None = None,
    harmless: Sequence[Document] | None = None,
) -> Corpus:
    """Check both sides and encode them. Documents of one text and id are one, their copies added up.

    Raises:
        DataError: an empty side, copies that are no count above 0, texts on both sides (listed), a text without tokens; a
            `private_start` outside its text; harmless texts that are among them; ids that are no integers, out of range or
            rounded, or not one for each.
    """
    documents, controls = as_documents(documents), as_documents(controls)
    _check_sides(documents, controls)
    ids = _ids([*documents, *controls], settings.by, document_ids)
    documents, controls, ids = _once_each(documents, controls, ids)
    everything = [*documents, *controls]
    if harmless is not None:
        harmless = as_documents(harmless)
        _check_harmless(harmless, everything)
    start = start_tokens(tokenizer)
    tokens = [
        x.astype(np.int32) for x in without_start(start, encode_documents(tokenizer, everything, settings.end)[0])
    ]
    private = None if private_start is None else _private(everything, tokens, tokenizer, private_start)
    copies = np.array([document.copies for document in documents] + [0] * len(controls))
    return Corpus(
        everything,
        len(documents),
        tokens,
        copies,
        ids,
        start,
        private,
        texts_hash(everything),
        None if harmless is None else without_start(start, encode_documents(tokenizer, harmless, settings.end)[0]),
    )


def without_start(start: np.ndarray, tokens: list[np.ndarray]) -> list[np.ndarray]:
    """The tokens without the start token: every window of a document is scored after one."""
    return [x[1:] if len(start) and len(x) > 1 and x[0] == start[0] else x for x in tokens]


def _once_each(
    documents: list[Document], controls: list[Document], ids: np.ndarray
) -> tuple[list[Document], list[Document], np.ndarray]:
    """Both sides and their ids with each text of an id once: equal texts are no independent evidence."""
    first: dict[Any, int] = {}
    copies: dict[int, int] = {}
    for place, (document, own) in enumerate(zip([*documents, *controls], ids.tolist(), strict=True)):
        alike = document.text, document.messages is None, document.kind, place < len(documents), own
        at = first.setdefault(alike, place)
        copies[at] = copies.get(at, 0) + document.copies
    again = len(ids) - len(first)
    if not again:
        return documents, controls, ids
    logger.warning(
        "%d texts stand more than once on their side of the audit and are taken once, with all their copies", again
    )
    members = [replace(documents[place], copies=copies[place]) for place in copies if place < len(documents)]
    left = [controls[place - len(documents)] for place in copies if place >= len(documents)]
    return members, left, ids[list(copies)]


def _check_sides(documents: Sequence[Document], controls: Sequence[Document]) -> None:
    if not documents or not controls:
        raise DataError(
            f"an audit needs both sides: {len(documents)} documents and {len(controls)} controls were given"
        )
    wrong = [document.copies for document in documents if not is_int(document.copies) or document.copies < 0]
    if wrong:
        raise DataError(
            f"copies is how often a document was trained on, a count; {len(wrong)} have others: {wrong[:3]!r:.60}"
        )
    unseen = sum(document.copies == 0 for document in documents)
    if unseen:
        raise DataError(f"{unseen} of the documents have 0 copies, so they were not trained on; give them as controls")
    both = sorted({_spaced(x) for x in documents} & {_spaced(x) for x in controls})
    if both:
        shown = ", ".join(repr(text[:60]) for text in both[:5]) + (" ..." if len(both) > 5 else "")
        raise DataError(f"{len(both)} texts are documents and controls at once, take them out of one side: {shown}")


def _spaced(document: Document) -> str:
    """The text, whatever its spaces and line ends: two that differ in nothing else are one to a memory."""
    return " ".join(document.text.split())


def _check_harmless(harmless: Sequence[Document], everything: Sequence[Document]) -> None:
    if not harmless:
        raise DataError("harmless is empty; give texts that are neither documents nor controls, or None")
    both = {_spaced(x) for x in everything} & {_spaced(x) for x in harmless}
    if both:
        raise DataError(
            f"{len(both)} harmless texts are documents or controls as well, take them out: {next(iter(both))[:60]!r}"
        )


def _private(
    documents: list[Document],
    tokens: list[np.ndarray],
    tokenizer: PreTrainedTokenizerBase,
    private_start: Callable[[Document], int],
) -> list[int]:
    """The token at which the private part of each document begins."""
    if any(document.messages is not None for document in documents):
        raise DataError(
            "private_start is a place in a text, but there are chats among the documents; leave one of them out"
        )
    offsets = [private_start(document) for document in documents]
    outside = [f"{at} of {len(x.text)}" for at, x in zip(offsets, documents, strict=True) if not 0 <= at < len(x.text)]
    if outside:
        raise DataError(
            f"private_start must lie within the text; for {len(outside)} texts it does not (offset of characters): "
            + ", ".join(outside[:5])
        )
    prompts = iter(encode(tokenizer, [x.text[:at] for at, x in zip(offsets, documents, strict=True) if at], end=False))
    return [agreeing(next(prompts), own) if at else 0 for at, own in zip(offsets, tokens, strict=True)]


def _ids(documents: list[Document], by: By, given: Any) -> np.ndarray:
    """Document ids, int64 [n]: those given, or made as in training; all -1 where a document has no such key or source, or no
    document has a cluster."""
    if given is not None:
        return _given_ids(given, len(documents))
    named = [by == "content" or getattr(document, by) is not None for document in documents]
    enough = any(named) if by == "cluster" else all(named)  # a document without a cluster is like no other
    return identify(documents, by)[0] if enough else np.full(len(documents), NO_SINKS)


def _given_ids(given: Any, count: int) -> np.ndarray:
    """Ids that somebody gives, int64 [count]; DataError unless they can be those of training."""
    values: list[Any] = given.tolist() if hasattr(given, "tolist") else list(given)
    if len(values) != count:
        raise DataError(f"{len(values)} document_ids for {count} documents and controls; give one for each")
    for place, value in enumerate(values):
        if not is_id(value, or_none=True):
            raise DataError(
                f"document_ids must be the integers of training, from 0 to 2**63 - 1 or exactly -1 for none; entry {place} "
                f"is {value!r}. An id that went through a float is another document's"
            )
    large = [value for value in values if value > EXACT]
    if len(large) >= ROUNDED and not any(value % 16 for value in large):
        raise DataError(
            f"all {len(large)} document_ids above 2**56 are multiples of 16: they went through floats, which rounds them to "
            "other ids. Read them as integers (in pandas dtype int64 or str, never a column with missing values)"
        )
    return np.array(values, np.int64)
