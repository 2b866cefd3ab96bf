"""Rows hold every token once, in order, and keep documents apart."""

from __future__ import annotations

import dataclasses
import itertools
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from memsinks.batch import FIELDS, PLACES, collate, trim
from memsinks.data.packing import Rows, pack
from memsinks.data.sampling import refuse_shuffling
from memsinks.errors import ConfigError, DataError

PAD = 999


@dataclasses.dataclass
class Segment:
    """One segment as found in the rows again."""

    row: int
    tokens: list[int]
    labels: list[int]
    id: int
    exposure: int


def segments(rows: Rows) -> list[Segment]:
    """Cut rows at the position ids that restart; checks that ids and exposures are constant within a segment."""
    found = []
    for row, used in enumerate(rows.used.tolist()):
        starts = [start for start in np.flatnonzero(rows.position_ids[row] == 0).tolist() if start < used] + [used]
        for start, end in itertools.pairwise(starts):
            part = {name: getattr(rows, name)[row, start:end].tolist() for name in FIELDS}
            assert part["position_ids"] == list(range(end - start))
            assert len(set(part["document_ids"])) == len(set(part["exposures"])) == 1
            found.append(Segment(row, part["input_ids"], part["labels"], part["document_ids"][0], part["exposures"][0]))
    return found


def make(sizes: list[int], length: int, **settings) -> Rows:
    """Pack documents of these sizes; every token of the corpus is another number, ids count, exposures are 1."""
    ends = np.cumsum(sizes)
    tokens = [np.arange(end - size, end) + 1000 for size, end in zip(sizes, ends, strict=True)]
    settings = {"document_ids": np.arange(len(sizes)), "exposures": np.ones(len(sizes), np.int64)} | settings
    return pack(tokens, length=length, pad_id=PAD, **settings)


CORPUS = st.lists(st.tuples(st.integers(1, 25), st.integers(-1, 4), st.integers(1, 4)), min_size=1, max_size=30)


@given(CORPUS, st.integers(2, 12), st.sampled_from([None, 1, 2, 3]), st.booleans(), st.sampled_from(["split", "fill"]))
def test_every_token_once_in_order_and_apart(corpus, length, apart_from, alone, long):
    sizes, ids, counts = (list(column) for column in zip(*corpus, strict=True))
    rows = make(
        sizes, length, document_ids=ids, exposures=counts, apart_from=apart_from, one_document_per_row=alone, long=long
    )
    found = segments(rows)

    def apart(id: int, exposure: int) -> bool:
        return apart_from is not None and exposure >= apart_from and id != -1

    # Order: each kind of row gives its documents back in the order given, each token once.
    for kind in (False, True):
        expected = []
        start = 1000
        for size, id, count in corpus:
            if apart(id, count) == kind:
                expected += [(token, id, count) for token in range(start, start + size)]
            start += size
        assert expected == [
            (token, segment.id, segment.exposure)
            for segment in found
            if apart(segment.id, segment.exposure) == kind
            for token in segment.tokens
        ]
    # Kinds never share a row.
    kinds = {(segment.row, apart(segment.id, segment.exposure)) for segment in found}
    assert len(kinds) == len(rows)
    # A document that fits into a row is never cut, under "fill" one of at most a quarter of it.
    if long == "split" or alone or max(sizes) <= length // 4:
        assert len(found) == sum(-(-size // length) for size in sizes)
    if alone:
        assert len(rows) == len(found)
    # Labels and padding.
    for segment in found:
        assert segment.labels == [-100, *segment.tokens[1:]]
    for row, used in enumerate(rows.used.tolist()):
        assert (rows.input_ids[row, used:] == PAD).all()
        assert (rows.labels[row, used:] == -100).all()
        assert (rows.document_ids[row, used:] == -1).all()
        assert (rows.exposures[row, used:] == 1).all()
        assert rows.position_ids[row, used:].tolist() == list(range(length - used))
    assert rows.tokens == sum(sizes)
    assert rows.targets == sum(sizes) - len(found)
    assert rows.fill == pytest.approx(sum(sizes) / (len(rows) * length))


def test_fields_are_int64_matrices():
    rows = make([3, 4, 5], 8)
    assert {(getattr(rows, name).dtype.str, getattr(rows, name).shape) for name in FIELDS} == {("<i8", (2, 8))}
    assert (len(rows), rows.length) == (2, 8)


def test_next_fit_by_hand():
    rows = make([3, 4, 2, 6], 8)
    assert rows.document_ids.tolist() == [[0, 0, 0, 1, 1, 1, 1, -1], [2, 2, 3, 3, 3, 3, 3, 3]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 0, 1, 2, 3, 4, 5]]


def test_long_documents_fill_rows():
    rows = make([3, 20, 2, 9], 8, long="fill")
    assert rows.document_ids.tolist() == [
        [0] * 3 + [1] * 5,
        [1] * 8,
        [1] * 7 + [-1],
        [2] * 2 + [3] * 6,
        [3] * 3 + [-1] * 5,
    ]
    assert rows.position_ids[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert rows[1]["labels"].tolist() == [-100, *range(1009, 1016)]  # the rest does not see what stands in another row


def test_apart_rows_come_in_the_order_they_were_opened():
    rows = make([2, 2, 2, 2], 4, document_ids=[7, 7, 7, 7], exposures=[1, 2, 1, 2], apart_from=2)
    assert rows.exposures.tolist() == [[1, 1, 1, 1], [2, 2, 2, 2]]
    assert rows.input_ids.tolist() == [[1000, 1001, 1004, 1005], [1002, 1003, 1006, 1007]]


def test_documents_without_sinks_stay_with_the_general_rows():
    rows = make([2, 2, 2], 4, document_ids=[5, -1, 6], exposures=[2, 9, 1], apart_from=2)
    assert rows.document_ids.tolist() == [[5, 5, -1, -1], [-1, -1, 6, 6]]


def test_long_documents():
    split = make([2, 9, 1], 4)
    assert [len(segment.tokens) for segment in segments(split)] == [2, 4, 4, 1, 1]
    assert [segment.id for segment in segments(split)] == [0, 1, 1, 1, 2]
    cut = make([2, 9, 1], 4, long="truncate")
    assert [segment.tokens for segment in segments(cut)] == [[1000, 1001], [1002, 1003, 1004, 1005], [1011]]
    with pytest.raises(DataError, match=r"2 documents are longer than a row of 4 tokens: document 1 has 9, .* 2 has 5"):
        make([2, 9, 5], 4, long="refuse")
    assert len(make([4, 4], 4, long="refuse")) == 2


def test_copies_may_share_one_array_of_any_integer_type():
    text = np.array([5, 6, 7], np.uint16)
    rows = pack([text, text], [3, 3], [1, 2], length=6, pad_id=0)
    assert rows.input_ids.tolist() == [[5, 6, 7, 5, 6, 7]]
    assert rows.exposures.tolist() == [[1, 1, 1, 2, 2, 2]]


def test_packing_is_fast():
    start = time.perf_counter()
    assert make([200] * 50_000, 2048).tokens == 10_000_000
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"document_ids": np.array([0.0, 1.0])}, "document_ids must be int64, got float64"),
        ({"document_ids": np.array([0, 1], np.int32)}, "document_ids must be int64, got int32"),
        ({"document_ids": [0, 2**63]}, "document_ids must be int64, got float64"),
        ({"document_ids": [[0, 1]]}, r"document_ids must be int64, got int64 \[1, 2\]; one integer for each document"),
        ({"document_ids": [0]}, "document_ids must have one number for each of the 2 documents, got 1"),
        ({"document_ids": ["0", "1"]}, "document_ids must be int64, got <U1"),
        ({"document_ids": [True, False]}, "document_ids must be int64, got bool"),
        ({"document_ids": np.array([0, 2**63], np.uint64)}, "document_ids must be int64, got uint64"),
        ({"document_ids": "ab"}, "document_ids must be int64, got <U2"),
        ({"document_ids": [0, -2]}, "document_ids must be at least -1, got -2 at document 1"),
        ({"exposures": [1, 0]}, "exposures must be at least 1, got 0 at document 1"),
        ({"exposures": np.ones(2)}, "exposures must be int64"),
        ({"tokens": []}, "corpus is empty"),
        ({"tokens": [np.arange(3), np.arange(0)]}, "document 1 has no tokens"),
        ({"tokens": [np.arange(3), np.ones(3)]}, "document 1 must be integers, got float64"),
        ({"tokens": [np.arange(3), np.ones((2, 2), int)]}, "document 1 must be one-dimensional"),
        ({"tokens": [np.arange(3), np.array([1, -100])]}, "document 1 must be at least 0, got -100"),
    ],
)
def test_bad_data_is_refused(change, message):
    good = {"tokens": [np.arange(3), np.arange(3)], "document_ids": [0, 1], "exposures": [1, 1]}
    with pytest.raises(DataError, match=message):
        pack(**(good | change), length=4, pad_id=0)


def test_bad_settings_are_refused_together():
    with pytest.raises(ConfigError) as caught:
        pack([np.arange(3)], [0], [1], length=1, pad_id=None, apart_from=0, long="drop")
    for part in ("length must", "pad_id must", "apart_from must", "long must"):
        assert part in str(caught.value)


def test_rows_are_a_dataset():
    rows = make([3, 4, 2, 6, 8], 8)
    assert set(rows[1]) == {*FIELDS, PLACES}
    assert all(rows[1][name].dtype == torch.int64 and rows[1][name].shape == (8,) for name in FIELDS)
    rows[1]["labels"][:] = 0
    assert rows[1]["labels"].tolist() == rows[-2]["labels"].tolist() == rows.labels[1].tolist() != [0] * 8
    with pytest.raises(IndexError):
        rows[3]
    part = rows.select(slice(1, 3))
    assert (len(part), part.tokens, part[0]["input_ids"].tolist()) == (2, 16, rows[1]["input_ids"].tolist())
    loaded = list(DataLoader(rows, batch_size=2, collate_fn=collate))
    assert torch.cat([batch["input_ids"] for batch in loaded]).tolist() == rows.input_ids.tolist()


def test_rows_know_their_place_in_the_training_order():
    rows = make([3, 4, 2, 6, 8], 8)
    places = [int(row[PLACES]) for row in rows]
    assert [place & (2**32 - 1) for place in places] == [0, 1, 2]
    (order,) = {place >> 32 for place in places}
    assert 0 <= order < 2**31
    part = rows.select(slice(2, None, -1)).select(slice(0, 2))
    assert [int(row[PLACES]) for row in part] == part.places.tolist() == [places[2], places[1]]
    again, others = make([3, 4, 2, 6, 8], 8), [
        make([3, 4, 2, 6, 8], 8, document_ids=[0, 1, 2, 4, 3]), make([3, 4, 2, 6, 8], 8, exposures=[1, 1, 1, 1, 2]),
        make([3, 4, 2, 6, 8], 16), make([3, 4, 2, 6], 8), make([4, 3, 2, 6, 8], 8),
    ]  # fmt: skip
    assert again.places.tolist() == places
    assert len({order, *(int(x[0][PLACES]) >> 32 for x in others)}) == 6


def test_segments_one_a_row_are_an_order_of_their_own():
    rows = make([3, 9, 2], 8)
    apart = rows.one_segment_each(rows.segments[[3, 1]])
    assert [row["input_ids"].tolist() for row in apart] == [[1012, 1013] + [PAD] * 6, [*range(1003, 1011)]]
    assert [place & (2**32 - 1) for place in apart.places.tolist()] == [0, 1]
    assert apart.places[0] >> 32 != rows.places[0] >> 32
    assert rows.segments["column"].tolist() == [0, 0, 0, 1]
    empty = rows.one_segment_each(rows.segments[:0])
    assert len(empty) == len(rows.select(slice(0))) == 0
    with pytest.raises(DataError, match="2 rows have 4 places"):
        dataclasses.replace(apart, places=np.arange(4))


def numbers(tokens: list[list[int]], ids: list[int], exposures: list[int]) -> list[int]:
    """The number of each document's text, in the order in which numbers come first."""
    rows = pack(tokens, ids, exposures, length=16, pad_id=PAD)
    texts = rows.texts().tolist()
    return [list(dict.fromkeys(texts)).index(number) for number in texts]


def test_texts_are_counted_where_ids_are_not():
    a, b, c = [1, 2], [3, 4], [5, 6]
    assert numbers([a, b, a, a], [7, 8, 7, 7], [1, 1, 2, 3]) == [0, 1, 0, 0]
    assert numbers([a, b, c], [7, 7, 7], [1, 2, 3]) == [0, 0, 0]  # near copies: one key
    assert numbers([a, b, c, b], [7, 7, 7, 7], [1, 1, 1, 2]) == [0, 1, 2, 1]  # texts of one source
    assert numbers([a, b, a], [7, 7, 7], [5, 1, 6]) == [0, 1, 0]  # a had been met before
    assert numbers([a, a, b], [-1, -1, -1], [1, 1, 1]) == [0, 0, 0]
    long = [*range(1, 40)]
    assert numbers([long, [2], [2, 9], long], [5, 5, 6, 5], [1, 1, 1, 2]) == [0, 0, 0, 1, 2, 0, 0, 0]


def test_iterators_byte_orders_and_the_largest_ids():
    ids, largest = [5, 2**63 - 1], 2**63 - 1
    plain = pack([[1, 2], [3]], ids, [1, 1], length=4, pad_id=0)
    assert plain.document_ids.tolist() == [[5, 5, largest, -1]]
    for given_tokens, given_ids, counts in (
        (iter([[1, 2], [3]]), iter(ids), iter([1, 1])),
        ([np.array([1, 2], ">i4"), np.array([3], ">u2")], np.array(ids, ">i8"), np.array([1, 1], ">i2")),
        ([np.array([1, 2], np.uint8), [np.int16(3)]], [np.int64(x) for x in ids], np.ones(2, np.int32)),
    ):
        rows = pack(given_tokens, given_ids, counts, length=np.int64(4), pad_id=np.int32(0))
        assert all(torch.equal(rows[0][name], plain[0][name]) for name in (*FIELDS, PLACES))


@pytest.mark.parametrize(
    ("long", "rows", "used"), [("split", 1251, 5001), ("fill", 1251, 5001), ("truncate", 2, 5), ("refuse", 0, 0)]
)
def test_a_very_long_document(long, rows, used):
    if long == "refuse":
        with pytest.raises(DataError, match="document 1 has 5000"):
            make([1, 5000], 4, long=long)
        return
    made = make([1, 5000], 4, long=long)
    assert (len(made), made.tokens) == (rows, used)


def test_a_document_of_one_token_has_no_target():
    rows = make([1], 4)
    assert rows.targets == 0 and rows[0]["labels"].tolist() == [-100] * 4
    assert trim(collate([rows[0]]))["input_ids"].tolist() == [[1000]]


DATA = list(range(8))


@pytest.mark.parametrize(
    "sampler",
    [
        RandomSampler(DATA),
        SubsetRandomSampler(DATA),
        WeightedRandomSampler([1.0] * 8, 8),
        DistributedSampler(DATA, num_replicas=2, rank=0),
        BatchSampler(RandomSampler(DATA), 2, False),
        DataLoader(DATA, shuffle=True),
        DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 2, False)),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_shuffling_is_refused(sampler):
    with pytest.raises(DataError, match="train_sampling_strategy"):
        refuse_shuffling(sampler)


def test_samplers_of_transformers_and_accelerate_are_refused():
    from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
    from transformers.trainer_pt_utils import LengthGroupedSampler

    rows = [{"input_ids": [1, 2]}] * 8
    shard = BatchSamplerShard(BatchSampler(SeedableRandomSampler(DATA), 2, False), 2, 0)
    for sampler in (LengthGroupedSampler(2, rows), shard):
        with pytest.raises(DataError, match="train_sampling_strategy"):
            refuse_shuffling(sampler)


def test_order_keeping_samplers_pass():
    refuse_shuffling(None)
    refuse_shuffling(SequentialSampler(DATA))
    refuse_shuffling(DistributedSampler(DATA, num_replicas=2, rank=0, shuffle=False))
    refuse_shuffling(DataLoader(DATA, batch_size=2))


def test_the_named_training_argument_gives_a_sequential_sampler(tmp_path):
    from transformers import Trainer, TrainingArguments

    rows = make([8, 8], 8)
    for strategy in ("sequential", "random"):
        arguments = TrainingArguments(
            output_dir=str(tmp_path), train_sampling_strategy=strategy, report_to=[], use_cpu=True,
            remove_unused_columns=False,
        )  # fmt: skip
        trainer = Trainer(torch.nn.Linear(1, 1), arguments, data_collator=collate, train_dataset=rows)
        if strategy == "sequential":
            refuse_shuffling(trainer.get_train_dataloader())
        else:
            with pytest.raises(DataError, match="RandomSampler"):
                refuse_shuffling(trainer.get_train_dataloader())
