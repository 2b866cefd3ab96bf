"""How alike two texts are, and which documents of a corpus are copies of a text.

Two texts that a reader calls the same seldom have the same bytes: a copy went through another editor, another Unicode form,
other line ends; a few words were corrected; a frame was put around it. The *normal form* takes the first kind away, the
*shingles*, runs of a few words, measure the second (Broder 1997, "On the resemblance and containment of documents").

How much of a text with scattered edits still matches, with runs of 5 words: each edited word breaks 5 of them.

| words edited | similarity (Jaccard) | containment |
|---|---|---|
| 1% | 0.91 | 0.95 |
| 2% | 0.82 | 0.90 |
| 5% | 0.63 | 0.77 |
| 10% | 0.42 | 0.59 |

A copy counts by its containment: a threshold of 0.8 finds those in which up to 4% of the words were edited here and there,
0.5 those with up to 12%; edits that stand together break far less. Texts filled into one template are the other side of it:
two records of 100 words that differ in one name have a containment of 0.95, and no threshold tells them from a corrected copy.
Read the differences before taking down what is only near.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from memsinks.checks import int_at_least, is_number
from memsinks.data.documents import Document, as_documents, utf8
from memsinks.errors import DataError, refuse

SIZE = 5
"""Words of a shingle."""
FEWEST = 8
"""A document of fewer shingles is no part of a text only because all of its few stand there: it may be a turn of phrase."""

Kind = Literal["exact", "normal", "near", "contains", "within"]
"""How a document matches: the same characters; the same normal form; near; holds the text; is a part of it."""
KINDS = get_args(Kind)

_PERSON = b"memsinks1shingle"  # blake2b's personalization: changing it changes every hash that was ever written
SPACELESS = (
    "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19df"  # Thai, Lao, Tibetan, Burmese, Khmer, Tai Le
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_UNITS = re.compile(f"[{SPACELESS}]|[^\\s{SPACELESS}]+")
_IS_SPACELESS = re.compile(f"[{SPACELESS}]")
_IOTA_BELOW = re.compile("[\u0345\u037a\u1f80-\u1fff]")
_LINE_ENDS = re.compile("\r\n?|\u2028|\u2029|\u0085")


@dataclass(frozen=True, slots=True)
class Copy:
    """A document that matches a text.

    Args:
        index: of the document.
        kind: see `Kind`.
        similarity: Jaccard similarity of the shingles, 1 where the normal forms are equal.
        containment: share of the shingles of the shorter one that stand in the longer one.
        differences: what a reader should look at, with words of both texts: not for a record that others read.
        of: index of the text that it matches best, 0 where only one was given.
    """

    index: int
    kind: Kind
    similarity: float
    containment: float
    differences: str
    of: int = 0


def normal_form(text: str) -> str:
    """`text` in the form in which two texts are compared.

    Unicode composed (NFC), case folded, every run of white space (line ends of any kind, tabs, no-break spaces) one space, none
    at the ends. Punctuation, accents and characters of no width stay: texts that differ in them are near, not equal.

    Raises:
        DataError: not a str.
    """
    if not isinstance(text, str):
        raise DataError(f"a text must be a str, got {type(text).__name__}: {text!r:.60}")
    if text.isascii():
        return " ".join(text.lower().split())
    return " ".join(unicodedata.normalize("NFC", _folded(text)).split())


def _folded(text: str) -> str:
    """Case folded so that it does not matter in which form the text was (Unicode 3.13, D145).

    Only Greek with an iota below must be decomposed first, which takes longer than everything else here.
    """
    return (unicodedata.normalize("NFD", text) if _IOTA_BELOW.search(text) else text).casefold()


def words(text: str) -> list[str]:
    """The words of the normal form, cut at white space.

    In scripts that are written without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese, Tibetan) every character counts as a
    word, also within a text that has words in another script. So line breaks within such a text change nothing here.
    """
    return words_of(normal_form(text))


def spaceless(character: str) -> bool:
    """Whether a character is of a script that is written without spaces, see `words`."""
    return _IS_SPACELESS.fullmatch(character) is not None


def words_of(normal: str) -> list[str]:
    """`words` of a text that is in its normal form."""
    return _UNITS.findall(normal) if not normal.isascii() and _IS_SPACELESS.search(normal) else normal.split()


def runs(words: Sequence[str], size: int = SIZE) -> Iterator[tuple[str, ...]]:
    """Every run of `size` words in order, repeats included; all words as one run where there are fewer; none of no words."""
    if len(words) < size:
        return iter([tuple(words)] if words else [])
    return zip(*(words[start:] for start in range(size)), strict=False)


def shingles(text: str, size: int = SIZE) -> frozenset[int]:
    """Hashes of all runs of `size` words of a text: ints of 63 bits, the same on every machine and in every version.

    blake2b over the words of a run with one space between. A text of fewer words is one run, a blank text has none.

    Args:
        text: any text; see `words` for scripts without spaces.
        size: words of a run, at least 1.

    Raises:
        DataError: not a str, or one with lone surrogates, which have no UTF-8 form.
        ConfigError: `size` below 1.
    """
    refuse(int_at_least("size", size, 1), "cannot cut a text into shingles")
    return hashed_shingles(normal_form(text), size)


def hashed_shingles(normal: str, size: int) -> frozenset[int]:
    """`shingles` of a text that is in its normal form."""
    return frozenset(hash_runs(hashlib.blake2b(digest_size=8, person=_PERSON), runs(words_of(normal), size)))


def hash_runs(start: hashlib.blake2b, found: Iterable[tuple[str, ...]]) -> Iterator[int]:
    """The 63-bit hash of each run, about 1 us. `start`: the empty hash, of 8 bytes, with its personalization and salt."""
    for run in found:
        hashed = start.copy()
        hashed.update(utf8(" ".join(run), "a text"))
        yield int.from_bytes(hashed.digest(), "little") & (2**63 - 1)


def similarity(a: str, b: str, size: int = SIZE) -> float:
    """Jaccard similarity of the shingles of two texts: shared over all, in [0, 1]; 1 for equal normal forms, blank ones too.

    Raises:
        As `shingles`.
    """
    left, right = shingles(a, size), shingles(b, size)
    return len(left & right) / len(left | right) if left or right else 1.0


def find_copies(text: str | Sequence[str], documents: Iterable[Document | str], threshold: float = 0.8) -> list[Copy]:
    """The documents that are copies of a text, the surest first.

    A document is listed where it has the same characters or the same normal form, or where shingles are shared: at least a share
    `threshold` of those of both ("near"; a similarity of `threshold` suffices for that), of those of the text (the document
    "contains" it), or of those of the document (a piece "within" the text, of at least `FEWEST` shingles). Nothing is sampled:
    five to ten seconds for 100,000 documents of 150 words.

    Args:
        text: the text, or several (all texts of an owner), which costs hardly more; each document is listed once, under the
            one that it matches best.
        documents: documents or texts.
        threshold: least share of shingles, in (0, 1]. The page of this module says what that finds; texts of fewer than
            `SIZE` words are found as themselves alone.

    Returns:
        Sorted by kind in the order of `KINDS`, then by similarity, then by index.

    Raises:
        DataError: a text that is blank, documents that are none.
        ConfigError: `threshold` out of range.
    """
    check_threshold(threshold, "cannot find copies")
    texts = [text] if isinstance(text, str) else list(text)
    wanted = _Wanted(texts)
    found = []
    for index, document in enumerate(as_documents(documents)):
        copy = wanted.match(index, document.text, threshold)
        if copy is not None:
            found.append(copy)
    return sorted(found, key=lambda x: (KINDS.index(x.kind), -x.similarity, -x.containment, x.index))


def check_threshold(threshold: float, what: str) -> None:
    """ConfigError unless a share of shingles is above 0 and at most 1."""
    good = is_number(threshold) and 0 < threshold <= 1
    refuse([] if good else [f"threshold must lie in (0, 1], got {threshold!r}"], what)


class _Wanted:
    """Texts that are looked for: which texts each run of words stands in, so that a document is read once for all of them."""

    def __init__(self, texts: list[str]) -> None:
        normal = [normal_form(text) for text in texts]
        blank = [str(index) for index, form in enumerate(normal) if not form]
        if blank or not texts:
            raise DataError(f"texts {', '.join(blank[:5])} are blank" if texts else "no text was given to look for")
        self.texts = texts
        self.words = [words_of(form) for form in normal]
        self.by_text, self.by_form, self.by_run = {}, {}, {}
        self.sizes = []
        for index, (text, form) in enumerate(zip(texts, normal, strict=True)):
            self.by_text.setdefault(text, index)
            self.by_form.setdefault(form, index)
            own = set(runs(self.words[index]))
            self.sizes.append(len(own))
            for run in own:
                self.by_run.setdefault(run, []).append(index)
        self.runs = set(self.by_run)

    def match(self, index: int, text: str, threshold: float) -> Copy | None:
        """How a document matches, or None."""
        if (of := self.by_text.get(text)) is not None:
            return Copy(index, "exact", 1.0, 1.0, "none", of)
        form = normal_form(text)
        if (of := self.by_form.get(form)) is not None:
            return Copy(index, "normal", 1.0, 1.0, _form_differences(self.texts[of], text), of)
        units = words_of(form)
        shared = self.runs.intersection(runs(units))
        if not shared:
            return None
        size = len(set(runs(units)))
        counts = Counter(of for run in shared for of in self.by_run[run])
        copies = [self._near(of, count, size, threshold) for of, count in counts.items()]
        best = max((x for x in copies if x is not None), key=lambda x: (x[1], x[2], -x[3]), default=None)
        if best is None:
            return None
        kind, alike, contained, of = best
        return Copy(index, kind, alike, contained, _word_differences(kind, self.words[of], units, shared), of)

    def _near(self, of: int, count: int, size: int, threshold: float) -> tuple[Kind, float, float, int] | None:
        """(kind, similarity, containment, text) of a document of `size` runs that shares `count` with a text."""
        own = self.sizes[of]
        alike, contained = count / (own + size - count), count / min(own, size)
        kind = kind_of(count, own, size, threshold)
        return None if kind is None else (kind, alike, contained, of)


def kind_of(count: int, own: int, size: int, threshold: float) -> Kind | None:
    """The kind of a document of `size` shingles that shares `count` with a text of `own`; None where it is no copy."""
    if count / max(own, size) >= threshold:
        return "near"
    if count / own >= threshold:
        return "contains"
    return "within" if size >= FEWEST and count / size >= threshold else None


# What a reader is told


def _form_differences(a: str, b: str) -> str:
    """In which of the things that the normal form takes away two texts of one normal form differ."""

    def differ(form: bool = True, case: bool = True, space: bool = True, ends: bool = True) -> bool:
        pair = []
        for text in (a, b):
            text = unicodedata.normalize("NFC", text) if form else text
            text = _folded(text) if case else text
            text = unicodedata.normalize("NFC", text) if form else text
            text = _LINE_ENDS.sub("\n", text) if ends else text
            pair.append(" ".join(text.split()) if space else text)
        return pair[0] != pair[1]

    names = ["Unicode form"] if differ(form=False) else []
    names += ["case"] if differ(case=False) else []
    if differ(space=False, ends=False):
        names.append("white space" if differ(space=False) else "line ends")
    return f"differs in {' and '.join((', '.join(names[:-1]), names[-1]) if names[1:] else names)}"


SHOWN, AHEAD, AROUND = 3, 80, 3
"""Differences that are told, words that are compared from the first one on, and words shown beside each."""


def _word_differences(kind: Kind, text: list[str], document: list[str], shared: set[tuple[str, ...]]) -> str:
    """The first differences, e.g. 'born in [1987 -> 1988] in Bergen'; of a quotation, where it begins."""
    if kind == "contains":
        begin = next(place for place, run in enumerate(runs(document)) if run in shared)
        return f"holds the text from word {begin + 1} of {len(document)} on"
    if kind == "within":
        begin = next(place for place, run in enumerate(runs(text)) if run in shared)
        return f"is a part of the text, from word {begin + 1} of {len(text)} on"
    same = next(
        (x for x, (a, b) in enumerate(zip(text, document, strict=False)) if a != b), min(map(len, (text, document)))
    )
    start = max(0, same - AROUND)
    a, b = text[start : start + AHEAD], document[start : start + AHEAD]
    told = []
    for name, low, high, begin, end in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        cut = (len(a) == AHEAD and high == AHEAD) or (len(b) == AHEAD and end == AHEAD)
        if name != "equal" and not (told and cut):
            before, after = _joined(a[max(0, low - AROUND) : low]), _joined(a[high : high + AROUND])
            change = f"[{_short(a[low:high])} -> {_short(b[begin:end])}]"
            told.append(" ".join(x for x in (before, change, after) if x))
    more = " ..." if len(told) > SHOWN or max(map(len, (text, document))) > start + AHEAD else ""
    return "; ".join(told[:SHOWN]) + more if told else "the same runs of words in another order"


def _short(words: list[str], most: int = 8) -> str:
    return (_joined(words[:most]) + (" ..." if len(words) > most else "")) or "nothing"


def _joined(words: list[str]) -> str:
    """Words with spaces between, but between characters of a script without them."""
    text = " ".join(words)
    return re.sub(f"(?<=[{SPACELESS}]) (?=[{SPACELESS}])", "", text)
