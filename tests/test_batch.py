"""The contract of a batch: five fields and perhaps a place, integers that have never been floats."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from memsinks.batch import FIELDS, PLACES, collate, stock_arguments, take_rows, trim
from memsinks.data.identity import document_id, exposures
from memsinks.data.packing import Rows, pack
from memsinks.errors import DataError


def make(sizes: list[int]) -> Rows:
    """Rows of 8 tokens of documents of these sizes."""
    tokens = [np.arange(size) + 1000 for size in sizes]
    return pack(tokens, np.arange(len(sizes)), np.ones(len(sizes), np.int64), length=max(8, *sizes), pad_id=999)


def test_collate_gives_the_five_fields_from_tensors_arrays_and_lists():
    rows = make([3, 4, 2, 6])
    plain = [{name: value.tolist() for name, value in row.items()} | {"attention_mask": [1] * 8} for row in rows]
    arrays = [{name: value.numpy() for name, value in row.items()} for row in rows]
    for given_rows in (list(rows), plain, arrays):
        batch = collate(given_rows)
        assert tuple(batch) == (*FIELDS, PLACES)
        assert torch.equal(batch[PLACES], torch.from_numpy(rows.places))
        for name in FIELDS:
            assert batch[name].dtype == torch.int64
            assert batch[name].tolist() == getattr(rows, name).tolist()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("labels", None, r"row 1 has no labels, only \['document_ids', .*remove_unused_columns=False"),
        ("input_ids", torch.ones(8), "input_ids of row 1 must be int64"),
        ("document_ids", torch.ones(8, dtype=torch.int32), "document_ids of row 1 must be int64"),
        ("document_ids", torch.tensor(3), "document_ids of row 1 must be int64"),
        ("document_ids", ["a"] * 8, "document_ids of row 1 is not a row of integers"),
        ("labels", [1] * 7, "labels of row 1 has length 7, others have 8"),
        ("exposures", [0] * 8, "exposures must be at least 1, got 0"),
        ("document_ids", [-2] * 8, "document_ids must be at least -1, got -2"),
    ],
)
def test_collate_refuses_bad_rows(name, value, message):
    rows = list(make([8, 8]))
    rows[1][name] = value
    if value is None:
        del rows[1][name]
    with pytest.raises(DataError, match=message):
        collate(rows)


def test_collate_refuses_no_rows():
    with pytest.raises(DataError, match="no rows"):
        collate([])


def test_places_are_left_out_where_a_row_has_none():
    rows = list(make([8, 8]))
    with_one = rows[0][PLACES].reshape(1)
    assert collate([rows[0] | {PLACES: with_one}, rows[1]])[PLACES].shape == (2,)
    del rows[1][PLACES]
    assert tuple(collate(rows)) == FIELDS
    assert PLACES not in stock_arguments(collate(rows[:1]))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2], r"places of row 0 must be int64 \[\], got torch.int64 \[2\]"),
        (1.0, "places of row 0 must be int64"),
        (-1, "places must be at least 0, got -1"),
    ],
)
def test_wrong_places_are_refused(value, message):
    with pytest.raises(DataError, match=message):
        collate([make([8])[0] | {PLACES: value}])


def test_rows_may_come_from_an_iterator_and_in_any_byte_order():
    rows = make([3, 4, 2, 6])
    foreign = ({name: value.numpy().astype(">i8") for name, value in row.items()} for row in rows)
    for name, value in collate(iter(rows)).items():
        assert torch.equal(value, collate(list(rows))[name])
    for name, value in collate(foreign).items():
        assert torch.equal(value, collate(list(rows))[name])


def test_trimming_and_taking_rows_know_what_a_place_is():
    batch = collate(make([3, 2, 2, 8]).select(slice(0, 1)))
    trimmed = trim(batch)
    assert trimmed["input_ids"].shape == (1, 7) and torch.equal(trimmed[PLACES], batch[PLACES])
    batch = collate(make([8, 8, 8]))
    part = take_rows(batch | {"use_cache": False}, torch.tensor([2, 0]), 3)
    assert part[PLACES].tolist() == batch[PLACES][[2, 0]].tolist() and part["use_cache"] is False


IDS = [document_id(f"text {number}") for number in range(4000)]


def rounded(ids: list[int]) -> np.ndarray:
    return np.array(ids, np.float64).astype(np.int64)


@pytest.mark.parametrize("count", [12, 4000])
def test_ids_that_went_through_floats_are_refused(count):
    ids = rounded(IDS[:count])
    tokens, ones = [np.arange(3)] * count, np.ones(count, np.int64)
    with pytest.raises(
        DataError, match=r"document_ids have all been rounded to 53 bits, e\.g\. \d+: .* through floats"
    ):
        pack(tokens, ids, ones, length=8, pad_id=0)
    with pytest.raises(DataError, match="groups have all been rounded"):
        exposures(ids)
    with pytest.raises(DataError, match="groups of prior have all been rounded"):
        exposures(np.array(IDS), dict.fromkeys(ids.tolist(), 2))
    row = make([12])[0]
    rows = [row | {"document_ids": torch.from_numpy(ids[:12])}]
    with pytest.raises(DataError, match="document_ids have all been rounded"):
        collate(rows)


@pytest.mark.parametrize(
    "ids",
    [
        IDS,
        rounded(IDS[:6]),  # too few to tell
        [rounded(IDS[:1])[0]] * 40,
        np.arange(400) << 54,  # made by hand
        (np.arange(1, 9) << 56) + 7,
        [*rounded(IDS[:100]), IDS[100]],
        [-1] * 20,
        [2**63 - 1] * 9,
    ],
    ids=["hashed", "few", "one", "shifted", "numbered", "one exact", "none", "largest"],
)
def test_other_ids_pass(ids):
    assert (
        pack([np.arange(3)] * len(ids), ids, np.ones(len(ids), np.int64), length=8, pad_id=0).document_ids[0, 0]
        == ids[0]
    )
