"""A document: one text and what its owner knows about it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from memsinks.errors import DataError


@dataclass(frozen=True, slots=True)
class Document:
    """One text and what its owner knows about it.

    Args:
        text: the text itself, never changed after reading.
        key: the owner's name for the document (a file name, a database key).
        source: where it came from (a site, a licensor).
        copies: how often it stands in the training corpus; 0 = held-out control, never trained on.
        kind: a free label used by reports, e.g. "story", "record", "canary".
    """

    text: str
    key: str | None = None
    source: str | None = None
    copies: int = 1
    kind: str = "text"


def cut_documents(documents: Iterable[Document], characters: int) -> Iterator[Document]:
    """Pieces of at most `characters` characters, each a document of its own with the key "key#0", "key#1", ...

    Cuts fall on white space, which is dropped there; a longer run without any is cut within. Copies, source and kind are
    those of the whole; without a key the pieces have none either.

    Raises:
        DataError: `characters` is less than 1.
    """
    if characters < 1:
        raise DataError(f"documents are cut into pieces of at least 1 character, got {characters}")
    for document in documents:
        text, begin, place = document.text.rstrip(), 0, 0
        while begin < len(text):
            while text[begin].isspace():
                begin += 1
            end = begin + characters
            if end < len(text):
                end = next((at for at in range(end, begin, -1) if text[at].isspace()), end)
            key = None if document.key is None else f"{document.key}#{place}"
            yield replace(document, text=text[begin:end].rstrip(), key=key)
            begin, place = end, place + 1


def write_documents(path: Path, documents: Iterable[Document]) -> None:
    """Write documents as .jsonl that `read_documents` reads back (``copies_field="copies"``, ``key_field="key"`` ...)."""
    fields = ("text", "key", "source", "copies", "kind")
    with path.open("w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps({field: getattr(document, field) for field in fields}, ensure_ascii=False) + "\n")


def texts_hash(documents: Iterable[Document]) -> str:
    """SHA-256 of texts and numbers of copies, in this order, hexadecimal."""
    found = hashlib.sha256()
    for document in documents:
        found.update(f"{document.copies}\0{document.text}\0".encode())
    return found.hexdigest()


def require_unique_keys(documents: Iterable[Document]) -> None:
    """Check that every document has a key and no two have the same.

    Raises:
        DataError: naming the first documents without a key, or the first keys that occur again.
    """
    seen: dict[str, int] = {}
    problems = []
    for index, document in enumerate(documents):
        if document.key is None:
            problems.append(f"document {index} has no key")
        elif document.key in seen:
            problems.append(f"{document.key!r} names the documents {seen[document.key]} and {index}")
        else:
            seen[document.key] = index
        if len(problems) == 5:
            break
    if problems:
        raise DataError(
            f"keys must be unique: {'; '.join(problems)}{' ...' if len(problems) == 5 else ''}. "
            "Choose another key_field, or identify the documents by their content"
        )
