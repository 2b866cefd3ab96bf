"""Where the texts of an owner stand in the text files of a folder: the lines that are his, and files that quote him."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from memsinks.checks import is_int
from memsinks.data.documents import Document
from memsinks.data.fields import document_of
from memsinks.data.matching import SIZE, normal_form, spaceless, words
from memsinks.errors import DataError
from memsinks.removal.tombstone import Tombstone, shares_words

READABLE = (".json", ".jsonl", ".md", ".html", ".txt", ".csv", ".yaml", ".yml", ".log")
MOST_READ = 2**28
"""Bytes of a text file that is searched for the texts."""
NAMES = ("key", "source")
"""Fields of a line that say whose it is."""


class Quotes:
    """Whether a text quotes those of an owner: five words in a row of them, and texts of fewer words whole.

    Args:
        texts: of the owner. tombstone: of them; None where there is none.
    """

    def __init__(self, texts: Iterable[str], tombstone: Tombstone | None) -> None:
        self.tombstone = tombstone
        short = [x for x in {_bare(text) for text in texts if len(words(text)) < SIZE} if x]
        self.short: re.Pattern[str] | None = re.compile("|".join(map(_whole, sorted(short)))) if short else None

    def is_one(self, text: str) -> bool:
        """Whether this text shares five words in a row with one of theirs, or is a short one of them, and nothing else."""
        text = _written(text)
        if self.tombstone is not None and shares_words(text, self.tombstone):
            return True
        return self.short is not None and self.short.fullmatch(_bare(text)) is not None

    def within(self, text: str) -> bool:
        """Whether this text quotes one of theirs."""
        text = _written(text)
        if self.tombstone is not None and shares_words(text, self.tombstone):
            return True
        return self.short is not None and self.short.search(normal_form(text)) is not None

    def within_file(self, path: Path, *, whole: bool = False) -> bool:
        """Whether this file does, short texts as they are if `whole`; False for one that is not searched (`not_searched`)."""
        if path.suffix not in READABLE or not_searched(path):
            return False
        return any(map(self.is_one if whole else self.within, _texts(path, path.read_text(encoding="utf-8"))))

    def within_line(self, line: bytes) -> bool:
        """Whether a line of JSON does, in any of its fields."""
        return any(map(self.within, _strings(json.loads(line)))) if line.strip() else False


def _written(text: str) -> str:
    """A text as UTF-8 can write it: JSON may hold lone surrogates."""
    return text.encode("utf-8", "replace").decode()


def _bare(text: str) -> str:
    """A short text without the punctuation around its words, if it has words."""
    form = normal_form(text)
    kept = [at for at, character in enumerate(form) if unicodedata.category(character)[0] in "LMN"]
    return form[kept[0] : kept[-1] + 1] if kept else form


def _whole(form: str) -> str:
    """A pattern for a text that is not the middle of longer words."""
    before, after = ("" if spaceless(form[at]) else edge for at, edge in ((0, r"(?<!\w)"), (-1, r"(?!\w)")))
    return f"{before}{re.escape(form)}{after}"


def not_searched(path: Path) -> str:
    """Why a text file cannot be searched; "" where it can."""
    if path.stat().st_size > MOST_READ:
        return f"larger than {MOST_READ >> 20} MiB"
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return "not UTF-8"
    return ""


def _texts(path: Path, content: str) -> Iterator[str]:
    """The texts in a file: strings of JSON without their escapes, else all of it."""
    try:
        lines = content.split("\n") if path.suffix == ".jsonl" else [content]
        values = [json.loads(x) for x in lines if x.strip()] if path.suffix in (".json", ".jsonl") else None
    except (ValueError, RecursionError):
        values = None
    yield from _strings(values) if values is not None else [content]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


@dataclass(frozen=True)
class His:
    """Which lines of files of documents are an owner's.

    Args:
        texts: of the owner. names: (key, source) of his documents; none where a text is his whatever its line says.
        called: a field and what it says in all lines that are his, whatever their text; None where no field does.
        exact: whether another form of his text (case, white space) is another's, as it is where texts are the identity.
    """

    texts: frozenset[str] = frozenset()
    names: frozenset[tuple[Any, Any]] = frozenset()
    called: tuple[str, str] | None = None
    exact: bool = False

    @cached_property
    def forms(self) -> frozenset[str]:
        return frozenset(map(self.form, self.texts))

    def form(self, text: str) -> str:
        return text if self.exact else normal_form(text)

    def owns(self, row: Mapping[str, Any], document: Document) -> bool:
        """Whether a line is his: one that says so, or with one of his texts and with no key and no source but his, where both
        say one."""
        said = {name: says(row, name) for name in NAMES}
        if self.called is not None and said[self.called[0]] == self.called[1]:
            return True
        if self.form(document.text) not in self.forms:
            return False
        return not self.names or any(
            all(x is None or y is None or x == y for x, y in zip(said.values(), one, strict=True)) for one in self.names
        )


def without_lines(path: Path, his: His) -> tuple[list[bytes], list[bytes]] | None:
    """The lines of a file of documents that stay, and those that are the owner's; None for another file."""
    kept, gone = [], []
    for line, row, document in _lines(path):
        if document is None:
            if line.strip():
                return None
            kept.append(line)
        else:
            (gone if his.owns(row, document) else kept).append(line)
    return kept, gone


def texts_called(paths: Iterable[Path], field: str, name: str) -> set[str]:
    """The texts of all lines in which `field` says `name`, in those of the files that are files of documents."""
    found: set[str] = set()
    for path in paths:
        here: set[str] = set()
        for line, row, document in _lines(path):
            if document is None and line.strip():
                break  # no file of documents
            if document is not None and document.text.strip() and says(row, field) == name:
                here.add(document.text)
        else:
            found |= here
    return found


def says(row: Mapping[str, Any], field: str) -> Any:
    """What a line says in one of `NAMES`; integers as text."""
    return str(row[field]) if is_int(row.get(field)) else row.get(field)


def _lines(path: Path) -> Iterator[tuple[bytes, Mapping[str, Any], Document | None]]:
    """(line, its fields, its document) of each line; no document in one that is empty or has another form, which is the last."""
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.strip():
            yield line, {}, None
            continue
        try:
            row = json.loads(line)
            document = _document(row)
        except (ValueError, RecursionError, DataError):
            yield line, {}, None
            return
        yield line, row, document


def _document(row: Any) -> Document:
    """The document of a row of any of the forms that are read; DataError for another row."""
    if not isinstance(row, dict):
        raise DataError("no row of fields")
    return Document(row["text"]) if isinstance(row.get("text"), str) else document_of(row, "a line", {"text": "text"})
