"""100 MB of text out of the shared data: most met once, some repeated word for word, some with edited copies.

| kind | what |
|---|---|
| once | stories, encyclopedia, forums, patents, abstracts, web, books: as they are, in pieces of at most `PIECE` characters |
| other | the same again and again with 30% of the words replaced, until all is full: other texts, which are met once too |
| exact | stories with 4, 16 or 64 copies, in the field `copies` |
| edited | stories with 8 versions, a document each: as it is, and with 5% of the words replaced |
| control | stories that are held out, 0 copies |
"""

from __future__ import annotations

import itertools
import json
import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memsinks.data.documents import Document, cut_documents
from memsinks.data.readers import read_documents

DATA = Path(os.environ.get("MEMSINKS_DATA", ""))
STORIES = "tinystories.jsonl.zst"
OTHERS = ("background_open.jsonl.zst", "wikitext2_valid_test.jsonl.zst", "books")
PIECE = 4000
COPIES = (4, 16, 64)
VERSIONS = 8
SLIGHTLY, HEAVILY = 0.05, 0.3
STORY = range(450, 700)
"""Characters of the stories that are repeated or held out: all of one row."""


@dataclass(frozen=True)
class Size:
    """How much of each kind; characters of the whole file, documents of the others."""

    characters: int
    exact: int
    edited: int
    controls: int


def edited(text: str, words: Sequence[str], share: float, name: str) -> str:
    """The text with this share of its words replaced, the same for the same name."""
    rng = random.Random(name)
    return " ".join(rng.choice(words) if rng.random() < share else word for word in text.split(" "))


def documents(size: Size) -> Iterator[dict[str, Any]]:
    """The lines of the file, in an order of which each kilobyte is like any other."""
    stories = [x.text for x in read_documents(DATA / STORIES)]
    chosen = [index for index, text in enumerate(stories) if len(text) in STORY]
    random.Random("chosen").shuffle(chosen)
    places = iter(chosen)
    exact, versions, controls = (list(itertools.islice(places, n)) for n in (size.exact, size.edited, size.controls))
    words = sorted({word for text in stories[:500] for word in text.split(" ") if word.isalpha()})
    taken, left = {*exact, *versions, *controls}, size.characters
    special = [("exact", x, stories[x], COPIES[n % len(COPIES)]) for n, x in enumerate(exact)]
    special += [("control", x, stories[x], 0) for x in controls]
    for index in versions:
        text = stories[index]
        special += [
            ("edited", f"{index}.{v}", edited(text, words, SLIGHTLY if v else 0, f"{index}.{v}"), 1)
            for v in range(VERSIONS)
        ]
    random.Random("special").shuffle(special)
    left -= sum(len(text) for _, _, text, _ in special)
    plain = [Document(text, key=f"story{n}") for n, text in enumerate(stories) if n not in taken]
    plain += [x for name in OTHERS for x in cut_documents(_named(name), PIECE)]
    random.Random("plain").shuffle(plain)
    lengths = [len(x.text) for x in plain]
    every = max(1, int(left / (sum(lengths) / len(lengths)) / (len(special) + 1)))
    for version in itertools.count():
        for number, document in enumerate(plain):
            if left <= 0:
                yield from (_line(*x) for x in special)
                return
            text = edited(document.text, words, HEAVILY, f"{number} {version}") if version else document.text
            left -= len(text)
            yield _line("other" if version else "once", f"{document.key}.{version}", text, 1)
            if special and number % every == 0:
                yield _line(*special.pop())


def _named(name: str) -> Iterator[Document]:
    for number, document in enumerate(read_documents(DATA / name)):
        yield Document(document.text, key=f"{name.split('.')[0]}{number}")


def _line(kind: str, name: Any, text: str, copies: int) -> dict[str, Any]:
    return {"text": text, "key": f"{kind}-{name}", "source": kind, "copies": copies}


def write(path: Path, size: Size) -> dict[str, Any]:
    """Write the file; documents, bytes of text as they lie there, and bytes with copies, by kind."""
    found: dict[str, Counter[str]] = {}
    with path.open("w") as file:
        for line in documents(size):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            own, many = found.setdefault(line["source"], Counter()), len(line["text"].encode())
            own.update(documents=1, bytes=many, bytes_met=many * line["copies"])
    return {kind: dict(counts) for kind, counts in sorted(found.items())}
