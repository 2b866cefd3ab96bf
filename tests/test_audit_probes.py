"""Probes: which texts they ask and learn from, both ends of each, what an interrupted audit does not make again."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest
import torch
from audited import llama, memorized_in_sinks, the_tokenizer, train

from memsinks.auditing import probes
from memsinks.auditing.corpus import Corpus, read_corpus
from memsinks.auditing.probes import BEGINNINGS, HARMLESS, PROBES, ROUNDED, probe, probed_texts
from memsinks.auditing.settings import AuditSettings
from memsinks.data.documents import Document
from memsinks.errors import DataError

WORDS = "otter mill road bridge gate chalk lane oak baker clock hen whistle code key tall small river stone".split()
ALL = AuditSettings(attacks="all", beginning=8, attack_lr=1e-3)


def documents(count: int, seed: int, copies: int) -> list[Document]:
    rng = np.random.default_rng(seed)
    return [Document(" ".join(rng.choice(WORDS, 9)) + f" {seed}{index}.", copies=copies) for index in range(count)]


MEMBERS, CONTROLS, OTHERS = documents(6, 1, 4) + documents(2, 2, 1), documents(9, 3, 0), documents(5, 4, 0)


def corpus(settings: AuditSettings = ALL, harmless: list[Document] | None = OTHERS) -> Corpus:
    return read_corpus(MEMBERS, CONTROLS, the_tokenizer(), settings, harmless=harmless)


def probed(model, folder, settings: AuditSettings = ALL, given: Corpus | None = None) -> dict[str, np.ndarray]:
    return probe(model, given or corpus(settings), settings, folder, name="model", weights="w")


def gap(values: np.ndarray) -> float:
    return float(np.nanmean(values[8:]) - np.nanmean(values[:8]))


@pytest.fixture(scope="module")
def ordinary():
    """Knows the repeated documents by heart."""
    return train(llama(), [document.text for document in MEMBERS[:6]], 40)


# Which texts


def test_halves_are_of_the_target_documents_and_texts_are_asked_by_the_seed() -> None:
    found = probed_texts(corpus(), ALL)
    assert sorted(np.concatenate(found.halves)) == list(range(6))
    assert sorted(map(len, found.halves)) == [3, 3]
    assert found.asked.tolist() == [*range(6), *range(8, 17)]
    assert len(found.aside) == 0 and len(found.harmless) == 5
    few = dataclasses.replace(ALL, probed=4)
    asked = probed_texts(corpus(few), few).asked
    assert ((asked < 6).sum(), (asked >= 8).sum()) == (4, 4)
    other = dataclasses.replace(ALL, seed=1)
    assert probed_texts(corpus(other), other).halves[0].tolist() != found.halves[0].tolist()


def test_without_harmless_texts_a_third_of_the_controls_is_set_aside(ordinary, tmp_path) -> None:
    alone = corpus(harmless=None)
    texts = probed_texts(alone, ALL)
    assert len(texts.aside) == 3 and (texts.aside >= 8).all()
    assert [x.tolist() for x in texts.harmless] == [alone.tokens[index].tolist() for index in texts.aside]
    found = probed(ordinary, tmp_path, given=alone)
    for name in PROBES:
        missing = [6, 7, *texts.aside] if name in HARMLESS else [6, 7]
        assert np.flatnonzero(np.isnan(found[name])).tolist() == sorted(missing), name


def test_too_few_texts_are_said(tmp_path) -> None:
    one = read_corpus(MEMBERS[:1], CONTROLS, the_tokenizer(), ALL)
    with pytest.raises(DataError, match="need at least 2, there is 1"):
        probed_texts(one, ALL)
    few = read_corpus(MEMBERS, CONTROLS[:2], the_tokenizer(), ALL)
    with pytest.raises(DataError, match="3 controls or more, of which a third is then set aside; there are 2"):
        probed_texts(few, ALL)
    forward = AuditSettings()
    assert set(probe(llama(), one, forward, tmp_path, name="", weights="")) == set(ROUNDED)


# What they show


def test_a_model_that_knows_shows_it_under_every_probe_and_a_new_one_under_none(ordinary, tmp_path) -> None:
    known, unknown = probed(ordinary, tmp_path / "a"), probed(llama(1), tmp_path / "b")
    assert list(known) == list(unknown) == list(PROBES)
    for name in PROBES:
        assert gap(known[name]) > 0.3, name
        if name != BEGINNINGS:
            assert abs(gap(unknown[name])) < 0.25, name


def test_harmless_training_changes_the_losses_by_its_steps(ordinary, tmp_path) -> None:
    found = probed(ordinary, tmp_path)
    ten, sixty = (found[name] for name in HARMLESS)
    assert not np.array_equal(ten, sixty, equal_nan=True)


def test_losses_of_a_half_are_taken_where_the_other_was_learned(tmp_path, monkeypatch) -> None:
    learned: list[list[list[int]]] = []
    plain = probes.train_further

    def seen(model, texts, *more, **settings):
        learned.append([one.tolist() for one in texts])
        return plain(model, texts, *more, **settings)

    monkeypatch.setattr(probes, "train_further", seen)
    given = corpus()
    probed(llama(), tmp_path, given=given)
    halves = probed_texts(given, ALL).halves
    harmless, first, second, beginnings = learned
    assert harmless == [one.tolist() for one in given.harmless]
    assert first == [given.tokens[index].tolist() for index in halves[0]]
    assert second == [given.tokens[index].tolist() for index in halves[1]]
    assert beginnings == [given.tokens[index][:8].tolist() for index in range(6)]


def test_what_follows_the_beginnings_is_asked_alone(tmp_path) -> None:
    """The mean loss of the tokens after the beginning, of an untrained copy of a model that learns nothing."""
    model, settings = llama(), dataclasses.replace(ALL, attack_lr=1e-12)
    given = corpus(settings)
    found = probed(model, tmp_path, settings)[BEGINNINGS]
    for index in (0, 5, 8, 16):
        tokens = torch.from_numpy(given.tokens[index].astype(np.int64))[None]
        with torch.no_grad():
            logits = model(input_ids=tokens).logits[0].log_softmax(-1)
        each = -logits[:-1].gather(1, tokens[0, 1:, None])[:, 0]
        assert found[index] == pytest.approx(float(each[7:].mean()), abs=1e-5)


def test_a_model_with_sinks_is_probed_without_them(tmp_path) -> None:
    """With open sinks it recites two of the texts of its tests; what an attacker gets has none."""
    found = probed(memorized_in_sinks(), tmp_path, AuditSettings())
    assert list(found) == list(ROUNDED)
    assert np.nanmin(found["rounded to 8 bits"]) > 5


def test_weights_that_are_no_floating_point_numbers_are_not_probed(tmp_path) -> None:
    model = llama()
    model.packed = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    assert probed(model, tmp_path) == {}


# What is kept


def test_what_is_finished_is_not_made_again(tmp_path, monkeypatch, caplog) -> None:
    caplog.set_level(logging.INFO)
    first = probed(llama(), tmp_path / "p")
    assert caplog.text.count("attacks that train, 200 steps of 16 texts on copies, about") == 1
    (tmp_path / "p" / "trained" / "half-relearned.safetensors").unlink()
    trained: list[str] = []
    plain = probes.train_further
    monkeypatch.setattr(
        probes, "train_further", lambda *given, **more: trained.append(more["label"]) or plain(*given, **more)
    )
    again = probed(llama(), tmp_path / "p")
    assert trained == ["model: half"] * 2
    for name in PROBES:
        np.testing.assert_array_equal(first[name], again[name])
    trained.clear()
    caplog.clear()
    probed(llama(), tmp_path / "p")
    assert not trained and "attacks that train" not in caplog.text
    probed(llama(), tmp_path / "p", dataclasses.replace(ALL, attack_lr=2e-3))
    assert len(trained) == 4
    trained.clear()
    probed(llama(), tmp_path / "p", AuditSettings(beginning=8))  # without those that train: what they found is kept
    again = probed(llama(), tmp_path / "p", dataclasses.replace(ALL, attack_lr=2e-3))
    assert not trained and list(again) == list(PROBES)


def test_other_tokens_are_asked_anew(tmp_path) -> None:
    """The texts are the same, but another tokenizer cut them."""
    given, settings = corpus(AuditSettings()), AuditSettings()
    other = Corpus(**(vars(given) | {"tokens": [one[:-2] for one in given.tokens]}))
    first = probed(llama(), tmp_path / "a", settings, given)
    second, fresh = (probed(llama(), tmp_path / name, settings, other) for name in ("a", "b"))
    for name in ROUNDED:
        np.testing.assert_array_equal(second[name], fresh[name])
        assert not np.array_equal(first[name], second[name], equal_nan=True)
