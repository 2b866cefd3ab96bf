"""Tombstones: what was taken down is known again, and its text is not in the file."""

from __future__ import annotations

import base64
import dataclasses
import json
import random
import time
import unicodedata

import numpy as np
import pytest

import memsinks as ms
from memsinks.data.matching import find_copies
from memsinks.removal.tombstone import (
    Tombstone,
    find_tombstoned,
    make_tombstone,
    read_tombstone,
    refuse_tombstoned,
    stride,
    write_tombstone,
)

VOCABULARY = [f"w{number}" for number in range(3000)]
JAPANESE = (
    "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。"
    "何でも薄暗いじめじめした所で泣いていた事だけは記憶している。"
)


def prose(count: int, seed: int = 0) -> list[str]:
    return random.Random(seed).choices(VOCABULARY, k=count)


TEXTS = [
    "Käthe Müller, born in 1987 in Bergen, keeps the ledger of the harbor.",
    " ".join(prose(120)),
    JAPANESE,
    "Tiny one",
]
TOMBSTONE = make_tombstone(TEXTS, record="alice-1", date="2026-03-01")


def test_every_form_of_a_text_is_known_again() -> None:
    forms = [
        lambda x: x,
        str.upper,
        lambda x: unicodedata.normalize("NFD", x),
        lambda x: f"\r\n{x.replace(' ', chr(160))} ",
    ]
    documents = [form(text) for text in TEXTS for form in forms]
    found = find_tombstoned(documents, TOMBSTONE)
    assert [(x.index, x.record, x.kind) for x in found] == [(i, "alice-1", "normal") for i in range(len(documents))]


def test_near_copies_quotations_and_pieces_are_known_again() -> None:
    words, other = TEXTS[1].split(), prose(400, 1)
    documents = [
        " ".join(["changed", *words[1:]]),
        " ".join([*other[:200], *words, *other[200:]]),
        " ".join(words[30:80]),
        " ".join(other),
        JAPANESE.replace("猫", "犬") + "と書いた。",
        "a tiny one indeed",
        " ",
    ]
    found = find_tombstoned([ms.Document(x) for x in documents], [TOMBSTONE])
    assert [(x.index, x.kind) for x in found] == [(0, "near"), (1, "contains"), (2, "within"), (4, "near")]


def test_it_finds_what_comparing_all_shingles_finds() -> None:
    """Random texts, edited, cut, quoted and shuffled sentence by sentence, at several thresholds."""
    rng = random.Random(0)
    met = 0
    for case in range(300):
        text = prose(rng.choice([5, 8, 15, 40, 150, 600]), case)
        share = rng.choice([0.005, 0.02, 0.05, 0.1, 0.15])
        copy = [f"n{place}" if rng.random() < share else word for place, word in enumerate(text)]
        begin = rng.randrange(len(copy))
        copy = rng.choice([copy, copy[begin:], copy[: begin + 1], copy[begin:] + copy[:begin]])
        before, after = (prose(rng.choice([0, 0, 3, 200]), case + place) for place in (1000, 2000))
        document = " ".join([*before, *copy, *after])
        threshold = rng.choice([0.3, 0.5, 0.8, 0.95])
        wanted = find_copies(" ".join(text), [document], threshold)
        found = find_tombstoned([document], make_tombstone([" ".join(text)], record="r"), threshold)
        met += bool(wanted)
        assert [x.index for x in found] == [x.index for x in wanted], (case, len(text), threshold)
        for a, b in zip(found, wanted, strict=True):
            assert a.containment == pytest.approx(b.containment)
            assert a.kind == b.kind or (a.kind, b.kind) == ("normal", "exact")
    assert 60 < met < 280


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8, 1.0])
def test_the_stride_is_never_longer_than_the_text(threshold) -> None:
    assert all(1 <= stride(n, threshold) <= n for n in range(1, 2000))
    assert stride(10**6, 0.8) == 16


def test_unknown_documents_pass_and_others_are_named() -> None:
    other = make_tombstone([" ".join(prose(80, 5))], record="bob-7")
    refuse_tombstoned([" ".join(prose(100, seed)) for seed in range(10, 20)], [TOMBSTONE, other])
    refuse_tombstoned(["anything"], [])
    documents = ["fine", TEXTS[1], "fine too", " ".join([*prose(79, 5), "edited"])]
    with pytest.raises(ms.DataError) as raised:
        refuse_tombstoned(documents, [TOMBSTONE, other])
    text = str(raised.value)
    assert "document 1 is the text taken down under 'alice-1'" in text
    assert "document 3 is a near copy of the text taken down under 'bob-7' (99% of the shingles)" in text
    assert text.endswith("Leave them out of the corpus")
    with pytest.raises(ms.DataError, match=r"document 4 .* and 15 more\. Leave"):
        refuse_tombstoned([TEXTS[0]] * 20, TOMBSTONE)


def test_ten_thousand_documents_take_a_second_or_two() -> None:
    rng = random.Random(0)
    documents = [" ".join(rng.choices(VOCABULARY, k=150)) for _ in range(10_000)]
    several = [make_tombstone(documents[x : x + 5], record=f"r{x}") for x in range(0, 25, 5)]
    begin = time.perf_counter()
    found = find_tombstoned(documents, several)
    assert time.perf_counter() - begin < 15
    assert [(x.index, x.record) for x in found] == [(x, f"r{x // 5 * 5}") for x in range(25)]


# What it holds


def test_no_text_is_in_it_and_no_two_are_alike(tmp_path) -> None:
    a, b = (make_tombstone(TEXTS, record="r") for _ in range(2))
    assert a.salt != b.salt and not set(a.digests) & set(b.digests)
    assert not set(a.owners) & set(b.owners)
    write_tombstone(tmp_path / "t.json", a)
    raw = (tmp_path / "t.json").read_text()
    decoded = raw.encode() + b"".join(base64.b64decode(x["shingles"]) for x in json.loads(raw)["texts"])
    for word in ("Käthe", "Müller", "Bergen", "ledger", "吾輩", TEXTS[1][:12]):
        assert word.encode() not in decoded and word.casefold().encode() not in decoded


def test_texts_of_one_form_count_once() -> None:
    assert len(make_tombstone(["A b", "a  B", "a\u00a0b"], record="r").digests) == 1


def test_what_is_written_is_read(tmp_path) -> None:
    write_tombstone(tmp_path / "t.json", TOMBSTONE)
    found = read_tombstone(tmp_path / "t.json")
    plain = [f.name for f in dataclasses.fields(Tombstone) if f.name != "shingles"]
    assert [getattr(found, x) for x in plain] == [getattr(TOMBSTONE, x) for x in plain]
    assert all(np.array_equal(a, b) for a, b in zip(found.shingles, TOMBSTONE.shingles, strict=True))
    assert len(find_tombstoned(TEXTS, found)) == len(TEXTS)
    first = (tmp_path / "t.json").read_bytes()
    write_tombstone(tmp_path / "t.json", found)
    assert (tmp_path / "t.json").read_bytes() == first
    assert [x.name for x in tmp_path.iterdir()] == ["t.json"]


# What is wrong


@pytest.mark.parametrize(
    ("texts", "record", "part"),
    [("a", "r", "got one str"), ([], "r", "no texts"), (["a", " \n"], "r", "a text is blank"),
     (["a"], "", "record must be a name"), ([b"a"], "r", "must be a str, got bytes"), (["a\ud800"], "r", "lone surrogate")],
)  # fmt: skip
def test_a_tombstone_of_what_is_no_text_is_refused(texts, record, part) -> None:
    with pytest.raises(ms.DataError, match=part):
        make_tombstone(texts, record=record)


def test_a_threshold_out_of_range_is_refused() -> None:
    with pytest.raises(ms.ConfigError, match=r"threshold must lie in \(0, 1\], got 80"):
        refuse_tombstoned(["a"], TOMBSTONE, threshold=80)


@pytest.mark.parametrize(
    ("change", "part"),
    [({"format": "other"}, "is no tombstone"), ({"version": 2}, "version 2, newer than 1; update memsinks"),
     ({"version": "1"}, "is damaged"), ({"salt": "xy"}, "is damaged"), ({"salt": "00"}, "is damaged"),
     ({"texts": []}, "is damaged"), ({"texts": [{"sha256": "00" * 32, "shingles": "AAAA"}]}, "is damaged"),
     ({"texts": [{"sha256": "00", "shingles": "AAAAAAAAAAA="}]}, "is damaged"), ({"record": None}, "is damaged"),
     ({"size": 7}, "is damaged"), ({"texts": 3}, "is damaged"), ({"texts": [3]}, "is damaged")],
)  # fmt: skip
def test_a_damaged_or_newer_file_is_one_clear_error(tmp_path, change, part) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps(TOMBSTONE.as_json() | change))
    with pytest.raises(ms.CheckpointError) as raised:
        read_tombstone(path)
    assert part in str(raised.value) and str(path) in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff"])
def test_a_file_that_is_none_is_one_clear_error(tmp_path, content) -> None:
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(ms.CheckpointError, match=r"t\.json"):
        read_tombstone(tmp_path / "t.json")
    with pytest.raises(ms.CheckpointError, match=r"cannot read .*none\.json.*fetch it again"):
        read_tombstone(tmp_path / "none.json")
