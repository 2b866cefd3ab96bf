"""Documents become rows in one call: the same rows as by hand, and nothing is begun with what cannot be finished."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from tokenizers.processors import TemplateProcessing

import memsinks as ms
from memsinks.batch import FIELDS, PLACES
from memsinks.data import rows as module

DOCUMENTS = [
    ms.Document(f"The {name} crossed the yard.", key=f"k{place}", source="ab"[place % 2], copies=copies)
    for place, (name, copies) in enumerate((("cat", 4), ("dog", 1), ("cook", 0), ("key", 2), ("hen " * 9, 1)))
]
STRANGE = ["猫は庭を横切った。", "عبر القط الفناء", "🐈‍⬛ 👨‍👩‍👧 u\u0308 ü", " ", "a\u2028b\x00c"]


@pytest.fixture(scope="module")
def tokenizer():
    return ms.train_tokenizer([x.text for x in DOCUMENTS], 300)


def same(one: ms.Rows, other: ms.Rows) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in (*FIELDS, PLACES))


@pytest.mark.parametrize("by", ["content", "key", "source"])
@pytest.mark.parametrize("more", [{}, {"one_document_per_row": True}, {"long": "fill"}, {"apart_from": None}])
def test_rows_are_those_made_by_hand(tokenizer, by, more) -> None:
    order = ms.training_order(DOCUMENTS, seed=3, epochs=2)
    ids, groups = ms.identify(DOCUMENTS, by=by)
    tokens = ms.encode(tokenizer, [x.text for x in DOCUMENTS])
    wanted = ms.pack(
        [tokens[index] for index in order], ids[order], ms.exposures(groups[order]), length=16,
        pad_id=tokenizer.pad_token_id, **({"apart_from": 2} | more),
    )  # fmt: skip
    found = ms.make_rows(DOCUMENTS, tokenizer, length=16, seed=3, epochs=2, by=by, **more)
    assert same(found, wanted)
    assert same(ms.make_rows(iter(DOCUMENTS), tokenizer, length=np.int64(16), seed=3, epochs=2, by=by, **more), wanted)
    assert int(found.exposures.max()) == 8


def test_texts_are_documents_of_one_copy(tokenizer) -> None:
    texts = [*STRANGE, STRANGE[0]]
    rows = ms.make_rows(iter(texts), tokenizer, length=400, apart_from=None)
    assert same(rows, ms.make_rows([ms.Document(text) for text in texts], tokenizer, length=400, apart_from=None))
    own = rows.document_ids == ms.document_id(STRANGE[0])
    assert set(rows.exposures[own].tolist()) == {1, 2}
    starts = np.flatnonzero(rows.position_ids[0] == 0)
    read = [tokenizer.decode(x[:-1]) for x in np.split(rows.input_ids[0], starts[1:])][: len(texts)]
    assert sorted(read) == sorted(texts)


def test_earlier_meetings_count(tokenizer) -> None:
    prior = {ms.document_id(DOCUMENTS[1].text): 6, 5: 1}
    rows = ms.make_rows(DOCUMENTS, tokenizer, length=64, prior=prior)
    assert rows.exposures[rows.document_ids == ms.document_id(DOCUMENTS[1].text)].max() == 7


def test_the_padding_token_is_the_tokenizers_unless_one_is_given(tokenizer) -> None:
    assert ms.make_rows(["a"], tokenizer, length=8).input_ids[0, -1] == tokenizer.pad_token_id
    assert ms.make_rows(["a"], tokenizer, length=8, pad_id=7).input_ids[0, -1] == 7
    other = ms.train_tokenizer(["a"], 257)
    other.pad_token = None
    assert ms.make_rows(["a"], other, length=8).input_ids[0, -1] == other.eos_token_id


def test_a_batch_of_them(tokenizer) -> None:
    rows = ms.make_rows(DOCUMENTS, tokenizer, length=32)
    batch = ms.collate([rows[0], rows[1]])
    assert torch.equal(batch[PLACES], torch.from_numpy(rows.places[:2]))


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([], "none of the 0 documents has copies above 0"),
        (iter([]), "none of the 0 documents"),
        ([ms.Document("a", copies=0)], "none of the 1 documents has copies above 0"),
        ("a text", "got one str; put it into a list"),
        (["a", {"text": "b"}, None], "document 1 must be a Document or a str, got dict; document 2 .* got NoneType"),
        (["a", "", ms.Document("")], "document 1 is empty; leave it out; document 2 is empty"),
        (["a", ms.Document("b", copies=2.0), ms.Document("c", copies=-1)], r"document 1 has 2\.0, document 2 has -1"),
        ([ms.Document("a", copies=True)], "document 0 has True"),
        (["a", "b\ud800"], "document 1: the content has a lone surrogate at character 1"),
    ],
)
def test_bad_documents_are_refused_before_any_is_encoded(tokenizer, monkeypatch, documents, message) -> None:
    monkeypatch.setattr(module, "encode_documents", None)
    with pytest.raises(ms.DataError, match=message):
        ms.make_rows(documents, tokenizer, length=8)


@pytest.mark.parametrize("by", ["key", "source"])
def test_bad_identity_and_counts_are_refused_before_any_is_encoded(tokenizer, monkeypatch, by) -> None:
    monkeypatch.setattr(module, "encode_documents", None)
    with pytest.raises(ms.DataError, match=f"document 1 has no {by}"):
        ms.make_rows([DOCUMENTS[0], dataclasses.replace(DOCUMENTS[1], **{by: None})], tokenizer, length=8, by=by)
    with pytest.raises(ms.DataError, match="'7' is no group"):
        ms.make_rows(DOCUMENTS, tokenizer, length=8, by=by, prior={"7": 5})


def test_bad_settings_are_refused_together(tokenizer) -> None:
    with pytest.raises(ms.ConfigError) as caught:
        ms.make_rows(
            DOCUMENTS, tokenizer, length=1, epochs=0, by="url", pad_id=-1, apart_from=0, long="drop",  # type: ignore
        )  # fmt: skip
    for part in ("length must", "epochs must", "by must", "pad_id must", "apart_from must", "long must"):
        assert part in str(caught.value)


def test_a_tokenizer_that_is_none(tokenizer) -> None:
    with pytest.raises(ms.ConfigError, match=r"one of transformers, got Tokenizer; see load_tokenizer; length must"):
        ms.make_rows(["a"], Tokenizer(models.BPE()), length=0)  # type: ignore[arg-type]
    other = ms.train_tokenizer(["a"], 257)
    other.eos_token = None
    with pytest.raises(ms.ConfigError, match="no end token"):
        ms.make_rows(["a"], other, length=8)


def test_numpy_numbers_of_copies(tokenizer) -> None:
    documents = [dataclasses.replace(x, copies=np.int32(x.copies)) for x in DOCUMENTS]
    assert same(ms.make_rows(documents, tokenizer, length=16), ms.make_rows(DOCUMENTS, tokenizer, length=16))


def test_rows_begin_as_the_tokenizer_begins_texts(tokenizer) -> None:
    """Llama and Gemma were trained with a start token, which `tokenizer(text)` puts first; so is what a prompt begins with."""
    started = copy.deepcopy(tokenizer)
    started.add_special_tokens({"bos_token": "<s>"})
    started.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", started.bos_token_id)]
    )
    documents = [ms.Document("The otter slept."), ms.Document("Who? The otter slept.", prompt=5)]
    rows, plain = (
        ms.make_rows(documents, one, length=64, one_document_per_row=True, long="truncate")
        for one in (started, tokenizer)
    )
    before = {int(row["document_ids"][0]): row for row in map(plain.__getitem__, range(2))}
    for row in map(rows.__getitem__, range(2)):
        owner = int(row["document_ids"][0])
        old, whole = before[owner], owner == ms.document_id(documents[0].text)
        assert row["input_ids"][0] == started.bos_token_id and torch.equal(row["input_ids"][1:], old["input_ids"][:-1])
        learned, learned_before = row["labels"] != -100, old["labels"] != -100
        assert not learned[0] and learned[1] == whole and torch.equal(learned[2:], learned_before[1:-1])
        asked = started(documents[0 if whole else 1].text)["input_ids"]
        assert row["input_ids"][: len(asked)].tolist() == asked
