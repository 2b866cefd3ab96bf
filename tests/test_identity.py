"""Ids are stable for ever; exposures count the meetings of a text in training order."""

from __future__ import annotations

import collections
import hashlib
import json
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memsinks.batch import NO_SINKS
from memsinks.data.identity import document_id, equal_repetition, exposures, identify, training_order
from memsinks.errors import ConfigError, DataError

GOLDEN = json.loads((Path(__file__).parent / "golden" / "document_ids.json").read_text(encoding="ascii"))
ORDERS = st.lists(st.integers(0, 6), max_size=60)


def document(text: str, key: str | None = None, source: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(text=text, key=key, source=source, copies=1, kind="text")


@pytest.mark.parametrize("case", GOLDEN, ids=[case["name"] for case in GOLDEN])
def test_ids_never_change(case):
    assert document_id(case["text"] * case["times"], case["kind"]) == case["id"]


def test_golden_ids_are_all_different():
    assert len({case["id"] for case in GOLDEN}) == len(GOLDEN) >= 15


def test_id_is_the_documented_hash():
    digest = hashlib.blake2b(b"a text", digest_size=8, person=b"memsinks1content").digest()
    assert document_id("a text") == int.from_bytes(digest, "little") & (2**63 - 1)


@given(st.text(), st.sampled_from(["content", "key", "source"]))
def test_ids_fit_int64_and_bytes_equal_text(text, by):
    assert 0 <= document_id(text, by) < 2**63
    assert document_id(text, by=by) == document_id(text.encode(), by)


@pytest.mark.parametrize("value", [None, 3, 1.5, ["a"], bytearray(b"a")])
def test_id_of_another_type_is_refused(value):
    with pytest.raises(DataError, match="must be str or bytes"):
        document_id(value)


def test_lone_surrogate_and_unknown_kind_are_refused():
    with pytest.raises(DataError, match="surrogate at character 1"):
        document_id("a\ud800")
    with pytest.raises(ConfigError, match="'url'"):
        document_id("a", "url")


def test_by_content_copies_share_id_and_group():
    ids, groups = identify([document("a", key="1"), document("b", key="1"), document("a", key="2")])
    assert ids.dtype == groups.dtype == np.int64
    assert ids.tolist() == groups.tolist() == [document_id("a"), document_id("b"), document_id("a")]


def test_by_key_near_copies_are_one_group():
    ids, groups = identify([document("a.", key="1"), document("a!", key="1"), document("a.", key="2")], by="key")
    assert ids.tolist() == groups.tolist() == [document_id(key, "key") for key in "112"]
    assert exposures(groups).tolist() == [1, 2, 1]


def test_by_source_shares_sinks_but_counts_texts():
    ids, groups = identify([document("a", source="s"), document("b", source="s"), document("a", source="s")], "source")
    assert ids.tolist() == [document_id("s", "source")] * 3
    assert groups.tolist() == [document_id("a"), document_id("b"), document_id("a")]


@pytest.mark.parametrize("by", ["key", "source"])
@pytest.mark.parametrize("missing", [None, ""])
def test_missing_name_is_refused_with_its_index(by, missing):
    with pytest.raises(DataError, match=f"document 1 has no {by}"):
        identify([document("a", "k", "s"), document("b", **{by: missing})], by=by)


def test_identify_names_the_bad_document_and_the_unknown_rule():
    with pytest.raises(DataError, match=r"document 1: .*surrogate"):
        identify([document("a"), document("\udc00")])
    with pytest.raises(ConfigError, match="'author'"):
        identify([document("a")], by="author")


@given(ORDERS, st.dictionaries(st.integers(0, 6), st.integers(0, 5)))
def test_exposures_equal_counting_one_by_one(groups, prior):
    met = collections.Counter(prior)
    expected = []
    for group in groups:
        met[group] += 1
        expected.append(met[group])
    result = exposures(groups, prior)
    assert result.dtype == np.int64
    assert result.tolist() == expected


def test_ungrouped_documents_are_always_new():
    assert exposures([NO_SINKS, 7, NO_SINKS, 7], prior={NO_SINKS: 4}).tolist() == [1, 1, 1, 2]


def test_a_million_exposures_are_fast():
    groups = np.random.default_rng(0).permutation(np.arange(500_000).repeat(2)) * 2**40
    start = time.perf_counter()
    assert np.bincount(exposures(groups)).tolist() == [0, 500_000, 500_000]
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize(
    "groups", [[0.5, 1.0], [[1, 2]], ["a"], [True, False], [2**63], [-2, 1]], ids=lambda groups: repr(groups)
)
def test_bad_groups_are_refused(groups):
    for function in (exposures, equal_repetition):
        with pytest.raises(DataError, match="groups must be"):
            function(groups)


@pytest.mark.parametrize("count", [-1, 1.5, True, "2", None])
def test_bad_prior_is_refused(count):
    with pytest.raises(DataError, match="group 7 must be an int of at least 0"):
        exposures([7], {7: count})


@pytest.mark.parametrize("group", ["7", 7.0, None, True, -2, 2**63])
def test_groups_of_prior_are_integers(group):
    with pytest.raises(DataError, match=rf"{group!r} is no group \(JSON makes strings of keys"):
        exposures([7, 7], {group: 5, 8: 2})


def test_prior_is_a_mapping_and_all_that_is_wrong_is_said():
    with pytest.raises(DataError, match="prior must map groups to counts, got list"):
        exposures([7], [5])
    with pytest.raises(DataError, match="'1' is no group, .* group 2 .*, '7' is no group and 2 more"):
        exposures([7], {"1": 1, 2: -1, **{str(n): 1 for n in range(5, 10)}})
    assert exposures([7, 7], {np.int64(7): np.int32(5)}).tolist() == [6, 7]


def test_iterators_and_other_integers():
    assert exposures(iter([7, 7])).tolist() == exposures(np.array([7, 7], ">i8")).tolist() == [1, 2]
    assert exposures(np.array([7, 7], np.uint8)).tolist() == [1, 2]
    assert equal_repetition(iter([7, 7])) == 2
    documents = [document("a"), document("b")]
    assert [x.tolist() for x in identify(iter(documents))] == [x.tolist() for x in identify(documents)]
    assert training_order(iter(documents)) == training_order(documents)


@pytest.mark.parametrize("copies", [2.0, -1, True, "1", None])
def test_bad_copies_are_refused(copies):
    with pytest.raises(DataError, match=rf"copies must be integers of at least 0: document 1 has {copies!r}"):
        training_order([document("a"), SimpleNamespace(text="b", copies=copies)])
    with pytest.raises(ConfigError, match="epochs must be an int of at least 1, got 0"):
        training_order([document("a")], epochs=0)


def test_one_key_for_many_texts_warns_with_the_largest_group():
    documents = [document(f"text {n}", key="all" if n < 290 else f"own {n}") for n in range(300)]
    with pytest.warns(UserWarning, match=r"the key 'all' stands for 290 different texts \(1 of 11 keys") as caught:
        identify(iter(documents), by="key")
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        identify([document("one text", key="all") for _ in range(300)], by="key")
        identify([document(f"text {n % 19}", key="all") for n in range(300)], by="key")  # near copies
        identify([document(f"text {n}", source="all") for n in range(300)], by="source")


@pytest.mark.parametrize(
    ("groups", "count"),
    [
        ([1, 2, 3, 1, 2, 3], 2),
        ([5, 5, 5], 3),
        ([1, 2, 3], None),
        ([1, 2, 1, 2, 1], None),
        ([1, 1, 2], None),
        ([], None),
        ([NO_SINKS, NO_SINKS], None),
    ],
)
def test_equal_repetition(groups, count):
    assert equal_repetition(groups) == count
