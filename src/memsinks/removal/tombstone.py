"""A tombstone: what keeps a text from coming back after it was taken down, without holding it.

It holds hashes alone: for each text SHA-256 of its normal form, and the hashes of its shingles (`data.matching`), both with the
random salt of the record. A corpus is checked against it before training (`refuse_tombstoned`).

What the salt does: no table of hashes made beforehand helps against it, and the tombstones of two records cannot be compared to
see whether they are of one text. What it does not: it stands in the file, so whoever has the file can test guesses. A short or
guessable text (a name, a number in a known form) is found by trying. A longer one can be pieced together by somebody patient:
who knows four words in a row can try all words for the fifth. So a tombstone is to be kept like the text itself, less readable,
but not public. `memsinks verify` does not need it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from memsinks.data.documents import Document, as_documents, utf8
from memsinks.data.matching import SIZE, check_threshold, hash_runs, kind_of, normal_form, runs, words_of
from memsinks.errors import CheckpointError, DataError, refuse
from memsinks.files import read_json, write_json

FORMAT, VERSION = "memsinks tombstone", 1
"""What the file calls itself; a newer version than this one is refused."""

_PERSON = b"memsinks1tombst"
_LONGEST_STRIDE = 32


@dataclass(frozen=True)
class Tombstone:
    """Hashes of the texts of one record.

    Args:
        record: name of the record of the take-down.
        date: day or moment, ISO 8601.
        salt: 16 random bytes.
        digests: SHA-256 of salt and normal form, hexadecimal, one a text.
        shingles: int64 [shingles of the text], sorted, one a text.
    """

    record: str
    date: str
    salt: bytes
    digests: tuple[str, ...]
    shingles: tuple[np.ndarray, ...]

    @cached_property
    def owners(self) -> dict[int, list[int]]:
        """Which texts each shingle stands in."""
        found: dict[int, list[int]] = {}
        for index, own in enumerate(self.shingles):
            for value in own.tolist():
                found.setdefault(value, []).append(index)
        return found

    def as_json(self) -> dict[str, Any]:
        """What the file holds. Shingles are 8 bytes each, little endian, in base64: JSON readers round large integers."""
        texts = [
            {"sha256": digest, "shingles": base64.b64encode(own.astype("<i8").tobytes()).decode()}
            for digest, own in zip(self.digests, self.shingles, strict=True)
        ]
        head = {"format": FORMAT, "version": VERSION, "record": self.record, "date": self.date}
        return head | {"size": SIZE, "salt": self.salt.hex(), "texts": texts}

    @cached_property
    def sha256(self) -> str:
        """By which it is known what was compared with it; says nothing about the texts."""
        return hashlib.sha256(json.dumps(self.as_json(), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Return:
    """A document that a tombstone knows.

    Args:
        index: of the document.
        record: name of the record.
        kind: "normal" (the same normal form), "near", "contains" or "within", as in `find_copies`.
        containment: share of the shingles of the shorter one that stand in the longer one.
    """

    index: int
    record: str
    kind: str
    containment: float


def make_tombstone(texts: Sequence[str], *, record: str, date: str | None = None) -> Tombstone:
    """The tombstone of texts, with a salt of its own; texts of one normal form count once.

    Args:
        texts: the texts that were taken down, each as it stood in the corpus.
        record: name of the record of the take-down.
        date: ISO 8601; None = now, in UTC.

    Raises:
        DataError: no text, a blank one, one str instead of many, an empty `record`.
    """
    if isinstance(texts, str):
        raise DataError("texts must be many texts, got one str; put it into a list")
    problems = [] if isinstance(record, str) and record.strip() else [f"record must be a name, got {record!r}"]
    forms = list(dict.fromkeys(normal_form(text) for text in texts))
    problems += [] if forms else ["no texts were given"]
    problems += ["a text is blank; leave it out"] if "" in forms else []
    refuse(problems, "cannot make a tombstone", DataError)
    salt = secrets.token_bytes(16)
    own = [set(hash_runs(_start(salt), runs(words_of(form)))) for form in forms]
    return Tombstone(
        record=record,
        date=date or datetime.now(UTC).isoformat(timespec="seconds"),
        salt=salt,
        digests=tuple(_digest(salt, form) for form in forms),
        shingles=tuple(np.array(sorted(x), np.int64) for x in own),
    )


def _start(salt: bytes) -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=8, salt=salt, person=_PERSON)


def _digest(salt: bytes, form: str) -> str:
    return hashlib.sha256(salt + utf8(form, "a text")).hexdigest()


def write_tombstone(path: str | os.PathLike[str], tombstone: Tombstone) -> None:
    """Write a tombstone as JSON; the file is never half written.

    Raises:
        CheckpointError: it cannot be written.
    """
    write_json(Path(path), tombstone.as_json())


def read_tombstone(path: str | os.PathLike[str]) -> Tombstone:
    """The tombstone that `write_tombstone` wrote.

    Raises:
        CheckpointError: missing, damaged, something else, or of a newer version.
    """
    path = Path(path)
    values = read_json(path, remedy="fetch it again from where it was made")
    if not isinstance(values, Mapping) or values.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no tombstone; give a file that write_tombstone or a take-down wrote")
    version = values.get("version")
    if isinstance(version, int) and version > VERSION:
        raise CheckpointError(f"{path} is a tombstone of version {version}, newer than {VERSION}; update memsinks")
    try:
        salt = bytes.fromhex(values["salt"])
        found = Tombstone(
            record=_str(values["record"]),
            date=_str(values["date"]),
            salt=salt,
            digests=tuple(bytes.fromhex(x["sha256"]).hex() for x in values["texts"]),
            shingles=tuple(_array(x["shingles"]) for x in values["texts"]),
        )
        whole = all(len(x) == 64 for x in found.digests) and all(len(x) for x in found.shingles) and bool(found.digests)
        if version != VERSION or values["size"] != SIZE or len(salt) != 16 or not whole:
            raise ValueError("a field is not what it must be")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r:.80}); fetch it again from where it was made") from error
    return found


def _str(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} is no str")
    return value


def _array(text: str) -> np.ndarray:
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), "<i8").astype(np.int64)
    except binascii.Error as error:
        raise ValueError("shingles are cut short") from error


def find_tombstoned(
    documents: Iterable[Document | str], tombstones: Tombstone | Sequence[Tombstone], threshold: float = 0.8
) -> list[Return]:
    """The documents that tombstones know, in order, each once for each record.

    A document is known by its normal form, or by a share of `threshold` of the shingles, as in `find_copies`. Texts of fewer
    than `SIZE` words are known as themselves alone. Five to ten seconds for 100,000 documents of 150 words, and two to three more
    for each tombstone: only every so many shingles of a document are hashed, so few that every unbroken run of shared words
    that can make up `threshold` is met; where one is, all of them are.

    Args:
        documents: documents or texts.
        tombstones: one or several.
        threshold: least share of shingles, in (0, 1].

    Raises:
        DataError: documents that are none.
        ConfigError: `threshold` out of range.
    """
    check_threshold(threshold, "cannot look for tombstoned documents")
    several = [tombstones] if isinstance(tombstones, Tombstone) else list(tombstones)
    known = [(x, _start(x.salt), set(x.digests), min(map(len, x.shingles))) for x in several]
    found = []
    for index, document in enumerate(as_documents(documents)):
        form = normal_form(document.text)
        if not form or not known:
            continue
        cut = list(runs(words_of(form)))
        for tombstone, start, digests, shortest in known:
            if _digest(tombstone.salt, form) in digests:
                found.append(Return(index, tombstone.record, "normal", 1.0))
                continue
            step = stride(min(len(cut), shortest), threshold)
            if any(value in tombstone.owners for value in hash_runs(start, cut[step - 1 :: step])):
                found += _known(index, tombstone, set(hash_runs(start, cut)), threshold)
    return found


def shares_words(text: str, tombstone: Tombstone) -> bool:
    """Whether `SIZE` words in a row of `text` stand in a text of the tombstone; shorter texts are not looked at."""
    cut = words_of(normal_form(text))
    return len(cut) >= SIZE and any(x in tombstone.owners for x in hash_runs(_start(tombstone.salt), runs(cut)))


def stride(shingles: int, threshold: float) -> int:
    """How many shingles apart a document may be probed so that a copy is met.

    A probe is missed where every run of shared shingles is shorter than the stride. Each break of a run costs the text
    `SIZE` - 1 shingles at least, so r runs of at most k - 1 shared shingles among n make up less than a share t of them if
    k - 1 < (SIZE - 1) t n / (n (1 - t) + SIZE - 1).

    Args:
        shingles: n, of the shorter of text and document.
        threshold: t.
    """
    lost = SIZE - 1
    most = lost * threshold * shingles / (shingles * (1 - threshold) + lost)
    return min(max(1, math.ceil(most)), _LONGEST_STRIDE)


def _known(index: int, tombstone: Tombstone, own: set[int], threshold: float) -> list[Return]:
    """What a document of these shingles is to a tombstone: nothing, or the likest of its texts."""
    counts: dict[int, int] = {}
    for value in own:
        for text in tombstone.owners.get(value, ()):
            counts[text] = counts.get(text, 0) + 1
    best: Return | None = None
    for text, count in counts.items():
        size = len(tombstone.shingles[text])
        kind, contained = kind_of(count, size, len(own), threshold), count / min(size, len(own))
        if kind is not None and (best is None or contained > best.containment):
            best = Return(index, tombstone.record, kind, contained)
    return [] if best is None else [best]


def refuse_tombstoned(
    documents: Iterable[Document | str],
    tombstones: Tombstone | Sequence[Tombstone],
    threshold: float = 0.8,
    *,
    first: int = 0,
    name: str = "document",
) -> None:
    """Raise where a document was taken down before; see `find_tombstoned`, which gives the list instead.

    Args:
        documents, tombstones, threshold: see there.
        first: index of the first of the documents, where they are a part of a corpus. name: what the error calls them.

    Raises:
        DataError: naming the index of each such document, the record it was taken down under, and how it matches; five of them
            at most, and how many more there are.
    """
    found = find_tombstoned(documents, tombstones, threshold)
    if found:
        says = {
            "normal": "is the text",
            "near": "is a near copy of the text",
            "contains": "contains the text",
            "within": "is a part of the text",
        }
        named = [
            f"{name} {first + x.index} {says[x.kind]} taken down under {x.record!r}"
            + ("" if x.kind == "normal" else f" ({x.containment:.0%} of the shingles)")
            for x in found[:5]
        ]
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise DataError(f"{'; '.join(named)}{more}. Leave them out of the corpus")
