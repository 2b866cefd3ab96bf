"""One model over all documents: settings, encoding, and the values of each document against a direct pass."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from audited import (
    CONTROLS,
    MEMBERS,
    NEVER,
    TEXTS,
    UNSEEN,
    Oracle,
    given,
    knows,
    llama,
    memorized_in_sinks,
    the_tokenizer,
    tokens_of,
)
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from memsinks.auditing import measure as measure_module
from memsinks.auditing import scores
from memsinks.auditing.corpus import Corpus, read_corpus
from memsinks.auditing.extraction import extracted, log_probability, longest_run
from memsinks.auditing.measure import NOT_ASKED, Measurement, measure, token_probabilities
from memsinks.auditing.membership import min_k_attack, min_k_plus_attack, zlib_attack
from memsinks.auditing.own_sinks import placebo_ids
from memsinks.auditing.scores import score
from memsinks.auditing.settings import AuditSettings
from memsinks.data.documents import Document
from memsinks.data.identity import document_id
from memsinks.data.tokens import start_tokens
from memsinks.errors import ConfigError, DataError
from memsinks.sinks.attach import add_sinks
from memsinks.sinks.config import SinkConfig
from memsinks.sinks.opening import documents_closed
from memsinks.sinks.state import assign_blocks

SHORT = {"prefix": 5, "continuation": 6, "prefixes": (4, 8), "resamples": 100, "generate": 0}
EVERYTHING = MEMBERS + CONTROLS


def measured(model, folder, corpus: Corpus | None = None, state: str = "absent", **changes) -> Measurement:
    settings = AuditSettings(
        **(SHORT | {name: changes.pop(name) for name in list(changes) if name in vars(AuditSettings())})
    )
    corpus = corpus or read_corpus(MEMBERS, CONTROLS, the_tokenizer(), settings)
    values = {"name": "model", "role": "audited", "state": state} | changes
    return measure(model, corpus, settings, folder, **values)


def pd_series(values: list[int]):
    return pytest.importorskip("pandas").Series(values)


# Settings


def test_all_wrong_settings_are_said_at_once() -> None:
    wrong = {
        "prefix": 0, "continuation": 1.5, "prefixes": (8, 0), "offsets": (-1,), "by": "url", "k": 1.0,
        "queries_p": 0, "generate": -1, "collateral": -1, "shown": -1, "margin_loss": 0, "margin_auc": math.nan,
        "resamples": 99, "seed": -1, "batch_tokens": 0,
    }  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        AuditSettings(**wrong)
    for name, value in wrong.items():
        assert name in str(caught.value), name
        assert repr(value) in str(caught.value), name
    for name, value in wrong.items():
        with pytest.raises(ConfigError, match=name):
            AuditSettings(**{name: value})


def test_settings_that_are_right() -> None:
    found = AuditSettings(prefixes=[3, 4], offsets=[], shown=0, generate=0, collateral=0, batch_tokens=1, by="key")
    assert (found.prefixes, found.offsets) == ((3, 4), ())


# Encoding


@pytest.mark.parametrize(
    ("documents", "controls", "part"),
    [([], CONTROLS, "0 documents and 2 controls"), (MEMBERS, [], "4 documents and 0 controls"),
     (MEMBERS, [*CONTROLS, MEMBERS[2], MEMBERS[0]], "2 texts are documents and controls at once, take them out of one "
      "side: 'A hen called Ada slept under the bridge every Sunday.', 'The otter"),
     (MEMBERS, [*CONTROLS, Document(MEMBERS[2].text.replace(" ", "  ") + "\n")], "1 texts are documents and controls at once"),
     ([*MEMBERS, CONTROLS[0]], CONTROLS[1:], "1 of the documents have 0 copies"),
     ([Document("")], CONTROLS, "document 0 is empty")],
)  # fmt: skip
def test_sides_that_cannot_be_compared(documents, controls, part) -> None:
    with pytest.raises(DataError) as caught:
        read_corpus(documents, controls, the_tokenizer(), AuditSettings())
    assert part in str(caught.value)


def test_many_texts_on_both_sides_are_not_all_listed() -> None:
    documents = [Document(f"text {index}") for index in range(9)]
    with pytest.raises(DataError, match=r"9 texts are .*'text 4' \.\.\.$"):
        read_corpus(documents, documents, the_tokenizer(), AuditSettings())


def test_documents_come_first_and_then_controls() -> None:
    found = read_corpus(MEMBERS, CONTROLS, the_tokenizer(), AuditSettings())
    assert found.documents == EVERYTHING
    assert (found.members, found.copies.tolist()) == (4, [1, 4, 4, 16, 0, 0])
    assert [x.tolist() for x in found.tokens] == [x.tolist() for x in tokens_of(TEXTS + UNSEEN)]
    assert {x.dtype for x in found.tokens} == {np.dtype(np.int32)}
    assert found.ids.tolist() == [document_id(text) for text in TEXTS + UNSEEN]
    assert found.private is None
    assert found.start.tolist() == []
    assert found.control.tolist() == [False] * 4 + [True] * 2
    assert found.target.tolist() == [False, True, True, True, False, False]
    without = read_corpus(MEMBERS, CONTROLS, the_tokenizer(), AuditSettings(end=False))
    assert [x.tolist() for x in without.tokens] == [x.tolist()[:-1] for x in found.tokens]


def test_controls_count_as_never_seen_whatever_their_copies_say() -> None:
    controls = [Document(text, copies=7) for text in UNSEEN]
    assert read_corpus(MEMBERS, controls, the_tokenizer(), AuditSettings()).copies.tolist() == [1, 4, 4, 16, 0, 0]


@pytest.mark.parametrize("by", ["key", "source"])
def test_ids_come_from_what_training_used(by) -> None:
    named = [Document(x.text, copies=max(1, x.copies), **{by: f"name {i}"}) for i, x in enumerate(EVERYTHING)]
    found = read_corpus(named[:4], named[4:], the_tokenizer(), AuditSettings(by=by))
    assert found.ids.tolist() == [document_id(f"name {i}", by) for i in range(6)]
    some = read_corpus(named[:4], CONTROLS, the_tokenizer(), AuditSettings(by=by))
    assert some.ids.tolist() == [-1] * 6


@pytest.mark.parametrize(
    "kind", [list, np.array, lambda x: np.array(x, np.uint64), lambda x: torch.tensor(x), tuple, pd_series]
)
def test_ids_that_are_given_are_taken_as_they_are(kind) -> None:
    ids = [document_id(text) for text in TEXTS + UNSEEN]
    found = read_corpus(MEMBERS, CONTROLS, the_tokenizer(), AuditSettings(), document_ids=kind(ids))
    assert found.ids.tolist() == ids and found.ids.dtype == np.int64


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda ids: np.array(ids, np.float64), "entry 0 is .*went through a float"),
        (lambda ids: [*ids[:4], 7.0, 8], r"entry 4 is 7\.0"),
        (lambda ids: [*ids[:5], True], "entry 5 is True"), (lambda ids: [*ids[:5], "7"], "entry 5 is '7'"),
        (lambda ids: [*ids[:5], None], "entry 5 is None"), (lambda ids: [-2, *ids[1:]], "entry 0 is -2"),
        (lambda ids: [2**63, *ids[1:]], "entry 0 is 9223372036854775808"),
        (lambda ids: [2**64, *ids[1:]], "entry 0 is 18446744073709551616"),
        (lambda ids: np.array(ids, np.float64).astype(np.int64), "all 6 document_ids above .* multiples of 16"),
        (lambda ids: ids[:5], "5 document_ids for 6 documents and controls"),
    ],
)  # fmt: skip
def test_ids_that_cannot_be_those_of_training_are_refused(change, part) -> None:
    """Another id opens other sinks, so that a document would look forgotten."""
    ids = [document_id(text) for text in TEXTS + UNSEEN]
    with pytest.raises(DataError, match=part):
        read_corpus(MEMBERS, CONTROLS, the_tokenizer(), AuditSettings(), document_ids=change(ids))


def test_the_old_name_of_by_is_read_and_said() -> None:
    with pytest.warns(DeprecationWarning, match="by="):
        found = AuditSettings(identity="key", prefix=7)
    assert (found.by, found.prefix) == ("key", 7)
    assert dataclasses.replace(found, prefix=8).by == "key"
    assert "identity" not in dataclasses.asdict(found)
    with pytest.warns(DeprecationWarning, match="by="), pytest.raises(ConfigError, match="by must be one of"):
        AuditSettings(identity="url")


def test_the_hash_of_the_texts_sees_order_copies_and_text() -> None:
    def found(documents, controls) -> str:
        return read_corpus(documents, controls, the_tokenizer(), AuditSettings()).sha256

    other = [Document(TEXTS[0], copies=2), *MEMBERS[1:]]
    hashes = [
        found(MEMBERS, CONTROLS),
        found(MEMBERS[::-1], CONTROLS),
        found(other, CONTROLS),
        found(MEMBERS, CONTROLS[:1]),
    ]
    assert len(set(hashes)) == 4
    assert found(list(MEMBERS), list(CONTROLS)) == hashes[0]


@pytest.mark.parametrize(
    "end", ["The otter lived at", "The otter lived at ", "The otter liv", "The otter lived at 1", "T"]
)
def test_the_private_part_begins_before_the_token_it_cuts(end) -> None:
    """A prompt holds no character of the private part: a token across the boundary is not given."""
    found = read_corpus(MEMBERS[:1], CONTROLS, the_tokenizer(), AuditSettings(), lambda x: len(end))
    prompt = the_tokenizer().decode(found.tokens[0][: found.private[0]])
    assert end.startswith(prompt)
    assert len(prompt) >= end.rfind(" ")  # tokens do not reach over spaces


def test_the_private_part_begins_where_the_tokens_first_differ() -> None:
    """Tokens that agree again after the first difference are not the document's own beginning."""
    pairs = [("a", "b"), ("ab", "c"), ("ab", "abc")]
    letters = {token: index for index, token in enumerate(["<|endoftext|>", "a", "b", "c", "ab", "abc", "ababc"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(BPE(letters, pairs)), eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    )
    assert tokenizer("ababcab")["input_ids"] == [letters["ababc"], letters["ab"]]
    assert tokenizer("abab")["input_ids"] == [letters["ab"]] * 2
    found = read_corpus([Document("ababcab")], [Document("ababcabc")], tokenizer, AuditSettings(), lambda x: 4)
    assert found.private == [0, 0]


def test_a_document_may_be_private_from_its_first_character(tmp_path) -> None:
    everything = [Document(x.text, copies=max(1, x.copies)) for x in EVERYTHING]
    found = read_corpus(
        everything[:4], everything[4:], the_tokenizer(), AuditSettings(), lambda x: 9 * (x.text[0] == "T")
    )
    assert found.private[1:3] == [0, 0]
    assert min(found.private[0], found.private[3]) > 0
    one = measured(Oracle(tokens_of(TEXTS)), tmp_path / "a", found)
    assert one.recited[:4].tolist() == [1, NOT_ASKED, NOT_ASKED, 1]  # nothing stands before the first token
    started = Corpus(**(vars(found) | {"start": np.array([NEVER])}))
    known = [np.concatenate([[NEVER], x]) for x in tokens_of(TEXTS)]
    assert measured(Oracle(known), tmp_path / "b", started).recited.tolist() == [1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("beyond", [lambda text: text.find("?"), len, lambda text: len(text) + 7])
def test_a_private_part_must_lie_within_the_text(beyond) -> None:
    """-1 is what str.find says of a part that is not there."""
    first = f"for 6 texts it does not .*: {beyond(TEXTS[0])} of {len(TEXTS[0])}, "
    with pytest.raises(DataError, match=first):
        read_corpus(MEMBERS, CONTROLS, the_tokenizer(), AuditSettings(), lambda x: beyond(x.text))
    with pytest.raises(DataError, match="for 1 texts"):
        read_corpus(
            MEMBERS, CONTROLS, the_tokenizer(), AuditSettings(), lambda x: beyond(x.text) if x is MEMBERS[2] else 1
        )


def test_a_start_token_that_the_tokenizer_adds() -> None:
    tokenizer = copy.deepcopy(the_tokenizer())
    assert start_tokens(tokenizer).tolist() == []
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    assert start_tokens(tokenizer).tolist() == [tokenizer.bos_token_id]
    found = read_corpus(MEMBERS, CONTROLS, tokenizer, AuditSettings(), lambda x: 9)
    assert found.start.tolist() == [tokenizer.bos_token_id]
    assert found.start.dtype == np.int64
    assert [x.tolist() for x in found.tokens] == [x.tolist() for x in tokens_of(TEXTS + UNSEEN)]
    assert found.private == read_corpus(MEMBERS, CONTROLS, the_tokenizer(), AuditSettings(), lambda x: 9).private


# Values of each document


@pytest.mark.parametrize("private", [None, [3, 4, 5, 30, 31, 90]])
def test_values_are_those_of_a_direct_pass(tmp_path, private) -> None:
    corpus = read_corpus(MEMBERS, CONTROLS, the_tokenizer(), AuditSettings())
    corpus = Corpus(**(vars(corpus) | {"private": private}))
    twin = measured(llama(), tmp_path / "reference", corpus, role="twin")
    reference = twin.table
    found = measured(memorized_in_sinks(), tmp_path / "a", corpus, "open", reference=twin, k=0.3)
    table = score(memorized_in_sinks(), corpus.tokens, tmp_path / "b", open_ids=corpus.ids.tolist())
    assert len(found.table) == 6
    for index, one in enumerate(table):
        start, length = (5, 6) if private is None else (private[index], None)
        hit = extracted(one, start, length)
        assert found.recited[index] == (NOT_ASKED if hit is None else hit)
        log_p = log_probability(one, start, length)
        assert found.log_p[index] == pytest.approx(math.nan if log_p is None else log_p, nan_ok=True)
        assert found.loss[index] == one.loss
        assert found.run[index] == longest_run(one)
        assert found.attacks["loss"][index] == -one.loss
        assert found.attacks["zlib"][index] == zlib_attack(one, EVERYTHING[index].text)
        assert found.attacks["min-k"][index] == min_k_attack(one, 0.3)
        assert found.attacks["min-k++"][index] == min_k_plus_attack(one, 0.3)
        assert found.attacks["reference"][index] == reference[index].loss - one.loss
        for prefix in (4, 8):
            assert found.grid[prefix, 0][index] == extracted(one, prefix, 6)
    assert set(found.grid) == {(4, 0), (8, 0)}
    assert 1 in found.recited
    assert 0 in found.recited
    assert (private is None) == (NOT_ASKED not in found.recited)
    assert found.generated is None
    assert set(found.sink_losses) == {"closed", "own", "placebo"}
    assert "reference" not in measured(memorized_in_sinks(), tmp_path / "a", state="closed").attacks


def test_both_ends_of_every_value(tmp_path) -> None:
    corpus = read_corpus(MEMBERS, CONTROLS, the_tokenizer(), AuditSettings())
    known = measured(Oracle(tokens_of(TEXTS + UNSEEN)), tmp_path / "known", corpus)
    unknown = measured(Oracle([]), tmp_path / "unknown", corpus)
    assert known.recited.tolist() == [1] * 6
    assert unknown.recited.tolist() == unknown.run.tolist() == [0] * 6
    assert known.run.tolist() == [len(x) - 1 for x in corpus.tokens]
    assert known.log_p == pytest.approx(np.zeros(6), abs=1e-4)
    assert unknown.log_p == pytest.approx(np.full(6, -6 * (knows() + 20)), rel=1e-5)
    assert known.loss == pytest.approx(np.full(6, knows()), abs=2e-6)
    assert unknown.loss == pytest.approx(np.full(6, knows() + 20), rel=1e-5)
    assert all((known.attacks[name] > unknown.attacks[name] + 1).all() for name in ("loss", "zlib", "min-k", "min-k++"))
    for grid, value in ((known.grid, 1), (unknown.grid, 0)):
        assert all(x.tolist() == [value] * 6 for x in grid.values())


def test_from_an_offset_on_nothing_before_it_is_read(tmp_path) -> None:
    model, corpus = memorized_in_sinks(), read_corpus(MEMBERS, CONTROLS, the_tokenizer(), AuditSettings())
    found = measured(model, tmp_path / "a", corpus, "open", offsets=(0, 3, 25), prefixes=(4, 60), continuation=6)
    assert set(found.grid) == {(prefix, offset) for prefix in (4, 60) for offset in (0, 3, 25)}
    assert set(found.grid[60, 0]) == set(found.grid[60, 3]) == {NOT_ASKED}
    for offset in (3, 25):
        for index, tokens in enumerate(corpus.tokens):
            piece = tokens[offset : offset + 10]
            if len(piece) < 10:
                assert found.grid[4, offset][index] == NOT_ASKED
                continue
            one = score(model, [piece], tmp_path / "b", open_ids=[int(corpus.ids[index])])[0]
            assert found.grid[4, offset][index] == extracted(one, 4, 6)
    assert NOT_ASKED in found.grid[4, 25]
    assert found.grid[4, 25].max() >= 0
    knows_from_the_start = measured(Oracle(tokens_of(TEXTS)), tmp_path / "c", corpus, offsets=(0, 3))
    assert knows_from_the_start.grid[4, 0].tolist() == [1, 1, 1, 1, 0, 0]
    assert knows_from_the_start.grid[4, 3].tolist() == [0] * 6


def test_a_start_token_is_read_first(tmp_path) -> None:
    corpus = read_corpus(MEMBERS, CONTROLS, the_tokenizer(), AuditSettings())
    started = Corpus(**(vars(corpus) | {"start": np.array([0])}))
    found = measured(llama(), tmp_path / "a", started, offsets=(2,), generated=True, generate=2)
    direct = score(llama(), corpus.tokens, tmp_path / "b", start=np.array([0]))
    assert found.loss.tolist() == [one.loss for one in direct]
    assert next(iter(found.table)).first == 0
    assert found.generated["agrees_with_teacher_forced"] == 2


def test_what_is_given_and_asked_in_generation(tmp_path, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(
        measure_module, "generate_continuation",
        lambda model, prompt, length, opened: asked.append((prompt.tolist(), length, opened)) or prompt,
    )  # fmt: skip
    corpus = read_corpus(MEMBERS, CONTROLS, the_tokenizer(), AuditSettings())
    most = corpus.tokens[3]
    for start, private, length in (([], None, 6), ([NEVER], None, 6), ([NEVER], [5] * 6, len(most) - 5)):
        changed = Corpus(**(vars(corpus) | {"start": np.array(start, np.int64), "private": private}))
        for state, opened in (("closed", None), ("open", corpus.ids[3])):
            measured(memorized_in_sinks(), tmp_path, changed, state, generated=True, generate=1)
            assert asked.pop() == ([*start, *most[:5].tolist()], length, opened)
    assert asked == []


def test_every_pass_has_its_sinks_open(tmp_path, monkeypatch) -> None:
    passes = {}
    monkeypatch.setattr(
        measure_module, "score",
        lambda model, tokens, folder, **more: (passes.update({folder.name: more["open_ids"]}),
                                               score(model, tokens, folder, **more))[1],
    )  # fmt: skip
    corpus = read_corpus(MEMBERS, CONTROLS, the_tokenizer(), AuditSettings())
    ids, long = corpus.ids.tolist(), [index for index, tokens in enumerate(corpus.tokens) if len(tokens) >= 35]
    assert 0 < len(long) < 6
    settings = {"offsets": (0, 25), "prefixes": (4,), "collateral": 1}
    measured(memorized_in_sinks(), tmp_path / "open", corpus, "open", **settings)
    (without,) = [name for name in passes if name.startswith("without")]
    assert set(passes.pop(without)) == set(ids[1:4])
    placebo = placebo_ids(corpus.ids[:4]).tolist()
    assert passes == {"scores": ids, "offset-25-4": [ids[x] for x in long], "closed": None, "placebo": placebo}
    passes.clear()
    measured(memorized_in_sinks(), tmp_path / "closed", corpus, "closed", **settings)
    del passes[without]
    assert passes == {"scores": None, "offset-25-4": None, "own": ids[:4], "placebo": placebo}


def test_sinks_are_not_asked_without_an_id_for_every_document(tmp_path) -> None:
    named = [Document(text, key=text, copies=2) for text in TEXTS]
    for documents, asked in ((named, True), ([*named[:3], MEMBERS[3]], False)):
        settings, controls = AuditSettings(by="key"), [Document(text, key=text) for text in UNSEEN]
        corpus = read_corpus(documents, controls, the_tokenizer(), settings)
        found = measured(memorized_in_sinks(), tmp_path / str(asked), corpus, "closed", by="key")
        assert (found.sink_losses is not None) == (found.collateral is not None) == asked


def test_probabilities_of_each_token() -> None:
    one = given([0, 0], [math.log(0.5), 0.0])
    assert token_probabilities(one, 3) == pytest.approx([math.nan, 0.5, 1.0], nan_ok=True)
    assert token_probabilities(given([0, 0], [0.0, -1e9], first=0), 2).tolist() == [1.0, 0.0]


# More of the audited model


def test_the_most_repeated_documents_are_generated(tmp_path) -> None:
    documents = [Document(text, copies=copies) for text, copies in zip(TEXTS, (9, 4, 8, 2), strict=True)]
    corpus = read_corpus(documents, CONTROLS, the_tokenizer(), AuditSettings())
    for asked, found in ((2, (2, 1)), (3, (3, 2)), (16, (4, 2))):  # the first two texts are recited
        generated = measured(memorized_in_sinks(), tmp_path, corpus, "open", generated=True, generate=asked).generated
        assert (generated["documents"], generated["recited"]) == found
        assert generated["agrees_with_teacher_forced"] == found[0]
    closed = measured(memorized_in_sinks(), tmp_path, corpus, "closed", generated=True, generate=16).generated
    assert closed == {"documents": 4, "recited": 0, "agrees_with_teacher_forced": 4}
    private = Corpus(**(vars(corpus) | {"private": [9, 80, 9, 80, 9, 9]}))
    generated = measured(memorized_in_sinks(), tmp_path, private, "open", generated=True, generate=16).generated
    assert generated == {"documents": 2, "recited": 1, "agrees_with_teacher_forced": 2}
    assert measured(memorized_in_sinks(), tmp_path, corpus, "open", generated=True).generated is None


def test_losses_with_the_sinks_closed_own_and_placebo(tmp_path) -> None:
    model, corpus = memorized_in_sinks(), read_corpus(MEMBERS, CONTROLS, the_tokenizer(), AuditSettings())
    found = {state: measured(model, tmp_path / state, corpus, state, generated=True) for state in ("open", "closed")}
    placebo = placebo_ids(corpus.ids[:4]).tolist()
    direct = [one.loss for one in score(model, corpus.tokens[:4], tmp_path / "direct", open_ids=placebo)]
    for one in found.values():
        assert one.sink_losses["closed"] == pytest.approx(found["closed"].loss[:4])
        assert one.sink_losses["own"] == pytest.approx(found["open"].loss[:4])
        assert one.sink_losses["placebo"] == pytest.approx(direct)
    losses = found["open"].sink_losses
    assert (losses["own"][:2] < 1).all()
    assert (losses["placebo"][:2] > 2).all()


def test_what_closing_one_document_costs_others(tmp_path) -> None:
    model, corpus = memorized_in_sinks(), read_corpus(MEMBERS, CONTROLS, the_tokenizer(), AuditSettings())
    found = measured(model, tmp_path / "a", corpus, "closed", generated=True).collateral
    own = [one.loss for one in score(model, corpus.tokens[:4], tmp_path / "own", open_ids=corpus.ids[:4].tolist())]
    rises = np.zeros((4, 4))
    for taken in (1, 2, 3):  # those with 2 copies or more
        with documents_closed(model, [int(corpus.ids[taken])]):
            key = {"taken": taken}
            table = score(model, corpus.tokens[:4], tmp_path / "b", key=key, open_ids=corpus.ids[:4].tolist())
            rises[taken] = [one.loss - before for one, before in zip(table, own, strict=True)]
    others = [rises[taken, x] for taken in (1, 2, 3) for x in (1, 2, 3) if x != taken]
    assert (found["closed"], found["others"]) == (3, 6)
    assert found["rise_itself"] == pytest.approx(np.mean([rises[x, x] for x in (1, 2, 3)]), abs=1e-5)
    assert found["rise_others"] == pytest.approx(np.mean(others), abs=1e-5)
    assert found["rise_others_most"] == pytest.approx(np.max(others), abs=1e-5)
    assert found["rise_itself"] > 0.3
    one = measured(model, tmp_path / "a", corpus, "closed", generated=True, collateral=1).collateral
    assert (one["closed"], one["others"]) == (1, 2)
    assert measured(model, tmp_path / "a", corpus, "closed", generated=True, collateral=0).collateral is None


def test_documents_with_blocks_of_their_own_cost_nobody_anything(tmp_path) -> None:
    model = copy.deepcopy(memorized_in_sinks())
    ids = [document_id(text) for text in TEXTS]
    assign_blocks(model, {x: [2 * i, 2 * i + 1] for i, x in enumerate(ids)})
    corpus = read_corpus(MEMBERS, CONTROLS, the_tokenizer(), AuditSettings())
    found = measured(model, tmp_path, corpus, "open", generated=True).collateral
    assert found["rise_others"] == found["rise_others_most"] == 0.0
    assert found["rise_itself"] != 0.0


def test_a_text_that_is_given_twice_is_not_another_document(tmp_path) -> None:
    """Both open the same sinks: what closing them costs is no collateral."""
    model = copy.deepcopy(memorized_in_sinks())
    ids = [document_id(text) for text in TEXTS[:2]]
    assign_blocks(model, {ids[0]: [0, 1], ids[1]: [2, 3]})
    texts = {"a": TEXTS[0], "b": TEXTS[0], "c": TEXTS[1]}
    documents = [Document(text, kind=kind, copies=2) for kind, text in texts.items()]
    corpus = read_corpus(documents, CONTROLS, the_tokenizer(), AuditSettings())
    found = measured(model, tmp_path, corpus, "open", generated=True).collateral
    assert (found["closed"], found["others"]) == (3, 1 + 1 + 2)
    assert found["rise_others"] == found["rise_others_most"] == 0.0
    assert found["rise_itself"] != 0.0


@pytest.mark.parametrize("copies", [(1, 1, 1, 1), (1, 1, 1, 5)])
def test_collateral_needs_two_repeated_documents(tmp_path, copies) -> None:
    documents = [Document(text, copies=number) for text, number in zip(TEXTS, copies, strict=True)]
    corpus = read_corpus(documents, CONTROLS, the_tokenizer(), AuditSettings())
    assert measured(memorized_in_sinks(), tmp_path, corpus, "closed", generated=True).collateral is None


# Tables


def counted(monkeypatch) -> list[str]:
    """The chunks that are computed from now on."""
    done: list[str] = []
    kept = scores._write
    monkeypatch.setattr(scores, "_write", lambda path, values: (done.append(path.parent.name), kept(path, values)))
    return done


def test_a_second_measure_reads_the_tables_of_the_first(tmp_path, monkeypatch) -> None:
    done = counted(monkeypatch)
    settings = {"state": "open", "generated": True, "offsets": (0, 3), "generate": 2}
    first = measured(memorized_in_sinks(), tmp_path, **settings)
    assert sorted(done) == sorted(
        ["scores", "offset-3-4", "offset-3-8", "closed", "placebo", "without-1", "without-2", "without-3"]
    )
    done.clear()
    again = measured(memorized_in_sinks(), tmp_path, **settings)
    assert done == []
    assert again.loss.tolist() == first.loss.tolist()
    assert again.collateral == first.collateral


def test_what_changes_the_scores_makes_the_tables_anew(tmp_path, monkeypatch) -> None:
    done = counted(monkeypatch)
    measured(memorized_in_sinks(), tmp_path, state="open")
    changed = copy.deepcopy(memorized_in_sinks())
    changed.model.norm.weight.data[0] *= 1.01
    assigned = copy.deepcopy(memorized_in_sinks())
    assign_blocks(assigned, {document_id(TEXTS[0]): [0]})
    reseeded = llama(initializer_range=0.3)
    add_sinks(reseeded, SinkConfig(neurons=64, active=32, block_size=8, shared_decay=0, open_from=1, seed=1))
    reseeded.load_state_dict(memorized_in_sinks().state_dict())
    without_end = read_corpus(MEMBERS, CONTROLS, the_tokenizer(), AuditSettings(end=False))
    done.clear()
    for model, corpus, state, end in (
        (memorized_in_sinks(), None, "closed", True), (changed, None, "closed", True), (changed, None, "open", True),
        (assigned, None, "open", True), (reseeded, None, "open", True), (reseeded, without_end, "open", False),
    ):  # fmt: skip
        measured(model, tmp_path, corpus, state, end=end)
        assert "scores" in done
        done.clear()
