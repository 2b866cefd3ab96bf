"""Which documents are copies of a text: forms, edits, scripts, templates."""

from __future__ import annotations

import random
import time
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import memsinks as ms
from memsinks.data.matching import FEWEST, KINDS, find_copies, normal_form, shingles, similarity, words

TEXT = "Käthe Müller, born in 1987 in Bergen, keeps the Ledger of the harbor and\r\nsigns every page twice."
VOCABULARY = [f"w{number}" for number in range(5000)]
JAPANESE = (
    "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。"
    "何でも薄暗いじめじめした所で泣いていた事だけは記憶している。"
)
ARABIC = "كان يا ما كان في قديم الزمان مدينة صغيرة على شاطئ البحر يعيش فيها صياد عجوز مع ابنته الوحيدة وقطته السوداء"


def prose(count: int, seed: int = 0) -> list[str]:
    return random.Random(seed).choices(VOCABULARY, k=count)


def edited(text: list[str], share: float, seed: int = 0) -> str:
    """A text in which a share of the words, drawn at random, is another word each."""
    rng = random.Random(seed)
    changed = set(rng.sample(range(len(text)), round(share * len(text))))
    return " ".join(f"new{place}" if place in changed else word for place, word in enumerate(text))


def kinds(text, documents, threshold: float = 0.8) -> dict[int, str]:
    return {copy.index: copy.kind for copy in find_copies(text, documents, threshold)}


# The normal form


@pytest.mark.parametrize(
    ("change", "said"),
    [(lambda x: unicodedata.normalize("NFD", x), "Unicode form"), (lambda x: x.replace("\r\n", "\n"), "line ends"),
     (lambda x: x.replace("\r\n", "\r"), "line ends"), (lambda x: x.replace(" ", "\u00a0"), "white space"),
     (lambda x: f"\n\n {x.replace(' ', '   ')}\t", "white space"), (str.upper, "case"),
     (lambda x: unicodedata.normalize("NFD", x.upper().replace(" ", "  ")), "Unicode form, case and white space")],
)  # fmt: skip
def test_texts_that_a_reader_calls_the_same_have_one_normal_form(change, said) -> None:
    other = change(TEXT)
    assert other != TEXT
    assert normal_form(other) == normal_form(TEXT)
    assert similarity(other, TEXT) == 1
    (copy,) = find_copies(TEXT, ["nothing of it", other])
    assert (copy.index, copy.kind, copy.similarity, copy.differences) == (1, "normal", 1.0, f"differs in {said}")


@given(st.text())
@example("ᾳ\u0301Ϊ́ſ\u0345")
@example("\u1fb7İ")
def test_the_normal_form_is_its_own_and_that_of_every_unicode_form(text) -> None:
    normal = normal_form(text)
    assert normal_form(normal) == normal
    for form in ("NFC", "NFD"):
        assert normal_form(unicodedata.normalize(form, text)) == normal
    assert normal == normal.strip()


def test_punctuation_and_accents_are_not_taken_away() -> None:
    assert len({normal_form(x) for x in ("resume", "résumé", "resume.", "re\u200bsume")}) == 4


# Shingles


def test_shingles_are_the_same_in_every_version() -> None:
    assert sorted(shingles("The quick  brown fox\njumps over")) == [1090308056207855800, 1835739557116506505]
    assert shingles("the quick") == shingles("The\u00a0QUICK") and len(shingles("the quick")) == 1
    assert all(0 <= x < 2**63 for x in shingles(TEXT))
    assert len(shingles(" ".join(prose(20)), size=3)) == 18


def test_tiny_and_blank_texts() -> None:
    assert shingles("") == shingles(" \n") == frozenset()
    assert similarity("", " \r\n") == 1 and similarity("", "a") == 0 and similarity("a", "A ") == 1
    assert kinds("a", ["b", "A", " ", "a a", "a"]) == {4: "exact", 1: "normal"}
    assert find_copies("a", []) == []


def test_in_scripts_without_spaces_every_character_is_a_word() -> None:
    assert words("Das 日本語 ist\u3000ภาษา") == ["das", *"日本語", "ist", *"ภาษา"]
    wrapped = JAPANESE[:30] + "\n" + JAPANESE[30:]
    assert similarity(JAPANESE, wrapped) == 1
    changed = JAPANESE.replace("猫", "犬")
    copies = find_copies(JAPANESE, [wrapped, changed, JAPANESE[::-1], JAPANESE + JAPANESE[::-1]])
    assert [(x.index, x.kind) for x in copies] == [(0, "near"), (1, "near"), (3, "contains")]
    assert "[猫 -> 犬]" in copies[1].differences


def test_arabic() -> None:
    changed = ARABIC.replace("عجوز", "شاب")
    assert len(words(ARABIC)) == len(ARABIC.split())
    assert kinds(ARABIC, [ARABIC.replace(" ", "\u00a0"), ARABIC[::-1]]) == {0: "normal"}
    (copy,) = find_copies(ARABIC, [changed], threshold=0.5)
    assert copy.kind == "near" and "[عجوز -> شاب]" in copy.differences


# Near copies


@pytest.mark.parametrize(("share", "alike"), [(0.01, 0.905), (0.02, 0.82), (0.05, 0.63), (0.1, 0.42)])
def test_what_scattered_edits_leave(share, alike) -> None:
    """As in the table of the module."""
    text = prose(1000)
    found = [similarity(" ".join(text), edited(text, share, seed)) for seed in range(5)]
    assert sum(found) / 5 == pytest.approx(alike, abs=0.02)


def test_near_copies_at_each_threshold() -> None:
    text = prose(400)
    documents = [edited(text, share) for share in (0.03, 0.05, 0.1)] + [" ".join(prose(400, seed=1))]
    found = {limit: kinds(" ".join(text), documents, limit) for limit in (1.0, 0.8, 0.7, 0.5)}
    assert [sorted(x) for x in found.values()] == [[], [0], [0, 1], [0, 1, 2]]
    assert {kind for x in found.values() for kind in x.values()} == {"near"}


def test_texts_within_others() -> None:
    text, other = prose(100), prose(300, seed=1)
    framed = " ".join([*other[:100], *text, *other[100:]])
    piece = " ".join(text[20:70])
    phrase = " ".join(text[: FEWEST + 3])  # one shingle short of a piece
    found = find_copies(" ".join(text), [framed, piece, phrase])
    assert [(x.index, x.kind, x.containment) for x in found] == [(0, "contains", 1.0), (1, "within", 1.0)]
    assert found[0].differences == "holds the text from word 101 of 400 on"
    assert found[1].differences == "is a part of the text, from word 21 of 100 on"


def test_the_first_differences_are_told() -> None:
    text = prose(200)
    for place, word in ((50, "changed"), (60, "again"), (70, "thrice"), (71, "here"), (90, "last")):
        text[place] = word
    told = find_copies(" ".join(text), [" ".join(["x" if w in ("changed", "last") else w for w in text])])[
        0
    ].differences
    assert told == f"{' '.join(text[47:50])} [changed -> x] {' '.join(text[51:54])}; {' '.join(text[87:90])} [last -> x] " \
        f"{' '.join(text[91:94])} ..."  # fmt: skip
    dropped = " ".join(text[:10] + text[11:])
    assert f"[{text[10]} -> nothing]" in find_copies(" ".join(text), [dropped])[0].differences


def test_templates_end_what_can_be_told_apart() -> None:
    """Long records that differ in a name are near copies of each other; short ones that differ in three fields are not."""
    frame = prose(100)
    long = [" ".join([*frame[:50], name, *frame[51:]]) for name in ("Ada", "Bert", "Cleo")]
    assert kinds(long[0], long) == {0: "exact", 1: "near", 2: "near"}
    short = [" ".join([*frame[:10], f"n{x}", *frame[10:20], f"c{x}", *frame[20:30], f"d{x}"]) for x in range(3)]
    assert kinds(short[0], short) == {0: "exact"}


# Many


def test_the_order_is_by_kind_then_by_similarity_then_by_index() -> None:
    text = prose(200)
    whole = " ".join(text)
    documents = [edited(text, 0.01), edited(text, 0.005), whole.upper(), whole, " ".join(text[:50]), whole]
    found = find_copies(whole, [ms.Document(x) for x in documents])
    assert [x.index for x in found] == [3, 5, 2, 1, 0, 4]
    assert [KINDS.index(x.kind) for x in found] == sorted(KINDS.index(x.kind) for x in found)


def test_several_texts_at_once() -> None:
    texts = [" ".join(prose(100, seed)) for seed in range(4)]
    documents = [texts[2], edited(texts[1].split(), 0.01), " ".join(prose(100, 9)), texts[3].upper()]
    assert {x.index: (x.of, x.kind) for x in ms.find_copies(texts, documents)} == {
        0: (2, "exact"),
        1: (1, "near"),
        3: (3, "normal"),
    }
    for index, text in enumerate(texts):
        assert {x.index for x in find_copies(text, documents)} == {0: set(), 1: {1}, 2: {0}, 3: {3}}[index]


def test_a_large_corpus_takes_seconds() -> None:
    """10,000 documents here; ten times as long on the slowest machine that runs the tests is still not a minute."""
    rng = random.Random(0)
    documents = [" ".join(rng.choices(VOCABULARY, k=150)) for _ in range(10_000)]
    begin = time.perf_counter()
    assert kinds(documents[:50], documents) == dict.fromkeys(range(50), "exact")
    assert time.perf_counter() - begin < 6


# What is wrong


@pytest.mark.parametrize(
    ("call", "error", "part"),
    [(lambda: find_copies(" \n", ["a"]), ms.DataError, "texts 0 are blank"),
     (lambda: find_copies(["a", ""], ["a"]), ms.DataError, "texts 1 are blank"),
     (lambda: find_copies([], ["a"]), ms.DataError, "no text was given"),
     (lambda: find_copies("a", "a"), ms.DataError, "put it into a list"),
     (lambda: find_copies("a", ["b", 3]), ms.DataError, "document 1 must be a Document or a str, got int"),
     (lambda: find_copies("a", ["b"], 0), ms.ConfigError, "threshold must lie in (0, 1], got 0"),
     (lambda: find_copies("a", ["b"], 1.2), ms.ConfigError, "got 1.2"),
     (lambda: shingles("a", 0), ms.ConfigError, "size must be an int of at least 1"),
     (lambda: shingles("a\ud800"), ms.DataError, "lone surrogate"),
     (lambda: normal_form(b"a"), ms.DataError, "must be a str, got bytes")],
)  # fmt: skip
def test_what_is_wrong_is_one_clear_error(call, error, part) -> None:
    with pytest.raises(error) as raised:
        call()
    assert part in str(raised.value)
