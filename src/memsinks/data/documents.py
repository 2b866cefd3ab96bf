"""A document: one text and what its owner knows about it."""

from __future__ import annotations

import hashlib
import json
import operator
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from memsinks.batch import ISOLATIONS
from memsinks.checks import is_int
from memsinks.data.messages import checked_messages, text_of
from memsinks.errors import DataError

SELDOM = ("messages", "prompt", "extra")
"""Fields of a document that few have; files leave them out where a document has none."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text, or a chat, and what its owner knows about it.

    All of a text is learned. A question with its answer is ``Document(question + answer, prompt=len(question))``, a chat is
    ``Document(messages=[{"role": "user", "content": ...}, ...])``, of which the messages of the assistant are learned.

    Args:
        text: the text itself, never changed after reading. Of a chat it is made from `messages`, a line ``role: content`` each.
            Identity and matching go by it, so neither depends on the tokenizer.
        key: the owner's name for the document (a file name, a database key).
        source: where it came from (a site, a licensor).
        copies: how often it stands in the training corpus; 0 = held-out control, never trained on.
        kind: a free label used by reports, e.g. "story", "record", "canary".
        isolation: what it may teach the shared weights, "gated", "exact" or "private", see `batch.ISOLATIONS`; None = what the
            model's settings say.
        messages: of a chat, {"role": ..., "content": ...} each; other keys are for the chat template. None = a text.
        prompt: how much is given and not learned: characters of a text, messages of a chat.
        cluster: the name of the near copies that it is one of, see `cluster_documents`; None = it is like no other.
        extra: other columns, by name (a license, an address); nothing here looks at them.

    Raises:
        DataError: messages that are none, a text beside them that is another, or a prompt that leaves nothing to learn.
    """

    text: str = ""
    key: str | None = None
    source: str | None = None
    copies: int = 1
    kind: str = "text"
    isolation: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    prompt: int = 0
    cluster: str | None = None
    extra: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.messages is not None:
            messages = checked_messages(self.messages)
            text = text_of(messages)
            if self.text not in ("", text):
                raise DataError(
                    f"a document has text or messages; these messages are {text!r:.80}, got {self.text!r:.80}"
                )
            object.__setattr__(self, "messages", messages)
            object.__setattr__(self, "text", text)
        if self.messages is not None or self.prompt != 0:
            whole = self.text if self.messages is None else self.messages
            if not is_int(self.prompt) or not 0 <= self.prompt < len(whole):
                what = "characters" if self.messages is None else "messages"
                raise DataError(f"prompt must leave some of the {len(whole)} {what} to learn, got {self.prompt!r}")


def as_documents(documents: Iterable[Document | str]) -> list[Document]:
    """Documents, and texts as documents of one copy, in a list.

    Raises:
        DataError: one str instead of many, another type, or an empty text; names the first ones.
    """
    if isinstance(documents, str):
        raise DataError("documents must be many documents or texts, got one str; put it into a list")
    given = list(documents)
    found = [Document(x) if isinstance(x, str) else x for x in given]
    problems = []
    for index, document in enumerate(found):
        if not isinstance(document, Document) or not isinstance(document.text, str):
            problems.append(f"document {index} must be a Document or a str, got {type(given[index]).__name__}")
        elif not document.text:
            problems.append(f"document {index} is empty; leave it out")
        elif document.isolation is not None and document.isolation not in ISOLATIONS:
            problems.append(
                f"the isolation of document {index} must be one of {sorted(ISOLATIONS)} or None, got {document.isolation!r}"
            )
        if len(problems) == 5:
            break
    if problems:
        raise DataError("; ".join(problems))
    return found


def utf8(text: str, what: str) -> bytes:
    """`text` as UTF-8; DataError if it has lone surrogates, which have none. `what` begins the message."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} has a lone surrogate at character {error.start} and cannot be written as UTF-8; "
            'replace it, e.g. by text.encode("utf-8", "replace").decode()'
        ) from error


def cut_documents(documents: Iterable[Document], characters: int) -> Iterator[Document]:
    """Pieces of at most `characters` characters, each a document of its own with the key "key#0", "key#1", ...

    Cuts fall on white space, which is dropped there; a longer run without any is cut within. Copies, source and kind are
    those of the whole; without a key the pieces have none either.

    Raises:
        DataError: `characters` is less than 1; a document with messages or a prompt.
    """
    if characters < 1:
        raise DataError(f"documents are cut into pieces of at least 1 character, got {characters}")
    for document in documents:
        if document.messages is not None or document.prompt:
            raise DataError(
                f"only plain text is cut into pieces; this document has messages or a prompt: {document.text!r:.80}"
            )
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


def write_documents(path: str | os.PathLike[str], documents: Iterable[Document]) -> None:
    """Write documents as .jsonl with all their fields; `load_documents` gives them back.

    `read_documents` reads the file too (``copies_field="copies"``, ``key_field="key"`` where all have keys), but for `kind`, and
    chats and prompts as plain text.

    Raises:
        DataError: a text that cannot be written as UTF-8; what stands at `path` is then as it was.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        with part.open("wb") as file:
            for index, document in enumerate(documents):
                file.write(_line(document, index))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _line(document: Document, index: int) -> bytes:
    try:
        values = asdict(document) | {"copies": operator.index(document.copies)}
        values = {name: value for name, value in values.items() if value or name not in SELDOM}
        return json.dumps(values, ensure_ascii=False).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise DataError(f"document {index} cannot be written: {error}") from error


def load_documents(path: str | os.PathLike[str]) -> list[Document]:
    """The documents of a file of `write_documents`, equal to those written.

    Raises:
        DataError: a line that is none of its lines; names file and line.
    """
    names = {field.name for field in fields(Document)}
    at_first = names - {"isolation", "cluster", *SELDOM}
    documents = []
    with Path(path).open("rb") as file:  # lines end with \n alone, and a text may hold other line ends
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{path}, line {number}: damaged or cut short ({error}); write the file again"
                ) from error
            if not isinstance(row, dict) or not at_first <= row.keys() <= names:
                raise DataError(
                    f"{path}, line {number}: not written by write_documents; use read_documents, which takes any fields"
                )
            documents.append(Document(**row))
    return documents


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
